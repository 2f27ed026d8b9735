"""The optimizer's state of experts that ranks own: one file a rank in a checkpoint, read by any number of ranks.

The Trainer's optimizer.pt is rank 0's alone. Each rank writes what its optimizer keeps of the LoRA of its experts (for
AdamW both moments), by the parameter's name and the experts it is of, before the adapter's manifest says that the
checkpoint is whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import KTAMXError
from ..experts.holders import ExpertLora
from ..system.files import sync
from .manifest_file import MANIFEST, read_manifest

_FILE = "kt_experts_optimizer_{}.pt"


def state_files(folder: Path, ranks: int) -> list[Path]:
    """The files of a checkpoint that so many ranks wrote, the owners of a layer's experts."""
    return [folder / _FILE.format(rank) for rank in range(ranks)]


def remove_state(folder: Path) -> None:
    """Remove the files that another run has left in a checkpoint's folder."""
    for file in folder.glob(_FILE.format("*")):
        file.unlink()


def write_state(folder: Path, model: nn.Module, optimizer: Any, rank: int) -> None:
    """Write this rank's file, and flush it to disk.

    Args:
        folder: Of the checkpoint.
        model: With adapters on experts.
        optimizer: That trains it, or accelerate's wrapper of one.
        rank: Of this process among the owners.
    """
    file = folder / _FILE.format(rank)
    temporary = file.with_suffix(".part")
    kept = _inner(optimizer).state
    entries = {
        name: {"lo": holder.share.lo, "hi": holder.share.hi, "state": dict(kept[holder.weight])}
        for name, holder in _holders(model)
        if holder.share is not None and holder.weight in kept
    }
    torch.save(entries, temporary)
    sync(temporary)
    os.replace(temporary, file)


def restore_state(folder: Path, model: nn.Module, optimizer: Any) -> None:
    """Give the optimizer, which has rank 0's state, that of the experts of this rank.

    Args:
        folder: A checkpoint of any number of ranks.
        model: With adapters on experts, divided among any number of ranks.
        optimizer: Into which the checkpoint's optimizer.pt was loaded, or accelerate's wrapper of one.

    Raises:
        KTAMXError: A file that is missing or lacks experts; state of another shape than its parameter's, which cannot
            be cut.
    """
    manifest = read_manifest(folder) if (folder / MANIFEST).exists() else None
    ranks, owners = (manifest.ranks, manifest.owners) if manifest else (1, 1)
    holders = list(_holders(model))
    if ranks == 1 and all(holder.share is None for _, holder in holders):
        return
    files = [
        torch.load(file, map_location="cpu", weights_only=True)
        for file in state_files(folder, owners)[: owners * (ranks > 1)]
    ]
    state = _inner(optimizer).state
    for name, holder in holders:
        if holder.weight not in state:
            continue
        total = holder.whole_shape[0]
        share = holder.share.experts if holder.share is not None else slice(0, total)
        parts = [file[name] for file in files if name in file]
        if not files:
            parts = [{"lo": 0, "hi": total, "state": state[holder.weight]}]
        where = f"{folder}: the optimizer's state of {name}"
        joined = _joined(parts, share, where)
        for key, value in joined.items():
            if isinstance(value, Tensor) and value.dim() and value.shape[0] != holder.weight.shape[0]:
                raise KTAMXError(f"{where}: {key} is {tuple(value.shape)} and cannot be divided by experts.")
        state[holder.weight] = {
            key: value.to(holder.weight.device) if isinstance(value, Tensor) and value.dim() else value
            for key, value in joined.items()
        }


def _joined(parts: list[dict[str, Any]], share: slice, where: str) -> dict[str, Any]:
    """The state of the experts of `share`, of parts that are each of some experts."""
    wanted = sorted((p for p in parts if p["lo"] < share.stop and p["hi"] > share.start), key=lambda p: int(p["lo"]))
    covered = share.start
    for part in wanted:
        if part["lo"] > covered:
            break
        covered = max(covered, part["hi"])
    if covered < share.stop:
        raise KTAMXError(f"{where} lacks experts {covered} to {share.stop - 1}: the checkpoint is damaged.")
    result: dict[str, Any] = {}
    for key, first in wanted[0]["state"].items():
        if not isinstance(first, Tensor) or first.dim() == 0:
            result[key] = first
            continue
        cut = [
            p["state"][key][max(share.start - p["lo"], 0) : min(share.stop, p["hi"]) - p["lo"]]
            if p["state"][key].shape[0] == p["hi"] - p["lo"]
            else p["state"][key]  # of no experts: refused by the caller
            for p in wanted
        ]
        result[key] = torch.cat(cut) if len(cut) > 1 else cut[0].clone()
    return result


def _holders(model: nn.Module) -> Iterator[tuple[str, ExpertLora]]:
    for name, module in model.named_modules():
        if isinstance(module, ExpertLora):
            yield name, module


def _inner(optimizer: Any) -> Any:
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer
