"""Quantising a checkpoint's experts, a layer at a time, into a folder of saved experts."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from ..backends import (
    OPERATORS,
    QUANTISED,
    ExpertShape,
    ExpertWeights,
    choose_backend,
    kernel_availability,
    save_packed,
)
from ..checkpoint import ExpertCheckpoint
from ..cpu import ThreadPlan
from ..errors import KTAMXConfigError
from ..packing import return_freed_memory
from .manifest import Manifest, SavedLayerFiles
from .marks import marks_of_files, marks_of_weights
from .saved import checksums

logger = logging.getLogger(__name__)

_BLOCK = 4096  # of a file system: the last one of a file is not full


def quantise(
    checkpoint: ExpertCheckpoint,
    config: Any,
    out: Path,
    backend: str,
    plan: ThreadPlan,
    backward: bool = True,
    name: str | None = None,
    on_layer: Callable[[int], None] = lambda bytes_read: None,
) -> None:
    """Write the experts of a checkpoint, quantised, to a new folder, which is there whole or not at all.

    Takes memory for about four layers in bf16.

    Args:
        checkpoint: What is read, once.
        config: The model's configuration.
        out: A folder that does not exist, or is empty.
        backend: AMXInt8 or AMXInt4.
        plan: Its pools are those that the folder can be loaded with.
        backward: Also write the weights for backward: twice the size, but no repacking at each backward.
        name: The model's, for messages; the checkpoint's folder by default.
        on_layer: Called after each layer with the bytes of it in the checkpoint.

    Raises:
        KTAMXNotAvailableError: The operators do not run here.
        KTAMXConfigError: Sizes they cannot take, `out` is in use, or the disk has not enough space.
        KTAMXError: The checkpoint is damaged.
        OSError: The folder cannot be written.
    """
    if backend not in QUANTISED:
        raise KTAMXConfigError(f"Experts are quantised for {' or '.join(QUANTISED)}, not for {backend}.")
    shapes, pools = checkpoint.shapes, len(plan.pools)
    for shape in set(shapes.values()):
        choose_backend(backend, shape, pools)
    out = Path(out).absolute()
    _check_place(out, sum(bytes_on_disk(shape, backend, pools, backward) for shape in shapes.values()))
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    try:
        partial.mkdir()
    except FileExistsError:
        raise KTAMXConfigError(
            f"{partial} is there: another run writes it, or one was interrupted. Remove it if none does."
        ) from None
    try:
        layers = _write_layers(checkpoint, partial, backend, plan, backward, on_layer)
        details = kernel_availability().details
        Manifest(
            backend=backend,
            backward=backward,
            pools=pools,
            kt_kernel=details["version"],
            variant=details["variant"],
            model=name or str(checkpoint.files.folder),
            model_type=config.model_type,
            config_sha256=_config_hash(checkpoint.files.folder, config),
            marks=marks_of_files(checkpoint.files, checkpoint.layers),
            layers=layers,
        ).write(partial)
        partial.rename(out)  # over an empty folder too
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def bytes_on_disk(shape: ExpertShape, backend: str, pools: int, backward: bool) -> int:
    """Of one layer's files, at most."""
    E, H, I = shape.num_experts, shape.hidden_size, shape.intermediate_size  # noqa: E741
    packed = int(3 * E * H * I * OPERATORS[backend].bytes_per_weight) * (2 if backward else 1)
    scales = 4 * E * pools * ((2 * I + H) + (2 * H + I if backward else 0))
    files = E * pools * (12 if backward else 6)
    return packed + scales + files * _BLOCK


def _write_layers(
    checkpoint: ExpertCheckpoint, folder: Path, backend: str, plan: ThreadPlan, backward: bool,
    on_layer: Callable[[int], None],
) -> dict[str, SavedLayerFiles]:  # fmt: skip
    made = {}
    # The next layer is read while one is quantised.
    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(checkpoint.read, checkpoint.layers[0], torch.bfloat16)
        for index, layer in enumerate(checkpoint.layers):
            weights = ahead.result()
            if index + 1 < len(checkpoint.layers):
                ahead = reader.submit(checkpoint.read, checkpoint.layers[index + 1], torch.bfloat16)
            made[layer] = _write_layer(weights, checkpoint.shapes[layer], layer, folder / f"layer_{index:04d}",
                                       backend, plan, backward)  # fmt: skip
            return_freed_memory()
            on_layer(checkpoint.source_bytes(layer))
    return made


def _write_layer(
    weights: ExpertWeights, shape: ExpertShape, layer: str, folder: Path, backend: str, plan: ThreadPlan, backward: bool
) -> SavedLayerFiles:
    source = marks_of_weights(weights)
    save_packed(backend, weights, shape, plan, folder, backward, layer)
    files = {file.relative_to(folder).as_posix(): file.stat().st_size for file in sorted(folder.rglob("*.kt"))}
    sums = checksums(folder, files)
    sizes = [shape.num_experts, shape.hidden_size, shape.intermediate_size]
    return SavedLayerFiles(folder.name, sizes, source, {file: (size, sums[file]) for file, size in files.items()})


def _check_place(out: Path, needed: int) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise KTAMXConfigError(f"{out} is there already and not an empty folder: give the name of a new one.")
    there = next(folder for folder in out.parents if folder.is_dir())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise KTAMXConfigError(
            f"{out} needs {needed / 2**30:.1f} GiB, and {there} has {free / 2**30:.1f} GiB free. --no-backward halves "
            "it (and slows backward), --to int4 as well."
        )


def _config_hash(folder: Path, config: Any) -> str:
    file = folder / "config.json"
    data = file.read_bytes() if file.is_file() else json.dumps(config.to_dict(), sort_keys=True, default=str).encode()
    return hashlib.sha256(data).hexdigest()
