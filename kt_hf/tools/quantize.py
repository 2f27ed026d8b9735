"""The work of `kt-hf quantize`: from a model's name to a folder of packed experts, with a progress bar."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from ..checkpoint import ExpertCheckpoint, checkpoint_folder
from ..checkpoint.progress import LayersBar
from ..errors import KTAMXConfigError
from ..quantized.compressed import quantize_to_int4
from ..quantized.write import quantize
from ..system.cpu import ThreadPlan, plan_threads
from ..system.gpu import experts_device


def run(
    model: str,
    out: Path,
    backend: str,
    backward: bool = True,
    pools: int | None = None,
    trust_remote_code: bool = False,
    console: Console | None = None,
) -> None:
    """Quantize the experts of a model and write them to a new folder.

    Args:
        model: The model's folder, or its name on the hub.
        out: The folder to write.
        backend: "AMXInt8" or "AMXInt4".
        backward: Whether to write the weights for backward too, as much again.
        pools: Number of NUMA nodes of the machine that will load them; None for this machine's.
        trust_remote_code: Whether to run code that comes with the model, as transformers has it.
        console: Where to show progress; None for stderr.

    Raises:
        KTAMXError: There is no such model, or its experts cannot be quantized.
        OSError: The folder cannot be written.
    """
    config, checkpoint = _opened(model, trust_remote_code)
    with LayersBar(len(checkpoint.layers), console, "Quantizing the experts") as bar:
        quantize(
            checkpoint, config, out, backend, plan_for(pools), backward, model, trust_remote_code, on_layer=bar.advance
        )


def run_int4(model: str, out: Path, trust_remote_code: bool = False, console: Console | None = None) -> None:
    """Write a model with its routed experts in int4 to a new folder, in compressed-tensors' layout.

    Computed on the GPU if there is one.

    Args:
        model: The model's folder, or its name on the hub.
        out: The folder to write.
        trust_remote_code: Whether to run code that comes with the model, as transformers has it.
        console: Where to show progress; None for stderr.

    Raises:
        KTAMXError: There is no such model, or its experts cannot be quantized.
        OSError: The folder cannot be written.
    """
    _, checkpoint = _opened(model, trust_remote_code)
    folder = checkpoint.files.folder
    with LayersBar(len(checkpoint.files.files), console, "Quantizing the experts") as bar:
        quantize_to_int4(folder, out, experts_device(), on_shard=bar.advance)


def _opened(model: str, trust_remote_code: bool) -> tuple[Any, ExpertCheckpoint]:
    """The model's configuration, and its experts, checked by the files' headers."""
    from transformers import AutoConfig

    folder = checkpoint_folder(model)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise KTAMXConfigError(f"{model!r}: {' '.join(str(error).split())}") from error
    return config, ExpertCheckpoint(folder, config, trust_remote_code)


def plan_for(pools: int | None) -> ThreadPlan:
    """This machine's plan of worker threads, with `pools` pools, several on a NUMA node where it has fewer nodes.

    None keeps the number of pools that the machine has NUMA nodes.
    """
    plan = plan_threads()
    if pools is None or pools == len(plan.pools):
        return plan
    nodes = [node for node, _ in plan.pools]
    each = max(1, plan.workers // pools)
    return ThreadPlan(tuple((nodes[i % len(nodes)], each) for i in range(pools)))
