"""Weights in a checkpoint, of experts and others: read into memory of a floating dtype, or into stacks of low bits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..backends.packed import PackedMatrices
from ..errors import KTAMXError
from .formats import Format, Kind, Parts, Tensors
from .tensor_files import StoredTensor, read_tensors

_STAGING = 64 * 2**20  # bytes read at a time where they are not read to their place


@dataclass(frozen=True)
class Matrix:
    """A weight in the checkpoint.

    Attributes:
        shape: Its rows and columns.
        parts: Its tensors, by their names behind the layer's.
        format: How it is stored; None for a floating one.
        kind: What it can be stacked with; None for a floating one.
    """

    shape: tuple[int, ...]
    parts: Parts
    format: Format | None = None
    kind: Kind | None = None

    @property
    def size(self) -> int:
        """Its bytes in the files."""
        return sum(tensor.size for tensor in self.parts.values())

    @property
    def needed(self) -> Parts:
        """The parts that the weight is computed of; the others only say how."""
        spare = self.format.described if self.format else ()
        return {name: stored for name, stored in self.parts.items() if name not in spare}

    @property
    def first(self) -> StoredTensor:
        """The part by which it is named and found: its codes."""
        names = (name for name in ("weight", "weight_packed", "qweight", "blocks") if name in self.parts)
        return self.parts[next(names, next(iter(self.parts)))]

    def widen(self, tensors: Tensors, out: Tensor) -> None:
        """Compute the weight of its parts, in the dtype of `out`."""
        if self.format is None:
            out.copy_(tensors["weight"])
        else:
            out.copy_(self.format.packed(tensors, (self.shape[0], self.shape[1])).dequantized(out.dtype)[0])


class Target(Protocol):
    """Where a matrix is read to."""

    def place(self, matrix: Matrix, part: str) -> Tensor | None:
        """Memory to read a part into as it is; None if it has to be computed with."""

    def put(self, matrix: Matrix, tensors: Tensors) -> None:
        """Take the parts, once all are read."""


@dataclass(frozen=True)
class Wide:
    """A floating tensor [rows, columns] on the CPU, contiguous."""

    tensor: Tensor

    def place(self, matrix: Matrix, part: str) -> Tensor | None:
        """The tensor, for a weight of its dtype."""
        return self.tensor if matrix.format is None and matrix.parts[part].dtype == self.tensor.dtype else None

    def put(self, matrix: Matrix, tensors: Tensors) -> None:
        """Widen the weight, or round it to the tensor's dtype."""
        if self.place(matrix, "weight") is None:
            matrix.widen(tensors, self.tensor)


@dataclass(frozen=True)
class Slot:
    """The place of a weight in a stack of its kind.

    Attributes:
        stack: The stack.
        index: The matrix of the stack.
        part: The weight's position, where a matrix is several of them, one above the other.
        parts: How many.
    """

    stack: PackedMatrices
    index: int
    part: int = 0
    parts: int = 1

    def _rows(self, tensor: Tensor) -> Tensor:
        """The weight's rows of a matrix of the stack."""
        height = tensor.shape[1] // self.parts
        return tensor[self.index, self.part * height : (self.part + 1) * height]

    def place(self, matrix: Matrix, part: str) -> Tensor | None:
        """The weight's rows of the tensor whose bytes the part has."""
        field = matrix.format.direct.get(part) if matrix.format else None
        if field is None or matrix.format is None:
            return None
        stored = matrix.parts[part]
        return self._rows(getattr(self.stack, field)).view(stored.dtype).view(stored.shape)

    def put(self, matrix: Matrix, tensors: Tensors) -> None:
        """Copy what was not read to its place."""
        assert matrix.format is not None
        weight = matrix.format.packed(tensors, (matrix.shape[0], matrix.shape[1]))
        stack = self.stack
        if weight.scales.dim() == 4:  # of 8 bits
            pairs = [
                (self._rows(stack.codes), weight.codes[0]),
                (stack.scales[self.index, self.part], weight.scales[0, 0]),
            ]
        else:
            pairs = [(self._rows(stack.codes), weight.codes[0]), (self._rows(stack.scales), weight.scales[0])]
            if stack.zeros is not None and weight.zeros is not None:
                pairs.append((self._rows(stack.zeros), weight.zeros[0]))
            if stack.factor is not None and weight.factor is not None:
                pairs.append((stack.factor[self.index, self.part], weight.factor[0, 0]))
        for target, source in pairs:
            if target.data_ptr() != source.data_ptr():
                target.copy_(source)


