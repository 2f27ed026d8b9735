"""`verify_adapter`: refuse a saved adapter that is not whole; and which checkpoint of a run is."""

from __future__ import annotations

import json
import logging
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import KTAMXError
from .adapter import PREFIX, Adapter
from .convert import open_adapter
from .manifest import MANIFEST, check_base, check_training, read_manifest

logger = logging.getLogger(__name__)
_CHECKPOINT = re.compile(r"checkpoint-(\d+)$")
_STATE = "trainer_state.json"
# What a Trainer needs to go on as if it had not stopped.
_TRAINING = ("optimizer.pt", "scheduler.pt", "rng_state.pth")


def verify_adapter(folder: str | Path, model: Any = None) -> bool:
    """Check that a saved adapter is whole: all files and tensors there, unchanged, of one save, and finite.

    Args:
        folder: The adapter's folder, of any format that is read; of one that training saved, with its
            `kt_adapter_manifest.json`.
        model: A patched model; the adapter must then also fit it, tensor for tensor.

    Returns:
        True if a manifest vouches for every byte; False if there was none (a warning says so) and only what the files
        themselves tell was checked: readable, pairs of A and B, ranks, shapes, no NaN.

    Raises:
        KTAMXError: What differs, in which file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise KTAMXError(f"{folder} is no folder. Give the one that holds the adapter.")
    manifest = read_manifest(folder)
    if manifest is None:
        logger.warning("%s has no %s: only the structure of the adapter is checked.", folder, MANIFEST)
    else:
        check_training(folder, manifest)
    with open_adapter(folder) as adapter:  # checks structure, and files against the manifest
        if manifest is None:
            adapter.check(finite=True)
        if model is not None:
            if manifest is not None:
                check_base(folder, manifest, model)
            if adapter.format == "kt":
                check_fits(adapter, model)
    return manifest is not None


def check_fits(adapter: Adapter, model: Any, name: str | None = None) -> None:
    """Every LoRA tensor has its place in the model, and every expert LoRA tensor of the model is in the adapter.

    Args:
        adapter: Of format kt.
        model: A patched model.
        name: The model's adapter to compare with, None to compare with the sizes of its experts only.

    Raises:
        KTAMXError: Naming the first that does not fit.
    """
    from ..experts.layer import kt_layers

    layers = {layer.label.removeprefix(PREFIX): layer for layer in kt_layers(model)}
    for module, one in adapter.experts.items():
        layer = layers.get(one.experts)
        if layer is None:
            raise KTAMXError(f"{adapter.where}: {module} has no place in this model: another base model's adapter?")
        shape = layer.shape
        sizes = (shape.hidden_size, shape.intermediate_size)
        into, out = sizes if one.name != "down_proj" else sizes[::-1]
        wanted = (shape.num_experts, one.rank, into), (shape.num_experts, out, one.rank)
        if (one.a.shape, one.b.shape) != wanted:
            raise KTAMXError(
                f"{adapter.where}: {module} is {one.a.shape} and {one.b.shape}; this model needs {wanted[0]} and "
                f"{wanted[1]}: another base model's adapter?"
            )
    missing = [f"{e}.{name}" for e in layers for name in adapter.targeted(e) if f"{e}.{name}" not in adapter.experts]
    if missing:
        raise KTAMXError(
            f"{adapter.where} has no LoRA for {missing[0]} ({len(missing)} projections of experts missing)."
        )
    if name is None:
        return
    wanted_keys = {key: tuple(p.shape) for key, p in saved_names(model, name).items()}
    there = {key: tensor.shape for key, tensor in adapter.tensors() if ".lora_" in key}
    for key in sorted(wanted_keys.keys() | there.keys()):
        if wanted_keys.get(key) != there.get(key):
            raise KTAMXError(
                f"{adapter.where}: {key} is {there.get(key, 'missing')}, in the model {wanted_keys.get(key, 'not')}."
            )


def saved_names(model: Any, adapter: str) -> dict[str, Any]:
    """The LoRA parameters of one of a model's adapters, by the keys PEFT saves them under."""
    found = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name and f".{adapter}." in f"{name}.":
            head, _, tail = f"{name}.".rpartition(f".{adapter}.")
            # transformers' own add_adapter has no PeftModel around the model.
            start = "" if head.startswith("base_model.") else PREFIX
            found[f"{start}{head}.{tail}".rstrip(".")] = parameter
    return found


