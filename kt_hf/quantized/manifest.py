"""`kt_experts_manifest.json`: what saved experts were made of, how, and which files they are."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..checkpoint.fingerprint import Fingerprint
from ..errors import KTAMXConfigError, KTAMXError

MANIFEST = "kt_experts_manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class LayerEntry:
    """One layer.

    Attributes:
        folder: Relative to the manifest's.
        shape: Experts, hidden size, intermediate size.
        source: Of what weights: parameter of the experts module -> mark.
        files: Path relative to `folder` -> size in bytes and sha256.
    """

    folder: str
    shape: list[int]
    source: dict[str, Fingerprint]
    files: dict[str, tuple[int, str]]


@dataclass(frozen=True)
class Manifest:
    """The whole folder.

    Attributes:
        backend: AMXInt8 or AMXInt4.
        backward: With the weights for backward, or without.
        pools: Of threads, that each expert is split over.
        kt_kernel: Version that wrote the files.
        variant: Its CPU variant.
        model: Name or folder that was quantised.
        model_type: By its configuration.
        config_sha256: Of its config.json.
        marks: Of tensors outside the experts: name -> mark.
        layers: Name of the experts module -> its files.
    """

    backend: str
    backward: bool
    pools: int
    kt_kernel: str
    variant: str
    model: str
    model_type: str
    config_sha256: str
    marks: dict[str, Fingerprint]
    layers: dict[str, LayerEntry]

    def write(self, folder: Path) -> None:
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=1)
        (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_manifest(file: Path) -> Manifest:
    """Read and check the form of a manifest.

    Raises:
        KTAMXError: It is damaged.
        KTAMXConfigError: It is of a later version.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        number = found.pop("format")
        if number != FORMAT:
            raise KTAMXConfigError(f"{file} has format {number}, and this kt_hf reads {FORMAT}: update it.")
        return _manifest(found)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, KTAMXConfigError):
            raise
        raise KTAMXError(f"{file} is damaged: {type(error).__name__}: {error}. Quantise again.") from error


def read_layer(name: str, found: dict[str, Any]) -> LayerEntry:
    """A layer's entry, as `asdict` makes it.

    Raises:
        ValueError, KeyError, TypeError: It is none.
    """
    parts = Path(found["folder"]).parts
    if len(parts) != 1 or parts[0] == "..":
        raise ValueError(f"{name} is said to be in {found['folder']!r}")
    shape = [int(n) for n in found["shape"]]
    if len(shape) != 3:
        raise ValueError(f"{name} has shape {shape}")
    files = {str(file): (int(size), str(sha)) for file, (size, sha) in found["files"].items()}
    return LayerEntry(found["folder"], shape, {part: Fingerprint(**m) for part, m in found["source"].items()}, files)


def _manifest(found: dict[str, Any]) -> Manifest:
    found["layers"] = {name: read_layer(name, layer) for name, layer in found["layers"].items()}
    found["marks"] = {name: Fingerprint(**mark) for name, mark in found["marks"].items()}
    made = Manifest(**found)
    for item in fields(Manifest):
        kind = {"backward": bool, "pools": int, "marks": dict, "layers": dict}.get(item.name, str)
        if not isinstance(getattr(made, item.name), kind):
            raise ValueError(f"{item.name} is {getattr(made, item.name)!r}")
    return made