Job = tuple[Matrix, Target]


def read_matrices(jobs: Sequence[Job]) -> None:
    """Read matrices to their places, a few at a time where their parts have to be computed with.

    Raises:
        KTAMXError: A file has changed since its header was read.
    """
    at_once = [(matrix, target) for matrix, target in jobs if _room(matrix, target) == 0]
    read_tensors([(part, _placed(m, t, name)) for m, t in at_once for name, part in m.needed.items()])
    rest = [job for job in jobs if _room(*job)]
    if not rest:
        return
    # One block of memory for all: many small ones would stay with the C library.
    sizes = [_room(*job) for job in rest]
    memory = torch.empty(max(*sizes, min(_STAGING, sum(sizes) // 8)), dtype=torch.uint8, device="cpu")
    for batch in _batches(rest, memory.numel()):
        _read_batch(batch, memory)


def read_rows(matrix: Matrix, first: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Rows `first` to before `stop` of a matrix in a floating dtype; one of low bits is read and widened whole.

    Raises:
        KTAMXError: A file has changed since its header was read.
    """
    if matrix.format is None:
        return matrix.parts["weight"].rows(first, stop).load().to(dtype)
    whole = torch.empty(matrix.shape, dtype=dtype, device="cpu")
    read_matrices([(matrix, Wide(whole))])
    return whole[first:stop]


def _read_batch(batch: list[Job], memory: Tensor) -> None:
    read: list[tuple[StoredTensor, Tensor]] = []
    tensors: list[dict[str, Tensor]] = []
    end = 0
    for matrix, target in batch:
        tensors.append({})
        for name, stored in matrix.needed.items():
            place = target.place(matrix, name)
            if place is None:
                place = memory[end : end + stored.size].view(stored.dtype).reshape(stored.shape)
                end += _rounded(stored)
            tensors[-1][name] = place
            read.append((stored, place))
    read_tensors(read)
    for (matrix, target), parts in zip(batch, tensors, strict=True):
        target.put(matrix, parts)


def _placed(matrix: Matrix, target: Target, part: str) -> Tensor:
    place = target.place(matrix, part)
    assert place is not None, "it has no room elsewhere"
    return place


def _room(matrix: Matrix, target: Target) -> int:
    """Bytes of memory for the parts that are not read to their place."""
    return sum(_rounded(stored) for name, stored in matrix.needed.items() if target.place(matrix, name) is None)


def _rounded(tensor: StoredTensor) -> int:
    """The tensor's bytes, rounded up so that the next one begins where any dtype may."""
    return -(-tensor.size // 64) * 64


def _batches(jobs: list[Job], most: int) -> Iterator[list[Job]]:
    """Jobs in the order of the files, of which `most` bytes have to be held at a time."""
    batch: list[Job] = []
    size = 0
    for job in sorted(jobs, key=lambda job: (str(job[0].first.file), job[0].first.begin)):
        room = _room(*job)
        if batch and size + room > most:
            yield batch
            batch, size = [], 0
        batch.append(job)
        size += room
    if batch:
        yield batch


def check_values(matrices: Iterable[Matrix], scales: bool = True) -> None:
    """Read the small parts of weights, and look through their values.

    Args:
        matrices: The weights.
        scales: Whether to look through their scales too, for what is not a finite number.

    Raises:
        KTAMXError: A weight cannot be computed of them, naming file and tensor.
    """
    jobs, size = [], 0
    for matrix in matrices:
        if matrix.format is None:
            continue
        names = (*matrix.format.described, *(matrix.format.scales if scales else ()))
        parts = {name: matrix.parts[name] for name in names if name in matrix.parts}
        jobs.append((matrix, parts))
        size += sum(stored.size for stored in parts.values())
        if size > _STAGING:
            _check_batch(jobs)
            jobs, size = [], 0
    _check_batch(jobs)


def _check_batch(jobs: list[tuple[Matrix, dict[str, StoredTensor]]]) -> None:
    read = [{name: torch.empty(s.shape, dtype=s.dtype, device="cpu") for name, s in parts.items()} for _, parts in jobs]
    read_tensors([(parts[name], memory[name]) for (_, parts), memory in zip(jobs, read, strict=True) for name in parts])
    for (matrix, parts), tensors in zip(jobs, read, strict=True):
        assert matrix.format is not None
        problem = matrix.format.problem(tensors, (matrix.shape[0], matrix.shape[1]))
        if problem:
            part, why = problem
            raise KTAMXError(f"{parts[part]} of a weight in {matrix.format.words} {why}.")
