"""One expert's projection in a checkpoint, and reading many of them into memory of a given dtype."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .eight_bit import dequantize
from .tensor_files import StoredTensor, read_tensors

_STAGING = 64 * 2**20  # bytes read at a time where their dtype is to be changed


@dataclass(frozen=True)
class Matrix:
    """One expert's projection in the checkpoint.

    Attributes:
        weight: [out, in].
        scales: Of an 8-bit weight, one for each block; None for a floating one.
        block: Rows and columns that share a scale.
    """

    weight: StoredTensor
    scales: StoredTensor | None
    block: tuple[int, int]

    @property
    def tensors(self) -> list[StoredTensor]:
        """What is to be read of it: the weight, and its scales where it has any."""
        return [self.weight] if self.scales is None else [self.weight, self.scales]

    @property
    def room(self) -> int:
        """Bytes of memory to read it into."""
        return sum(_room(tensor) for tensor in self.tensors)


Job = tuple[Matrix, Tensor]


def read_matrices(jobs: Sequence[Job]) -> None:
    """Read matrices into memory, dequantized or rounded to its dtype.

    Args:
        jobs: Each matrix with the tensor to read it into: contiguous, of its shape, on the CPU, of any floating dtype.

    Raises:
        KTAMXError: A file has changed since its header was read.
    """
    read_tensors([(matrix.weight, target) for matrix, target in jobs if matrix.weight.dtype == target.dtype])
    _convert([(matrix, target) for matrix, target in jobs if matrix.weight.dtype != target.dtype])


def _convert(jobs: list[Job]) -> None:
    """Read matrices of another dtype than their targets', a few at a time."""
    if not jobs:
        return
    # One block of memory for all: many small ones would stay with the C library.
    sizes = [matrix.room for matrix, _ in jobs]
    memory = torch.empty(max(*sizes, min(_STAGING, sum(sizes) // 8)), dtype=torch.uint8, device="cpu")
    for batch in _batches(jobs, memory.numel()):
        parts, end = {}, 0
        for tensor in (tensor for matrix, _ in batch for tensor in matrix.tensors):
            parts[tensor] = memory[end : end + tensor.size].view(tensor.dtype).reshape(tensor.shape)
            end += _room(tensor)
        read_tensors(list(parts.items()))
        for matrix, target in batch:
            if matrix.scales is None:
                target.copy_(parts[matrix.weight])
            else:
                dequantize(parts[matrix.weight], parts[matrix.scales], matrix.block, target)


def _room(tensor: StoredTensor) -> int:
    """The tensor's bytes, rounded up so that the next one begins where any dtype may."""
    return -(-tensor.size // 64) * 64


def _batches(jobs: list[Job], most: int) -> Iterator[list[Job]]:
    """Jobs in the order of the files, `most` bytes at a time."""
    batch: list[Job] = []
    size = 0
    for job in sorted(jobs, key=lambda job: (str(job[0].weight.file), job[0].weight.begin)):
        if batch and size + job[0].room > most:
            yield batch
            batch, size = [], 0
        batch.append(job)
        size += job[0].room
    if batch:
        yield batch
