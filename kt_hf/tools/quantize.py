"""What `kt-hf quantize` does: from a model's name to a folder of saved experts, with a progress bar."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from ..checkpoint.expert_index import ExpertCheckpoint, checkpoint_folder
from ..checkpoint.progress import LayersBar
from ..errors import KTAMXConfigError
from ..quantized.write import quantize
from ..system.cpu import ThreadPlan, plan_threads


def run(
    model: str,
    out: Path,
    backend: str,
    backward: bool = True,
    pools: int | None = None,
    trust_remote_code: bool = False,
    console: Console | None = None,
) -> None:
    """Quantise the experts of a model, a folder's or the hub's.

    Args:
        pools: NUMA nodes of the machine that will load them; None for this machine's.

    Raises:
        KTAMXError, OSError: As `quantise`, or there is no such model.
    """
    from transformers import AutoConfig

    folder = checkpoint_folder(model)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise KTAMXConfigError(f"{model!r}: {' '.join(str(error).split())}") from error
    checkpoint = ExpertCheckpoint(folder, config, trust_remote_code)
    with LayersBar(len(checkpoint.layers), console, "Quantising the experts") as bar:
        quantize(
            checkpoint, config, out, backend, plan_for(pools), backward, model, trust_remote_code, on_layer=bar.advance
        )


def plan_for(pools: int | None) -> ThreadPlan:
    """This machine's plan, with as many pools as asked for: where it has fewer nodes, several of one."""
    plan = plan_threads()
    if pools is None or pools == len(plan.pools):
        return plan
    nodes = [node for node, _ in plan.pools]
    each = max(1, plan.workers // pools)
    return ThreadPlan(tuple((nodes[i % len(nodes)], each) for i in range(pools)))
