"""`kt_adapter_manifest.json`: what a saved adapter consists of, written last, so that it is the mark of a whole save.

A stock Trainer writes straight into the checkpoint's folder, so a killed run leaves any part of it behind. Hence:

1. Before the first file, the manifest is replaced by one that says "unfinished" (`begin`), with a mark of the save:
   where another process begins a save in the same folder meanwhile, neither is finished (`_check_mark`).
2. PEFT writes its files. They are read back, checked and flushed to disk.
3. The manifest, with sizes and hashes, takes the first one's place by a rename (`write_manifest`).
4. At `on_save` the Trainer's own files (optimizer, scheduler, random state, trainer_state.json) are added (`seal`).

A folder of which the manifest is unfinished, or does not agree with the files, does not load.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import secrets
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import nn

from .._versions import __version__
from ..checkpoint.tensor_files import read_header
from ..errors import KTAMXError
from ..placement import PLACEMENT, packer_of, write_placement
from ..placement.tiers import Tiers
from ..system.files import replacing, sha256, sync, write_json
from ..system.json_fields import Fields, read_json
from .adapter import ADAPTER, CONFIG
from .manifest_file import MANIFEST, VERSION, WRITER, Manifest, StoredFile, read_manifest

logger = logging.getLogger(__name__)
# Folder -> the mark of the save that this process has begun there.
_MARKS: dict[Path, str] = {}
# Fields of adapter_config.json that may change after the save: the base model has moved, the adapter is trained on.
_FREE = ("base_model_name_or_path", "inference_mode", "revision", "auto_mapping", "peft_version")
# What decides whether an adapter fits a model, under the names of the supported families; anything else in a config
# (token ids, attention implementation, new defaults of a later transformers) may differ.
_ARCHITECTURE = (
    "model_type", "hidden_size", "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size",
    "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "num_experts", "n_routed_experts",
    "num_local_experts", "num_experts_per_tok", "n_shared_experts", "first_k_dense_replace", "mlp_only_layers",
    "decoder_sparse_step", "q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim",
)  # fmt: skip


def begin(folder: Path) -> None:
    """Say that this folder is being written, before anything else in it changes."""
    folder.mkdir(parents=True, exist_ok=True)
    mark = _MARKS[folder.resolve()] = secrets.token_hex(8)
    write_json(folder / MANIFEST, {"writer": WRITER, "format_version": VERSION, "complete": False, "save": mark})
    # So that a Trainer which resumes from here meets the manifest, and does not say only that there is no checkpoint.
    (folder / ADAPTER).touch()


def write_manifest(folder: Path, model: Any, checked: os.stat_result | None = None) -> None:
    """Flush the adapter's files to disk and write their manifest, by a rename.

    Args:
        folder: With adapter_model.safetensors and adapter_config.json.
        model: The model they belong to, or None where it is not known (a conversion).
        checked: State of adapter_model.safetensors when it was compared with the model.

    Raises:
        KTAMXError: Another process saves into this folder too.
    """
    files = [ADAPTER, CONFIG]
    packer = packer_of(model) if model is not None else None
    if packer is not None and write_placement(folder, packer.placement, packer.tiers or Tiers()):
        files.append(PLACEMENT)
    for name in files:
        sync(folder / name)
    sync(folder)
    tensors = read_header(folder / ADAPTER)
    content = {
        "writer": WRITER,
        "format_version": VERSION,
        "complete": True,
        "save": _MARKS.get(folder.resolve()),
        "packages": _packages(),
        "base": describe_base(model),
        "dtype": _name_of(_dtype(model)),
        "kt": packer.config.changed() if packer is not None else None,
        "lora": _bound(read_json(folder / CONFIG).object()),
        "files": {name: _describe(folder / name) for name in files},
        "training": None,
        "tensors": {key: {"dtype": _name_of(t.dtype), "shape": list(t.shape)} for key, t in tensors.items()},
    }
    if packer is not None and packer.ranks is not None:
        content |= {"ranks": packer.ranks.size, "owners": packer.ranks.owners.size}
    now = (folder / ADAPTER).stat()
    if checked and (checked.st_ino, checked.st_size, checked.st_mtime_ns) != (now.st_ino, now.st_size, now.st_mtime_ns):
        raise _other_process(folder)
    _check_mark(folder)
    write_json(folder / MANIFEST, content)


def _check_mark(folder: Path) -> None:
    """Refuse to finish a save where another process has begun one since."""
    mine = _MARKS.get(folder.resolve())
    if mine is None:
        return
    try:
        mark = read_json(folder / MANIFEST).object().get("save")
    except KTAMXError:
        mark = None
    if mark is None or mark.value != mine:
        raise _other_process(folder)


def _other_process(folder: Path) -> KTAMXError:
    return KTAMXError(
        f"{folder}: another process saves into this folder too, so that what is there may be of both. Give each run an "
        "output_dir of its own."
    )


def seal(folder: Path) -> None:
    """Add the Trainer's own files to a manifest, once they are all there.

    Args:
        folder: Of the checkpoint. Nothing is done to one without a finished manifest.

    Raises:
        KTAMXError: Another process saves into this folder too.
    """
    if not (folder / MANIFEST).exists():
        return
    _check_mark(folder)
    manifest = read_manifest(folder)
    if manifest is None:
        return
    files = [file for name in ("*.pt", "*.pth", "trainer_state.json") for file in sorted(folder.glob(name))]
    for file in files:
        sync(file)
    training = {file.name: _describe(file) for file in files}
    _check_mark(folder)
    write_json(folder / MANIFEST, {**manifest.content, "training": training})
    _MARKS.pop(folder.resolve(), None)


def publish(checkpoint: Path, output_dir: Path) -> None:
    """Copy a checkpoint's adapter to the folder that is uploaded, with its manifest, before a push.

    A Trainer copies the adapter alone, and not the manifest. The same files are copied here first, the manifest last.

    Args:
        checkpoint: Folder of the checkpoint; nothing is done where it has no manifest.
        output_dir: The Trainer's, which it uploads.
    """
    manifest = read_manifest(checkpoint) if (checkpoint / MANIFEST).exists() else None
    if manifest is None:
        return
    begin(output_dir)
    for name in manifest.files:
        with replacing(output_dir / name) as temporary:
            shutil.copyfile(checkpoint / name, temporary)
    write_json(output_dir / MANIFEST, {**manifest.content, "training": None})


def check_files(folder: Path, manifest: Manifest) -> None:
    """Compare sizes, hashes, tensors and LoRA settings with the manifest.

    Raises:
        KTAMXError: Naming the file and what differs.
    """
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise KTAMXError(f"{path} is missing, which {MANIFEST} lists.")
        if name != CONFIG:
            _compare(path, entry)
    _check_config(folder, manifest)
    in_file = {key: (_name_of(t.dtype), list(t.shape)) for key, t in read_header(folder / ADAPTER).items()}
    listed = manifest.tensors
    wrong = sorted(key for key in in_file.keys() | listed.keys() if in_file.get(key) != listed.get(key))
    if wrong:
        key = wrong[0]
        raise KTAMXError(
            f"{folder / ADAPTER}: {key} is {in_file.get(key, 'missing')}, by {MANIFEST} {listed.get(key, 'not there')} "
            f"({len(wrong)} tensors differ)."
        )


def _check_config(folder: Path, manifest: Manifest) -> None:
    path = folder / CONFIG
    if sha256(path) == manifest.files[CONFIG].sha256:
        return
    now = _bound(read_json(path).object())
    for key in sorted(now.keys() | manifest.lora.keys()):
        if now.get(key) != manifest.lora.get(key):
            raise KTAMXError(
                f"{path}: {key}={now.get(key)!r}, but the adapter was saved with {manifest.lora.get(key)!r} (by "
                f"{MANIFEST}). The files are not of one save, or one was edited."
            )


def check_training(folder: Path, manifest: Manifest) -> None:
    """Compare the Trainer's files with the manifest, if it lists them."""
    for name, entry in manifest.training.items():
        if not (folder / name).is_file():
            raise KTAMXError(f"{folder / name} is missing, which {MANIFEST} lists: the checkpoint is being deleted?")
        _compare(folder / name, entry)


