"""The tensors of a safetensors checkpoint: where each one lies, checked from the headers, and read without mapping.

Pages of a mapped file count as the process's memory for as long as one of its tensors lives; experts are therefore read
with positional reads into memory of their own. Neighbours in a file are read by one call, which also keeps Python's
lock free: the operators hold it while they pack a layer, and the next one is read meanwhile.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ..errors import KTAMXConfigError, KTAMXError
from ..system.files import DTYPES, Lazy
from ..system.json_fields import Field, parse_json, printable, read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_LONGEST_HEADER = 40_000_000  # bytes; the library takes 100 million, which would be 2 GB in memory
_LARGEST = 2**48  # elements of a tensor; PyTorch's own arithmetic of shapes and strides ends at 2**63
_MOST_BUFFERS = 1024  # a call of preadv takes (IOV_MAX of Linux and macOS)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        name: Of the tensor.
        file: That holds it.
        dtype: Of its values.
        shape: Its lengths.
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
        return self.dtype.itemsize * math.prod(self.shape)

    def row(self, index: int) -> StoredTensor:
        """The tensor at `index` of the first dimension."""
        shape = self.shape[1:]
        size = self.dtype.itemsize * math.prod(shape)
        return replace(self, shape=shape, begin=self.begin + index * size)

    def rows(self, first: int, stop: int) -> StoredTensor:
        """The tensors from `first` to before `stop` of the first dimension."""
        return replace(self.row(first), shape=(stop - first, *self.shape[1:]))

    def load(self) -> Tensor:
        """Read it, into memory of its own.

        Raises:
            KTAMXError: The file has changed since its header was read.
        """
        memory = torch.empty(self.shape, dtype=self.dtype, device="cpu")
        read_tensors([(self, memory)])
        return memory

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
        index = read_index(self.folder)
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

    @cached_property
    def unlisted(self) -> dict[str, Path]:
        """Tensor -> file, of files in the folder that do not belong to the checkpoint."""
        unlisted: dict[str, Path] = {}
        for file in sorted(set(self.folder.glob("*.safetensors")) - set(self.files)):
            try:
                unlisted |= dict.fromkeys(read_header(file), file)
            except KTAMXError:
                continue  # not the checkpoint's
        return unlisted


def read_index(folder: Path) -> dict[str, str]:
    """Which file of a checkpoint has which tensor. Where both are there, transformers loads the one file.

    Args:
        folder: Holds model.safetensors, or model.safetensors.index.json.

    Returns:
        Tensor -> file name, in the order of the index; {} for a checkpoint of one file.

    Raises:
        KTAMXConfigError: It holds neither.
        KTAMXError: The index is damaged, or names a file that is not in the folder.
    """
    path = folder / INDEX
    if (folder / SINGLE).is_file():
        return {}
    if not path.is_file():
        raise KTAMXConfigError(
            f"{folder} has neither {SINGLE} nor {INDEX}: give the folder of a model saved as safetensors."
        )
    listed = read_json(path).object()["weight_map"].object()
    if not len(listed):
        raise KTAMXError(f"{path} is damaged: its weight_map names no file.")
    odd = next((name for name in listed if not name.isprintable()), None)
    if odd is not None:
        raise KTAMXError(f"{path}: {odd[:80]!r} is no name of a tensor.")
    return {name: shard.file_name() for name, shard in listed.items()}


def stored_tensors(file: Path) -> dict[str, Lazy]:
    """The tensors of a safetensors file by name, unread; each is read into memory of its own.

    Raises:
        KTAMXError: As `read_header`.
    """
    return {name: Lazy(tensor.dtype, tensor.shape, tensor.load) for name, tensor in read_header(file).items()}


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file. Whatever the library refuses is refused, and names that come twice too.

    The format: 8 bytes, the length of the header as a little-endian integer; the header, JSON of name -> dtype, shape,
    data_offsets; the tensors' bytes, little-endian, without gaps.

    Raises:
        KTAMXError: It is no such file, or shorter or longer than its header says, naming the tensor.
    """
    header, data, size = _header(file)
    entries = header.object()
    for name, text in entries["__metadata__"].object().items() if "__metadata__" in entries else ():
        if not isinstance(text.value, str):
            raise KTAMXError(f"{file}: {printable(name)} of the header's __metadata__ is not a text.")
    stored = [_stored(name, entry, data) for name, entry in entries.items() if name != "__metadata__"]
    end, last = data, ""
    for tensor in sorted(stored, key=lambda t: (t.begin, t.size)):
        if tensor.begin != end:
            raise KTAMXError(
                f"{tensor} begins at byte {tensor.begin}, but {last or 'the header'} before it ends at {end}."
            )
        end, last = tensor.begin + tensor.size, tensor.name
        if end > size:
            raise KTAMXError(f"{tensor} ends at byte {end}, but the file has only {size}: it is truncated.")
    if end != size:
        raise KTAMXError(f"{file} has {size} bytes; its last tensor, {last or 'none'}, ends at {end}.")
    return {tensor.name: tensor for tensor in stored}


def _header(file: Path) -> tuple[Field, int, int]:
    """The header, where the data begins, and the size of the file, in bytes."""
    try:
        if file.exists() and not file.is_file():  # a pipe would wait for ever
            raise ValueError("it is no file")
        with open(file, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = struct.unpack("<Q", stream.read(8))[0] if size >= 8 else 0
            if length > min(size - 8, _LONGEST_HEADER):
                raise ValueError(f"its header would have {length} bytes, the file has {size}")
            text = stream.read(length)
        if not text.startswith(b"{"):
            raise ValueError("it does not begin with a header")
        return Field(file, "", parse_json(text)), 8 + length, size
    except FileNotFoundError:
        raise KTAMXError(f"{file} is missing.") from None
    except (ValueError, OSError) as error:
        size = file.stat().st_size if file.is_file() else 0
        problem = getattr(error, "strerror", None) or error
        raise KTAMXError(f"{file} is truncated, damaged, or no safetensors file: {problem} ({size} bytes).") from error


def _stored(name: str, entry: Field, data: int) -> StoredTensor:
    """A tensor of the header; `data` is where the file's data begins."""
    if not name.isprintable():
        raise KTAMXError(f"{entry.file}: {name[:80]!r} is no name of a tensor.")
    values = entry.object()
    dtype = DTYPES.get(values["dtype"].text())
    if dtype is None:
        kind = printable(values["dtype"].value[:20])
        raise KTAMXError(f"{entry.file}: {name} is of dtype {kind}, which is not supported.")
    shape = tuple(length.integer(least=0) for length in values["shape"].entries())
    offsets = [offset.integer(least=0) for offset in values["data_offsets"].entries()]
    if len(offsets) != 2 or offsets[1] < offsets[0]:
        values["data_offsets"].refuse("is not the begin and the end of a tensor")
    if len(shape) > 64 or math.prod(max(length, 1) for length in shape) > _LARGEST:
        values["shape"].refuse("is the shape of no tensor")
    tensor = StoredTensor(name, entry.file, dtype, shape, data + offsets[0])
    size = offsets[1] - offsets[0]
    if tensor.size != size:
        raise KTAMXError(
            f"{tensor} has {size} bytes, but its shape {list(shape)} of {values['dtype'].value} needs {tensor.size}."
        )
    return tensor


def read_tensors(jobs: Sequence[tuple[StoredTensor, Tensor]]) -> None:
    """Read stored tensors into memory; neighbours in a file by one call.

    Args:
        jobs: Each stored tensor with the tensor to read it into: of the same dtype and size, contiguous, on the CPU.

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
