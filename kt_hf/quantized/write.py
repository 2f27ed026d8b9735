"""Quantizing a checkpoint's experts, a layer at a time, into a folder of saved experts."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..backends import OPERATORS, QUANTIZED, choose_backend, kernel_availability
from ..checkpoint.expert_index import ExpertCheckpoint
from ..checkpoint.fingerprint import fingerprints_of_files
from ..errors import KTAMXConfigError
from ..shapes import ExpertShape
from ..system.cpu import ThreadPlan
from ..system.disk import disk_errors
from .manifest import LayerEntry, Manifest
from .worker import Job, in_new_process, work

_BLOCK = 4096  # of a file system: the last one of a file is not full
# What a process may keep of the layers it has done, beside one layer: starting another takes seconds.
_KEPT = 4 * 2**30


def quantize(
    checkpoint: ExpertCheckpoint,
    config: Any,
    out: Path,
    backend: str,
    plan: ThreadPlan,
    backward: bool = True,
    name: str | None = None,
    trust_remote_code: bool = False,
    on_layer: Callable[[int], None] = lambda bytes_read: None,
) -> None:
    """Write the experts of a checkpoint, quantized, to a new folder, which is there whole or not at all.

    Takes memory for about five layers in bf16, or 4 GiB where layers are small. kt-kernel never frees packed weights,
    so large models are quantized in batches of layers, one process each.

    Args:
        checkpoint: What is read, once.
        config: The model's configuration.
        out: A folder that does not exist, or is empty.
        backend: AMXInt8 or AMXInt4.
        plan: Worker threads; the folder can be loaded with as many pools of them as the plan has.
        backward: Also write the weights for backward: twice the size, but no repacking at each backward.
        name: The model's, for messages; the checkpoint's folder by default.
        trust_remote_code: As the checkpoint was opened with.
        on_layer: Called after each layer with the bytes of it in the checkpoint.

    Raises:
        KTAMXNotAvailableError: The operators do not run here.
        KTAMXConfigError: Sizes they cannot take, `out` is in use, or the disk has not enough space.
        KTAMXError: The checkpoint is damaged, or the disk has become full.
        OSError: The folder cannot be written.
    """
    if backend not in QUANTIZED:
        raise KTAMXConfigError(f"Experts are quantized for {' or '.join(QUANTIZED)}, not for {backend}.")
    shapes, pools = checkpoint.shapes, len(plan.pools)
    for shape in set(shapes.values()):
        choose_backend(backend, shape, pools)
    out = Path(out).absolute()
    needed = sum(bytes_on_disk(shape, backend, pools, backward) for shape in shapes.values())
    _check_out(out, needed)
    details, marks = kernel_availability().details, fingerprints_of_files(checkpoint.files, checkpoint.layers)
    with _partial_folder(out, needed) as partial:
        layers: dict[str, LayerEntry] = {}
        for layer, entry in _write_layers(checkpoint, trust_remote_code, partial, backend, plan, backward):
            layers[layer] = entry
            on_layer(checkpoint.source_bytes(layer))
        Manifest(
            backend=backend,
            backward=backward,
            pools=pools,
            kt_kernel=details["version"],
            variant=details["variant"],
            model=name or str(checkpoint.files.folder),
            model_type=config.model_type,
            config_sha256=_config_hash(checkpoint.files.folder, config),
            marks=marks,
            layers=layers,
        ).write(partial)


def _write_layers(
    checkpoint: ExpertCheckpoint, trust_remote_code: bool, out: Path, backend: str, plan: ThreadPlan, backward: bool
) -> Iterator[tuple[str, LayerEntry]]:
    """Name and files of each layer, once they are written; several batches by a process each."""
    folder, batches = str(checkpoint.files.folder.absolute()), _batches(checkpoint, backend)
    do = work if len(batches) == 1 else in_new_process
    for layers in batches:
        yield from do(Job(folder, trust_remote_code, str(out), layers, backend, list(plan.pools), backward))


@contextmanager
def _partial_folder(out: Path, size: int) -> Iterator[Path]:
    """`OUT.partial`, which becomes `out` at the end, and is removed if the body raises.

    Unlike `system.files.new_folder` under one known name: it holds tens of GB, and two runs that write the same folder
    are to notice each other.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    try:
        partial.mkdir()
    except FileExistsError:
        raise KTAMXConfigError(
            f"{partial} is there: another run writes it, or one was interrupted. Remove it if none does."
        ) from None
    try:
        with disk_errors(out, size):
            yield partial
            partial.rename(out)  # over an empty folder too
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def bytes_on_disk(shape: ExpertShape, backend: str, pools: int, backward: bool) -> int:
    """Bytes that the files of one layer take on the disk, at most.

    Args:
        shape: Sizes of the layer.
        backend: AMXInt8 or AMXInt4.
        pools: Of worker threads; each writes files of its own.
        backward: With the weights for backward.
    """
    E, H, I = shape.num_experts, shape.hidden_size, shape.intermediate_size  # noqa: E741
    packed = int(shape.num_weights * OPERATORS[backend].bytes_per_weight) * (2 if backward else 1)
    scales = 4 * E * pools * ((2 * I + H) + (2 * H + I if backward else 0))
    files = E * pools * (12 if backward else 6)
    return packed + scales + files * _BLOCK


def _batches(checkpoint: ExpertCheckpoint, backend: str) -> list[dict[str, str]]:
    """The layers, with names for their folders, in batches that one process can do."""
    batches: list[dict[str, str]] = []
    kept = 0.0
    for index, layer in enumerate(checkpoint.layers):
        weights = checkpoint.shapes[layer].num_weights
        if not batches or kept > max(_KEPT, 2 * weights):
            batches.append({})
            kept = 0.0
        batches[-1][layer] = f"layer_{index:04d}"
        kept += weights * OPERATORS[backend].bytes_per_weight
    return batches


def _check_out(out: Path, needed: int) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise KTAMXConfigError(f"{out} is there already and not an empty folder: give the name of a new one.")
    existing = next(folder for folder in out.parents if folder.is_dir())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise KTAMXConfigError(
            f"{out} needs {needed / 2**30:.1f} GiB, and {existing} has {free / 2**30:.1f} GiB free. --no-backward "
            "halves it (and slows backward), --to int4 as well."
        )


def _config_hash(folder: Path, config: Any) -> str:
    file = folder / "config.json"
    data = file.read_bytes() if file.is_file() else json.dumps(config.to_dict(), sort_keys=True, default=str).encode()
    return hashlib.sha256(data).hexdigest()
