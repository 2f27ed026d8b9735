"""One expert's projection in a checkpoint, and reading many of them into the memory and the dtype wanted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .eight_bit import dequantize
from .tensor_files import StoredTensor, read_tensors

_STAGING = 64 * 2**20  # bytes read at a time where they are not the bytes wanted


@dataclass(frozen=True)
class Matrix:
    """One expert's projection in the checkpoint: [out, in], and where it is of 8 bits its scales, each of a block of
    rows and columns."""

    weight: StoredTensor
    scales: StoredTensor | None
    block: tuple[int, int]

    @property
    def tensors(self) -> list[StoredTensor]:
        return [self.weight] if self.scales is None else [self.weight, self.scales]

    @property
    def room(self) -> int:
        """Bytes of memory to read it into."""
        return sum(_room(tensor) for tensor in self.tensors)


Job = tuple[Matrix, Tensor]


def read_matrices(jobs: Sequence[Job]) -> None:
    """Read each matrix into the tensor beside it, contiguous, of its shape, on the CPU, of any floating dtype.

    Raises:
        KTAMXError: A file has changed since its header was read.
    """
    read_tensors([(one.weight, target) for one, target in jobs if one.weight.dtype == target.dtype])
    _convert([(one, target) for one, target in jobs if one.weight.dtype != target.dtype])


def _convert(jobs: list[Job]) -> None:
    """Read matrices of another dtype than their targets', a few at a time."""
    if not jobs:
        return
    # One block of memory for all: many small ones would stay with the C library.
    sizes = [one.room for one, _ in jobs]
    memory = torch.empty(max(*sizes, min(_STAGING, sum(sizes) // 8)), dtype=torch.uint8, device="cpu")
    for batch in _batches(jobs, memory.numel()):
        parts, end = {}, 0
        for tensor in (tensor for one, _ in batch for tensor in one.tensors):
            parts[tensor] = memory[end : end + tensor.size].view(tensor.dtype).reshape(tensor.shape)
            end += _room(tensor)
        read_tensors(list(parts.items()))
        for one, target in batch:
            if one.scales is None:
                target.copy_(parts[one.weight])
            else:
                dequantize(parts[one.weight], parts[one.scales], one.block, target)


def _room(tensor: StoredTensor) -> int:
    """Its bytes, and some, so that what comes next begins where any dtype may."""
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
