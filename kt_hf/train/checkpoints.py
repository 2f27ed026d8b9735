"""Which folders in an output folder are checkpoints, and which are the user's own."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

STATE = "trainer_state.json"
SUMMARY = "kt_hf_summary.json"  # written beside a run's adapter, at its very end
_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]{0,17})")  # as the Trainer writes them
# The Trainer's rotation takes every folder whose name begins so for a checkpoint.
_ROTATED = re.compile(r"checkpoint-\d")
# What tells that a folder was written by a training.
_MARKS = (STATE, "adapter_config.json", "adapter_model.safetensors", "kt_adapter_manifest.json", "optimizer.pt")


def is_numbered(folder: Path) -> bool:
    """Whether its name is that of a checkpoint, `checkpoint-<number>`."""
    return _NAME.fullmatch(folder.name) is not None


def step_in_name(folder: Path) -> int:
    """The optimizer step that a folder `checkpoint-<step>` is named after."""
    return int(folder.name.rsplit("-", 1)[1])


def numbered(output_dir: Path) -> list[Path]:
    """Folders `checkpoint-<number>`, whatever is in them, the latest first."""
    folders = [path for path in output_dir.glob("checkpoint-*") if is_numbered(path) and path.is_dir()]
    return sorted(folders, key=step_in_name, reverse=True)


def files_in_the_way(output_dir: Path) -> list[Path]:
    """Files and the like where the Trainer would make the folder of a checkpoint."""
    return sorted(path for path in output_dir.glob("checkpoint-*") if is_numbered(path) and not path.is_dir())


def checkpoints(output_dir: Path) -> list[Path]:
    """Folders `checkpoint-<number>` that a training wrote, or that are empty, the latest first."""
    return [path for path in numbered(output_dir) if not path.is_symlink() and _is_written(path)]


def _is_written(folder: Path) -> bool:
    return any((folder / mark).exists() for mark in _MARKS) or not any(folder.iterdir())


def would_be_rotated(output_dir: Path) -> list[Path]:
    """Folders of the user's that the Trainer's `save_total_limit` would remove."""
    written = checkpoints(output_dir)
    folders = [path for path in output_dir.glob("checkpoint-*") if _ROTATED.match(path.name) and path.is_dir()]
    return sorted(path for path in folders if path not in written)


def clear_earlier_run(output_dir: Path) -> int:
    """Remove the checkpoints of an earlier run, and nothing else; returns how many. Theirs have higher numbers:
    rotation would keep them, and a resume take them."""
    old = checkpoints(output_dir)
    for folder in old:
        shutil.rmtree(folder)
    return len(old)
