"""Files written whole or not at all, and safetensors files written and read tensor by tensor."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import KTAMXError

# Names of the safetensors format, github.com/huggingface/safetensors, for what LoRA and base weights are kept in.
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
Spec = tuple[torch.dtype, tuple[int, ...]]


@dataclass(frozen=True)
class Lazy:
    """A tensor that is read, or made, when it is needed: its dtype, its shape, and how to get it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], Tensor]


@dataclass(frozen=True)
class Part:
    """Tensors of a file that are made together: name -> (dtype, shape), and how to get them in that order."""

    specs: Mapping[str, Spec]
    make: Callable[[], Iterable[Tensor]]


def part(name: str, tensor: Lazy) -> Part:
    """One tensor as it is."""
    return Part({name: (tensor.dtype, tensor.shape)}, lambda: [tensor.load()])


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, flushed to disk and renamed to it at the end; removed if the body raises."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """JSON, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def sync(path: Path) -> None:
    """Wait until a file, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_safetensors(path: Path, parts: Iterable[Part], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file with one `Part` in memory at a time; the library's own writer needs all at once.

    The format: 8 bytes, the length of the header as a little-endian integer; the header, JSON of name -> dtype, shape,
    data_offsets; the tensors' bytes, little-endian, without gaps.

    Raises:
        KTAMXError: A tensor that is not what its part announced, or a name that comes twice.
    """
    parts = list(parts)
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    end = 0
    for one in parts:
        for name, (dtype, shape) in one.specs.items():
            if name in header:
                raise KTAMXError(f"{path}: two tensors would be called {name}.")
            begin, end = end, end + dtype.itemsize * torch.Size(shape).numel()
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data begins at a multiple of 8
    with replacing(path) as temporary, open(temporary, "wb") as file:
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


@contextmanager
def open_safetensors(path: Path) -> Iterator[dict[str, Lazy]]:
    """The tensors of a file by name, unread. They can be loaded as long as the context lasts, into memory of their own.

    The library checks the file; its own tensors would be the mapped file, which counts as the process's memory as a
    whole, and changes with the file, or ends the process.

    Raises:
        KTAMXError: The file is missing, truncated, or no safetensors file.
    """
    try:
        with safe_open(path, framework="pt"):
            pass
    except FileNotFoundError:
        raise KTAMXError(f"{path} is missing.") from None
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size if path.is_file() else 0
        raise KTAMXError(f"{path} ({size} bytes) is truncated, damaged, or no safetensors file: {error}.") from error
    with open(path, "rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        found = {}
        for name, entry in header.items():
            dtype = _DTYPES.get(entry["dtype"])
            if dtype is None:
                raise KTAMXError(f"{path}: {name} is of dtype {entry['dtype']}, which is not supported.")
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            shape = tuple(entry["shape"])
            found[name] = Lazy(dtype, shape, partial(_read, file, begin, end - begin, dtype, shape))
        yield found


def _read(file: BinaryIO, begin: int, size: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    memory = torch.empty(size, dtype=torch.uint8)
    file.seek(begin)
    if file.readinto(memory.numpy().data) != size:  # type: ignore[attr-defined]
        raise KTAMXError(f"{file.name} became shorter while it was read.")
    return memory.view(dtype).reshape(shape)
