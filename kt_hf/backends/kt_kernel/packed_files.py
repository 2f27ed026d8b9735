"""Packed weights as the operators write and read them: `…/_numa_{pool}/INT8_gate_0_8192Byte_quant_.kt`.

The operators look for a folder `_layer_{layer_idx}`, but that number is also a key that must never be used twice in a
process. So the folder has a name of its own, and is shown to the operators under the number they will look for.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...errors import KTAMXConfigError
from ...shapes import ExpertShape
from .operators import Operators

_SIZE = re.compile(r"_(\d+)Byte_(quant|scale)_\.kt$")


@dataclass(frozen=True)
class PackedLayerFiles:
    """One layer's packed weights on disk.

    Attributes:
        folder: Holds `_numa_0` and so on, one for each pool.
        backward: Whether the weights for backward are there too.
        fingerprint: Identifies the weights that were packed; "" if it is not known.
    """

    folder: Path
    backward: bool
    fingerprint: str = ""


def pool_folder(pool: int) -> str:
    """The name of the folder that holds the weights of a pool of threads, counted from 0."""
    return f"_numa_{pool}"


def expected_files(operators: Operators, shape: ExpertShape, pools: int, backward: bool) -> list[str]:
    """Patterns of the files of a layer, relative to its folder, with `*` for the size that is part of a name.

    Args:
        operators: The operators that the weights are packed for.
        shape: The layer's sizes.
        pools: The number of pools of threads that each expert is split over.
        backward: Whether the weights for backward are saved too.
    """
    kinds = [f"{name}{bwd}" for name in ("gate", "up", "down") for bwd in (("", "_bwd") if backward else ("",))]
    return [
        f"{pool_folder(pool)}/{operators.saved_as}_{kind}_{expert}_*Byte_{part}_.kt"
        for pool in range(pools)
        for kind in kinds
        for expert in range(shape.num_experts)
        for part in ("quant", "scale")
    ]


def size_in_name(name: str) -> int:
    """Bytes that a file of packed weights must have by its name; -1 if the name is of no such file."""
    match = _SIZE.search(name)
    return int(match[1]) if match else -1


def check_saved(layer: PackedLayerFiles, operators: Operators, pools: int, share_backward: bool, label: str) -> None:
    """Refuse saved weights that these operators would crash on or compute wrong gradients with.

    Raises:
        KTAMXConfigError: Another arithmetic or number of pools, or no backward weights where they are needed.
    """
    if operators.saved_as is None:
        raise KTAMXConfigError(
            f"{label}: kt_backend={operators.name} cannot load saved weights: AMXInt8 and AMXInt4 can."
        )
    saved_pools = len(list(layer.folder.glob("_numa_*")))
    if saved_pools != pools:
        raise KTAMXConfigError(f"{label}: {layer.folder} holds weights for {saved_pools} pools, and there are {pools}.")
    if not any((layer.folder / pool_folder(0)).glob(f"{operators.saved_as}_gate_0_*")):
        raise KTAMXConfigError(f"{label}: {layer.folder} holds no {operators.saved_as} weights.")
    if not share_backward and not layer.backward:
        raise KTAMXConfigError(
            f"{label}: {layer.folder} was written without backward weights, which a buffer for each layer needs: "
            "kt_share_backward_weights must not be False."
        )


@contextlib.contextmanager
def folder_to_load(folder: Path, key: int) -> Iterator[str]:
    """A path that the operators find `folder` under by `layer_idx` = key."""
    with tempfile.TemporaryDirectory(prefix="kt_hf_") as place:
        os.symlink(folder.resolve(), Path(place) / f"_layer_{key}", target_is_directory=True)
        yield place


@contextlib.contextmanager
def folder_to_save(folder: Path, key: int) -> Iterator[str]:
    """A path for the operators to save under by `layer_idx` = key; becomes `folder` when all of it is written.

    Raises:
        OSError: A file is shorter than its name says, for the operators do not notice a full disk.
    """
    place = Path(tempfile.mkdtemp(prefix=f".{folder.name}_", dir=folder.parent))
    try:
        yield str(place)
        for file in sorted(place.rglob("*.kt")):
            if file.stat().st_size != size_in_name(file.name):
                raise OSError(f"{folder.parent}: {file.name} could not be written whole: is the disk full?")
        (place / f"_layer_{key}").rename(folder)
    finally:
        shutil.rmtree(place, ignore_errors=True)
