"""Files written whole or not at all, safetensors files among them, which `checkpoint.tensor_files` reads."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import KTAMXConfigError, KTAMXError
from .disk import disk_errors

# Names of the safetensors format, github.com/huggingface/safetensors; those this PyTorch does not know are left out.
_FORMAT = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "C64": "complex64",
}  # fmt: skip
DTYPES = {name: getattr(torch, dtype) for name, dtype in _FORMAT.items() if hasattr(torch, dtype)}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
Spec = tuple[torch.dtype, tuple[int, ...]]


def as_path(value: Any, name: str) -> Path:
    """A path that a caller gave as the argument `name`.

    Raises:
        KTAMXConfigError: It is none.
    """
    try:
        if not isinstance(value, (str, os.PathLike)) or not os.fspath(value) or b"\0" in os.fsencode(value):
            raise ValueError
        return Path(value)
    except (TypeError, ValueError):
        text = repr(value)
        shown = text if len(text) <= 80 else f"a {type(value).__name__}"
        raise KTAMXConfigError(f"{name}={shown} is no path: give one as text or a pathlib.Path.") from None


@dataclass(frozen=True)
class Lazy:
    """A tensor that is read, or computed, when it is needed.

    Attributes:
        dtype: Its dtype.
        shape: Its shape.
        load: Returns the tensor.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], Tensor]

    @property
    def size(self) -> int:
        """Its size in bytes."""
        return self.dtype.itemsize * math.prod(self.shape)


@dataclass(frozen=True)
class Part:
    """Tensors of a file that are computed together.

    Attributes:
        specs: Name -> (dtype, shape).
        make: Returns the tensors, in the order of `specs`.
    """

    specs: Mapping[str, Spec]
    make: Callable[[], Iterable[Tensor]]


def part(name: str, tensor: Lazy) -> Part:
    """The `Part` of a single tensor, under the name `name`."""
    return Part({name: (tensor.dtype, tensor.shape)}, lambda: [tensor.load()])


@contextmanager
def replacing(path: Path, size: int | None = None) -> Iterator[Path]:
    """A temporary path beside `path`, flushed to disk and renamed to it at the end; removed if the body raises.

    Args:
        path: The file to write or to replace.
        size: Its size in bytes, for the message if it does not fit on the disk; None if it is not known.

    Raises:
        KTAMXError: The disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with disk_errors(path, size):
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, flushed to disk and renamed to it at the end; removed if the body raises.

    Args:
        path: The folder to make. Nothing may be there, or an empty folder.

    Raises:
        KTAMXError: The disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    temporary.mkdir()
    try:
        with disk_errors(path):
            yield temporary
            sync(temporary)
            if path.is_dir():
                path.rmdir()
            os.rename(temporary, path)
            sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, content: Any) -> None:
    """Write `content` as JSON to a file, whole or not at all.

    Raises:
        KTAMXError: The disk is full.
    """
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def sync(path: Path) -> None:
    """Wait until a file's contents, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """The SHA-256 checksum of a file, 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_safetensors(path: Path, parts: Iterable[Part], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file with one `Part` in memory at a time; the library's own writer needs all at once.

    The format: 8 bytes, the length of the header as a little-endian integer; the header, JSON of name -> dtype, shape,
    data_offsets; the tensors' bytes, little-endian, without gaps.

    Args:
        path: The file, written whole or not at all.
        parts: Its tensors, in their order in the file.
        metadata: Texts for the header's `__metadata__`; None for {"format": "pt"}.

    Raises:
        KTAMXError: A tensor is not of the dtype and shape that its part announced, a name comes twice, or the disk is
            full.
    """
    parts = list(parts)
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    end = 0
    for one in parts:
        for name, (dtype, shape) in one.specs.items():
            if name in header:
                raise KTAMXError(f"{path}: two tensors would be called {name}.")
            begin, end = end, end + dtype.itemsize * math.prod(shape)
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data begins at a multiple of 8
    with replacing(path, 8 + len(text) + end) as temporary, open(temporary, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for one in parts:
            tensors = iter(one.make())
            for name, (dtype, shape) in one.specs.items():
                tensor = next(tensors)
                if tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape):
                    raise KTAMXError(f"{path}: {name} is {tensor.dtype} {tuple(tensor.shape)}, not {dtype} {shape}.")
                file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
                del tensor
            del tensors  # before the next part is made
