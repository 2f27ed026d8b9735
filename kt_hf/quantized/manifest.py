"""`kt_experts_manifest.json`: what saved experts were made of, how, and which files they are."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from ..checkpoint.fingerprint import Fingerprint
from ..errors import KTAMXConfigError, KTAMXError
from ..system.files import write_json
from ..system.json_fields import Field, read_json

MANIFEST = "kt_experts_manifest.json"
"""The file in a folder of saved experts that says what they were made of, and every file's size and sha256."""
FORMAT = 1


@dataclass(frozen=True)
class LayerEntry:
    """The files of one layer.

    Attributes:
        folder: That holds them, relative to the manifest's.
        shape: Experts, hidden size, intermediate size: E, H, I.
        source: What they were made of: parameter of the experts module -> fingerprint.
        files: Path relative to `folder` -> size in bytes and sha256.
    """

    folder: str
    shape: list[int]
    source: dict[str, Fingerprint]
    files: dict[str, tuple[int, str]]


@dataclass(frozen=True)
class Manifest:
    """What a folder of saved experts was made of, how, and which files it holds.

    Attributes:
        backend: AMXInt8 or AMXInt4.
        backward: Whether the weights for backward are there.
        pools: Pools of threads that each expert is split over.
        kt_kernel: Version of kt-kernel that wrote the files.
        variant: Its CPU variant.
        model: Name or folder of the model that was quantized.
        model_type: Of the model's configuration.
        config_sha256: Of the model's config.json, hexadecimal. Written for people who look a folder up; nothing
            compares it, for two configurations of the same weights may differ.
        marks: Fingerprints of tensors outside the experts, by name. (The name of the key in the file.)
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
        """Write `kt_experts_manifest.json` into the folder."""
        write_json(folder / MANIFEST, {"format": FORMAT, **asdict(self)})


def read_manifest(file: Path) -> Manifest:
    """Read and check a manifest.

    Raises:
        KTAMXError: It is damaged, or names files elsewhere.
        KTAMXConfigError: It is of a later version.
    """
    try:
        content = read_json(file).object()
        number = content["format"]
        if number.value != FORMAT:
            raise KTAMXConfigError(f"{file} has format {number.value!r}, and this kt_hf reads {FORMAT}: update it.")
        texts = ("backend", "kt_kernel", "variant", "model", "model_type", "config_sha256")
        return Manifest(
            **{name: content[name].text() for name in texts},
            backward=content["backward"].flag(),
            pools=content["pools"].integer(1, 1024),
            marks={name: _fingerprint(mark) for name, mark in content["marks"].object().items()},
            layers={name: read_layer(layer) for name, layer in content["layers"].object().items()},
        )
    except KTAMXConfigError:
        raise
    except KTAMXError as error:
        raise KTAMXError(f"{file} is damaged: {str(error).removeprefix(f'{file}: ')} Quantise again.") from error


def read_layer(layer: Field) -> LayerEntry:
    """Read and check the entry of a layer.

    Args:
        layer: Of the manifest's `layers`: what `asdict` makes of a `LayerEntry`.

    Raises:
        KTAMXError: Something is missing or of another kind, or a file lies outside the folder.
    """
    entry = layer.object()
    shape = [length.integer(least=1) for length in entry["shape"].entries()]
    if len(shape) != 3:
        entry["shape"].refuse("is not a number of experts, a hidden and an intermediate size")
    files = {}
    for name, file in entry["files"].object().items():
        Field(file.file, entry["files"].name, name).path_below()
        size = file.entries()
        if len(size) != 2:
            file.refuse("is not a size and a checksum")
        files[name] = size[0].integer(least=0), size[1].hexadecimal()
    source = {part: _fingerprint(mark) for part, mark in entry["source"].object().items()}
    return LayerEntry(entry["folder"].file_name(), shape, source, files)


def _fingerprint(mark: Field) -> Fingerprint:
    entry = mark.object()
    shape = [length.integer(least=0) for length in entry["shape"].entries()]
    return Fingerprint(shape, entry["dtype"].text(), entry["sha256"].hexadecimal())