def check_checkpoint(folder: str | Path, also: Callable[[], None] | None = None) -> None:
    """Check that a Trainer can go on from a checkpoint as if it had not stopped.

    Args:
        folder: The checkpoint's, or an adapter's in it.
        also: A further check of the caller's.

    Raises:
        KTAMXError: What is missing or differs; and the last complete checkpoint beside it, if there is one.
    """
    folder = Path(folder)
    root = folder if _CHECKPOINT.search(folder.name) else folder.parent
    try:
        verify_adapter(folder)
        _check_state(root)
        if also is not None:
            also()
    except KTAMXError as error:
        last = last_complete(root.parent, below=root)
        hint = (
            f"The last complete one is {last}: resume_from_checkpoint={str(last)!r}." if last else "There is no other."
        )
        raise type(error)(f"{root} cannot be resumed: {error} {hint}") from error


def _check_state(folder: Path) -> None:
    try:
        json.loads((folder / _STATE).read_text())
    except FileNotFoundError:
        raise KTAMXError(f"{folder / _STATE} is missing: saving was interrupted.") from None
    except (ValueError, OSError) as error:
        raise KTAMXError(f"{folder / _STATE} cannot be read ({error}): saving was interrupted.") from error
    there = [name for name in _TRAINING if (folder / name).is_file()]
    for name in there:
        if not zipfile.is_zipfile(folder / name):  # as torch.save writes them; the index comes last
            raise KTAMXError(f"{folder / name} is truncated or damaged.")
    manifests = [folder / MANIFEST, *folder.glob(f"*/{MANIFEST}")]
    missing = [name for name in _TRAINING if name not in there]
    vouched = any(path.exists() for path in manifests)
    if missing and (there or not vouched):
        raise KTAMXError(f"{folder} lacks {', '.join(missing)}: it is half deleted or half written.")
    if not there:
        logger.warning("%s was saved without the optimizer's state (save_only_model): it starts anew.", folder)


def last_complete(output_dir: str | Path, below: Path | None = None) -> Path | None:
    """The checkpoint of a run with the highest step that a Trainer can go on from, None if there is none.

    Args:
        output_dir: The Trainer's.
        below: Leave this one out.
    """
    found = [path for path in Path(output_dir).glob("checkpoint-*") if _CHECKPOINT.search(path.name) and path.is_dir()]
    for path in sorted(found, key=lambda p: int(p.name.rsplit("-", 1)[1]), reverse=True):
        if below is not None and path.resolve() == below.resolve():
            continue
        try:
            for folder in adapter_folders(path):
                verify_adapter(folder)
            _check_state(path)
        except KTAMXError as error:
            logger.info("%s is not complete: %s", path, error)
            continue
        return path
    return None


def tell_interrupted(output_dir: str | Path) -> None:
    """Warn, before a run, if its last checkpoint is one that resume_from_checkpoint=True would take and fail with."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if _CHECKPOINT.search(path.name) and path.is_dir()]
    if not found:
        return
    newest = max(found, key=lambda path: int(path.name.rsplit("-", 1)[1]))
    try:
        for folder in adapter_folders(newest):
            read_manifest(folder)
        _check_state(newest)
    except KTAMXError as error:
        last = last_complete(output_dir, below=newest)
        hint = f"resume_from_checkpoint={str(last)!r} is the last complete one" if last else "no other is complete"
        logger.warning("%s cannot be resumed: %s To go on with that run: %s.", newest, error, hint)


def adapter_folders(checkpoint: Path) -> list[Path]:
    """Where PEFT saved adapters in a folder: there ("default"), and in folders of their names.

    Raises:
        KTAMXError: There is none.
    """
    found = [path for path in (checkpoint, *sorted(checkpoint.iterdir())) if (path / "adapter_config.json").is_file()]
    if not found:
        raise KTAMXError(f"{checkpoint} holds no adapter.")
    return found