def _compare(path: Path, entry: StoredFile) -> None:
    size = path.stat().st_size
    if size != entry.size:
        short = "truncated" if size < entry.size else "longer"
        raise KTAMXError(f"{path} is {short}: {size} bytes, by {MANIFEST} {entry.size}.")
    if sha256(path) != entry.sha256:
        raise KTAMXError(
            f"{path} is not the file that was saved: its sha256 differs from the one in {MANIFEST}. It was changed, or "
            "comes from another save."
        )


def check_base(where: Path, manifest: Manifest, model: Any) -> None:
    """Compare the base model that the adapter was trained on with this one. Its name and place may differ.

    The same model with experts in other bits is a warning.

    Raises:
        KTAMXError: Naming the settings that differ.
    """
    saved, now = manifest.base, describe_base(model)
    if not saved or not now:
        return
    if saved.experts and now["experts"] and saved.experts != now["experts"]:
        logger.warning(
            "%s was trained on %r with experts of %s; those of this model (%r) are of %s, so that its results differ a "
            "little from those in training. Train on, or load the base that it was trained on.",
            where, saved.name, saved.experts, now["name"], now["experts"],
        )  # fmt: skip
    if saved.config_sha256 == now["config_sha256"]:
        return
    old, new = saved.architecture, now["architecture"]
    keys = [key for key in _ARCHITECTURE if old.get(key) != new.get(key)]
    shown = ", ".join(f"{key}: {old.get(key)} there, {new.get(key)} here" for key in keys[:4])
    raise KTAMXError(f"{where} was trained on another base model ({saved.name!r}): {shown}.")


