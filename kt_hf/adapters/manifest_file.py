"""Reading `kt_adapter_manifest.json`: each value checked once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import KTAMXError
from ..system.json_fields import Field, Fields, read_json
from .adapter import ADAPTER, CONFIG

MANIFEST = "kt_adapter_manifest.json"
"""The file beside a saved adapter that lists its files, sizes, checksums, tensors, base model and settings."""
VERSION = 1
WRITER = "kt_hf"


@dataclass(frozen=True)
class StoredFile:
    """What a manifest says of a file: bytes, and sha256."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The manifest of a finished save.

    Attributes:
        files: The adapter's files, by name.
        training: The Trainer's files beside them.
        tensors: Key -> dtype ("float32") and shape of each tensor.
        lora: The settings that belong to the tensors.
        base: The base model's name, and what of its configuration decides about shapes; None if unknown.
        ranks: How many ranks trained the adapter.
        owners: Among how many of them experts were divided, each of which keeps a file of the optimizer's state in a
            checkpoint.
        content: All of it, as it is in the file.
    """

    files: dict[str, StoredFile]
    training: dict[str, StoredFile]
    tensors: dict[str, tuple[str, list[int]]]
    lora: dict[str, Any]
    base: BaseModel | None
    ranks: int
    owners: int
    content: dict[str, Any]


@dataclass(frozen=True)
class BaseModel:
    """What a manifest says of the base model: name, shape-deciding settings, their checksum, and its experts' bits."""

    name: str | None
    architecture: dict[str, Any]
    config_sha256: str
    experts: str | None = None


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder; None if there is none of ours.

    Raises:
        KTAMXError: It cannot be read, is unfinished, of a later format, or says what cannot be.
    """
    path = folder / MANIFEST
    if not path.exists() and not path.is_symlink():
        return None
    manifest = read_json(path).object()
    writer = manifest.get("writer")
    if writer is None or writer.value != WRITER:
        if writer is None and ("artifacts" in manifest or "status" in manifest):
            return None  # kt-kernel's trainer writes one of the same name
        raise KTAMXError(f"{path} was not written by kt_hf (writer={writer and writer.value!r}).")
    version = manifest["format_version"]
    if version.value != VERSION:
        version.refuse(f"is a format that this kt_hf does not read, which reads {VERSION}. Update it")
    if not manifest["complete"].flag():
        raise KTAMXError(f"{folder}: saving was interrupted; the adapter is not complete.")
    missing = {"files", "tensors", "lora", "base", "training"} - set(manifest)
    if missing:
        raise KTAMXError(f"{path} lacks {', '.join(sorted(missing))}. The folder is damaged.")
    files = {name: _stored_file(entry) for name, entry in manifest["files"].object().items()}
    if not {ADAPTER, CONFIG} <= set(files):
        manifest["files"].refuse(f"lacks {ADAPTER} or {CONFIG}")
    training, base, ranks = manifest.get("training"), manifest.get("base"), manifest.get("ranks")
    owners = manifest.get("owners") or ranks  # a run of several hosts has fewer owners than ranks
    return Manifest(
        files=files,
        training={name: _stored_file(entry) for name, entry in training.object().items()} if training else {},
        tensors={key: _stored_tensor(entry) for key, entry in manifest["tensors"].object().items()},
        lora=dict(manifest["lora"].object().values()),
        base=_base_model(base.object()) if base else None,
        ranks=ranks.integer(least=1) if ranks else 1,
        owners=owners.integer(least=1) if owners else 1,
        content=dict(manifest.values()),
    )


def _stored_file(entry: Field) -> StoredFile:
    Field(entry.file, "files", entry.name.partition(".")[2]).file_name()
    values = entry.object()
    return StoredFile(values["size"].integer(least=0), values["sha256"].hexadecimal())


def _stored_tensor(entry: Field) -> tuple[str, list[int]]:
    values = entry.object()
    return values["dtype"].text(), [length.integer(least=0) for length in values["shape"].entries()]


def _base_model(base: Fields) -> BaseModel:
    name = base.get("name")
    architecture = dict(base["architecture"].object().values())
    experts = base.get("experts")
    digest = base["config_sha256"].hexadecimal()
    return BaseModel(name.text() if name else None, architecture, digest, experts.text() if experts else None)
