"""The tensors of a safetensors checkpoint: where each one lies, checked from the headers, and read without mapping.

Pages of a mapped file count as the process's memory for as long as one of its tensors lives; experts are therefore read
with positional reads into memory of their own. Neighbours in a file are read by one call, which also keeps Python's
lock free: the operators hold it while they pack a layer, and the next one is read meanwhile.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import KTAMXConfigError, KTAMXError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Names of the safetensors format, github.com/huggingface/safetensors; those this PyTorch does not know are left out.
_FORMAT = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "C64": "complex64",
}  # fmt: skip
_DTYPES = {name: getattr(torch, dtype) for name, dtype in _FORMAT.items() if hasattr(torch, dtype)}
_MOST_BUFFERS = 1024  # a call of preadv takes (IOV_MAX of Linux and macOS)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        begin: Where its bytes begin, from the start of the file.
    """

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    def row(self, index: int) -> StoredTensor:
        """The tensor at `index` of the first dimension."""
        shape = self.shape[1:]
        size = self.dtype.itemsize * torch.Size(shape).numel()
        return replace(self, shape=shape, begin=self.begin + index * size)

    def __str__(self) -> str:
        return f"{self.file}: {self.name}"


class TensorFiles:
    """All tensors of a checkpoint, by name, without having read any.

    Args:
        folder: Holds model.safetensors, or model.safetensors.index.json and the files it names.

    Raises:
        KTAMXConfigError: It holds neither.
        KTAMXError: A file is missing, truncated or damaged, a tensor is there twice, or not where the index says;
            naming file and tensor.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.tensors: dict[str, StoredTensor] = {}
        index = self._index()
        self.files = sorted({self.folder / shard for shard in index.values()}) or [self.folder / SINGLE]
        for file in self.files:
            if not file.is_file():
                name = next((name for name, shard in index.items() if self.folder / shard == file), "")
                raise KTAMXError(f"{file} is missing; {self.folder / INDEX} says it has {name}.")
            for name, tensor in read_header(file).items():
                if name in self.tensors:
                    raise KTAMXError(f"{name} is there twice, in {self.tensors[name].file} and in {file}.")
                self.tensors[name] = tensor
        for name, shard in index.items():
            if name not in self.tensors or self.tensors[name].file != self.folder / shard:
                where = f"; it is in {self.tensors[name].file}" if name in self.tensors else ""
                raise KTAMXError(
                    f"{self.folder / INDEX} says that {self.folder / shard} has {name}, which is not so{where}."
                )

    def _index(self) -> dict[str, str]:
        """Tensor -> file name, {} for a checkpoint of one file. Where both are there, transformers loads the one."""
        path = self.folder / INDEX
        if (self.folder / SINGLE).is_file():
            return {}
        if not path.is_file():
            raise KTAMXConfigError(
                f"{self.folder} has neither {SINGLE} nor {INDEX}: give the folder of a model saved as safetensors."
            )
        try:
            found = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            if not found or not all(isinstance(shard, str) for shard in found.values()):
                raise ValueError("weight_map does not name a file for each tensor")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise KTAMXError(f"{path} is damaged, or no index of a checkpoint: {error}.") from error
        for name, shard in found.items():
            if Path(shard).name != shard:
                raise KTAMXError(f"{path}: {name} is said to be in {shard!r}, which is no file name.")
        return dict(found)

    @cached_property
    def unlisted(self) -> dict[str, Path]:
        """Tensor -> file, of files in the folder that do not belong to the checkpoint."""
        found: dict[str, Path] = {}
        for file in sorted(set(self.folder.glob("*.safetensors")) - set(self.files)):
            try:
                found |= dict.fromkeys(read_header(file), file)
            except KTAMXError:
                continue  # not the checkpoint's
        return found


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file.

    The format: 8 bytes, the length of the header as a little-endian integer; the header, JSON of name -> dtype, shape,
    data_offsets; the tensors' bytes, little-endian, without gaps.

    Raises:
        KTAMXError: It is no such file, or shorter or longer than its header says, naming the tensor.
    """
    size = file.stat().st_size
    try:
        with open(file, "rb") as stream:
            length = struct.unpack("<Q", stream.read(8))[0]
            if length > size - 8:
                raise ValueError(f"its header would have {length} bytes, the file has {size}")
            entries = dict(json.loads(stream.read(length), object_pairs_hook=_no_doubles))
    except (ValueError, TypeError, struct.error) as error:
        raise KTAMXError(f"{file} is truncated, damaged, or no safetensors file: {error}.") from error
    entries.pop("__metadata__", None)
    found = [_stored(file, name, entry, 8 + length) for name, entry in entries.items()]
    end, last = 8 + length, ""
    for tensor in sorted(found, key=lambda t: (t.begin, t.size)):
        if tensor.begin != end:
            raise KTAMXError(
                f"{tensor} begins at byte {tensor.begin}, but {last or 'the header'} before it ends at {end}."
            )
        end, last = tensor.begin + tensor.size, tensor.name
        if end > size:
            raise KTAMXError(f"{tensor} ends at byte {end}, but the file has only {size}: it is truncated.")
    if end != size:
        raise KTAMXError(f"{file} has {size} bytes; its last tensor, {last or 'none'}, ends at {end}.")
    return {tensor.name: tensor for tensor in found}


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name} is there twice")
        found[name] = value
    return found


