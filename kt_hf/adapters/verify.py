"""`verify_adapter`: refuse a saved adapter that is not whole; and which checkpoint of a run is."""

from __future__ import annotations

import logging
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import KTAMXError
from ..system.files import as_path
from ..system.json_fields import read_json
from .convert import open_adapter
from .fit import check_fits
from .manifest import check_base, check_training
from .manifest_file import MANIFEST, read_manifest
from .owned_optimizer import state_files

logger = logging.getLogger(__name__)
_CHECKPOINT = re.compile(r"checkpoint-(0|[1-9][0-9]{0,17})$")
_STATE = "trainer_state.json"
_TRAINING = ("optimizer.pt", "scheduler.pt")


def _training_files(ranks: int, owners: int) -> list[str]:
    """What a Trainer of so many ranks, of which `owners` divide the experts, needs to go on as before."""
    if ranks == 1:
        return [*_TRAINING, "rng_state.pth"]
    states = [file.name for file in state_files(Path(), owners)]
    return [*_TRAINING, *states, *(f"rng_state_{rank}.pth" for rank in range(ranks))]


def verify_adapter(folder: str | Path, model: Any = None, base: Any = None) -> bool:
    """Check that a saved adapter is whole: all files and tensors there, unchanged, of one save, and finite.

    Args:
        folder: The adapter's folder, of any format that is read; of one that training saved, with its
            `kt_adapter_manifest.json`.
        model: A patched model; the adapter must then also fit it, tensor for tensor.
        base: Folder or configuration of the base model, as `open_adapter` takes it.

    Returns:
        True if a manifest vouches for every byte; False if there was none (a warning says so) and only what the files
        themselves tell was checked: readable, pairs of A and B, ranks, shapes, no NaN.

    Raises:
        KTAMXError: What differs, in which file.
    """
    folder = as_path(folder, "folder")
    if not folder.is_dir():
        raise KTAMXError(f"{folder} is no folder. Give the one that holds the adapter.")
    manifest = read_manifest(folder)
    if manifest is None:
        logger.warning("%s has no %s: only the structure of the adapter is checked.", folder, MANIFEST)
    else:
        check_training(folder, manifest)
    with open_adapter(folder, base=base) as adapter:  # checks structure, and files against the manifest
        if manifest is None:
            adapter.check(finite=True)
        if model is not None:
            if manifest is not None:
                check_base(folder, manifest, model)
            if adapter.format == "kt":
                check_fits(adapter, model)
    return manifest is not None


def check_checkpoint(folder: str | Path, also: Callable[[], None] | None = None) -> None:
    """Check that a Trainer can go on from a checkpoint as if it had not stopped.

    Args:
        folder: The checkpoint's, or an adapter's in it.
        also: A further check of the caller's.

    Raises:
        KTAMXError: What is missing or differs; and the last complete checkpoint beside it, if there is one.
    """
    folder = as_path(folder, "folder")
    root = folder if _CHECKPOINT.search(folder.name) else folder.parent
    try:
        verify_adapter(folder)
        _check_state(root)
        if also is not None:
            also()
    except (KTAMXError, OSError) as error:
        last = last_complete(root.parent, below=root)
        hint = (
            f"The last complete one is {last}: resume_from_checkpoint={str(last)!r}." if last else "There is no other."
        )
        kind = type(error) if isinstance(error, KTAMXError) else KTAMXError
        raise kind(f"{root} cannot be resumed: {error} {hint}") from error


def _check_state(folder: Path) -> None:
    if not (folder / _STATE).exists():
        raise KTAMXError(f"{folder / _STATE} is missing: saving was interrupted.")
    try:
        state = read_json(folder / _STATE).object()
    except KTAMXError as error:
        raise KTAMXError(f"{error} Saving was interrupted.") from error
    state["global_step"].integer(least=0)
    if "log_history" in state:
        for entry in state["log_history"].entries():
            entry.object()
    manifests = [folder / MANIFEST, *folder.glob(f"*/{MANIFEST}")]
    read = [read_manifest(path.parent) for path in manifests if path.exists()]
    needed = _training_files(*max(((manifest.ranks, manifest.owners) for manifest in read if manifest), default=(1, 1)))
    states = [name for name in needed if (folder / name).is_file()]
    for name in states:
        if not zipfile.is_zipfile(folder / name):  # as torch.save writes them; the index comes last
            raise KTAMXError(f"{folder / name} is truncated or damaged.")
    missing = [name for name in needed if name not in states]
    if missing and (states or not read):
        raise KTAMXError(f"{folder} lacks {', '.join(missing)}: it is half deleted or half written.")
    if not states:
        logger.warning("%s was saved without the optimizer's state (save_only_model): it starts anew.", folder)


def last_complete(output_dir: str | Path, below: Path | None = None) -> Path | None:
    """The checkpoint of a run with the highest step that a Trainer can go on from, None if there is none.

    Args:
        output_dir: The Trainer's.
        below: Leave this one out.
    """
    for path in _checkpoints(output_dir):
        if below is not None and path.resolve() == below.resolve():
            continue
        try:
            for folder in adapter_folders(path):
                verify_adapter(folder)
            _check_state(path)
        except (KTAMXError, OSError) as error:
            logger.info("%s is not complete: %s", path, error)
            continue
        return path
    return None


def _checkpoints(output_dir: str | Path) -> list[Path]:
    """A run's checkpoints, the latest first."""
    folders = [
        path
        for path in as_path(output_dir, "output_dir").glob("checkpoint-*")
        if _CHECKPOINT.search(path.name) and path.is_dir()
    ]
    return sorted(folders, key=lambda path: int(path.name.rsplit("-", 1)[1]), reverse=True)


def tell_interrupted(output_dir: str | Path) -> None:
    """Warn, before a run, if its last checkpoint is one that resume_from_checkpoint=True would take and fail with.

    Args:
        output_dir: The Trainer's. The warning names what is wrong and the last complete checkpoint, if there is one.
    """
    checkpoints = _checkpoints(output_dir)
    if not checkpoints:
        return
    newest = checkpoints[0]
    try:
        for folder in adapter_folders(newest):
            read_manifest(folder)
        _check_state(newest)
    except (KTAMXError, OSError) as error:
        last = last_complete(output_dir, below=newest)
        hint = f"resume_from_checkpoint={str(last)!r} is the last complete one" if last else "no other is complete"
        logger.warning("%s cannot be resumed: %s To go on with that run: %s.", newest, error, hint)


def adapter_folders(checkpoint: Path) -> list[Path]:
    """Where PEFT saved adapters in a folder: there ("default"), and in folders of their names.

    Raises:
        KTAMXError: There is none.
    """
    folders = [path for path in (checkpoint, *sorted(checkpoint.iterdir())) if (path / "adapter_config.json").is_file()]
    if not folders:
        raise KTAMXError(f"{checkpoint} holds no adapter.")
    return folders