def _setting(config: Any, key: str) -> Any:
    """A setting of a model; None if it has none, or another in each layer, which transformers raises for."""
    try:
        return getattr(config, key, None)
    except AttributeError:
        return None
    except Exception as error:
        if "PerLayer" not in type(error).__name__:
            raise
        return None


def describe_base(model: Any) -> dict[str, Any] | None:
    """Name, shape-deciding settings and their hash, of a model or its config; None without one."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = getattr(base, "config", None)
    if config is None:
        return None
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    settings = {key: _setting(text, key) for key in _ARCHITECTURE}
    architecture = {key: value for key, value in settings.items() if value is not None}
    digest = hashlib.sha256(json.dumps(architecture, sort_keys=True, default=str).encode()).hexdigest()
    name = getattr(base, "name_or_path", None) or getattr(config, "_name_or_path", None) or None
    packer = packer_of(base) if isinstance(base, nn.Module) else None
    return {
        "name": name,
        "architecture": architecture,
        "config_sha256": digest,
        "experts": packer.stored_as if packer else None,
    }


def _dtype(model: Any) -> Any:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(base, "dtype", None) or "auto"


def _describe(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def _name_of(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _bound(config: Fields) -> dict[str, Any]:
    """The settings of an adapter_config.json that belong to the tensors; lists are sets in PEFT, so in any order."""
    return {
        key: sorted(value) if isinstance(value, list) and all(isinstance(v, str) for v in value) else value
        for key, value in config.values()
        if key not in _FREE and value not in (None, {}, []) and value is not False
    }


def _packages() -> dict[str, str]:
    versions = {"python": platform.python_version(), "kt-hf": __version__}
    for name in ("torch", "transformers", "peft", "safetensors", "kt-kernel"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