def _stored(file: Path, name: str, entry: Any, data: int) -> StoredTensor:
    try:
        dtype = _DTYPES.get(entry["dtype"])
        begin, end = entry["data_offsets"]
        shape = tuple(entry["shape"])
        numbers = [begin, end, *shape]
        if not all(isinstance(number, int) and number >= 0 for number in numbers):
            raise ValueError(f"shape {shape} and offsets {begin}, {end}")
    except (KeyError, TypeError, ValueError) as error:
        raise KTAMXError(f"{file}: {name} has a damaged entry in the header: {error}.") from error
    if dtype is None:
        raise KTAMXError(f"{file}: {name} is of dtype {entry['dtype']}, which is not supported.")
    tensor = StoredTensor(name, file, dtype, shape, data + begin)
    if tensor.size != end - begin:
        raise KTAMXError(
            f"{tensor} has {end - begin} bytes, but its shape {list(shape)} of {entry['dtype']} needs {tensor.size}."
        )
    return tensor


def read_tensors(jobs: Sequence[tuple[StoredTensor, Tensor]]) -> None:
    """Read each stored tensor into the one beside it, of the same dtype and size, contiguous, on the CPU.

    Raises:
        KTAMXError: A file has changed since its header was read.
    """
    ordered = sorted(jobs, key=lambda job: (str(job[0].file), job[0].begin))
    begin = 0
    for end in range(1, len(ordered) + 1):
        before = ordered[end - 1][0]
        after = ordered[end][0] if end < len(ordered) else None
        neighbours = after and after.file == before.file and after.begin == before.begin + before.size
        if not neighbours or end - begin == _MOST_BUFFERS:
            _read_run(ordered[begin:end])
            begin = end


def _read_run(jobs: Sequence[tuple[StoredTensor, Tensor]]) -> None:
    """Neighbours in one file, in order."""
    first = jobs[0][0]
    buffers = [memory.reshape(-1).view(torch.uint8).numpy().data for tensor, memory in jobs if tensor.size]
    position = first.begin
    try:
        descriptor = os.open(first.file, os.O_RDONLY)
    except OSError as error:
        raise KTAMXError(f"{first} cannot be read any more: {error.strerror}.") from error
    try:
        while buffers:
            got = os.preadv(descriptor, buffers, position)
            if not got:
                raise KTAMXError(f"{first.file} became shorter while {first.name} and what follows it were read.")
            position += got
            while buffers and got >= len(buffers[0]):
                got -= len(buffers.pop(0))
            if got:
                buffers[0] = buffers[0][got:]
    finally:
        os.close(descriptor)
