"""Block-scaled 8-bit weights, in the checkpoint's layout: FP8 or INT8 values, and a scale for each block of them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

logger = logging.getLogger(__name__)
EIGHT_BIT = (torch.float8_e4m3fn, torch.int8)


@dataclass
class ScaledMatrices:
    """A stack of matrices; a weight is its value times its block's scale.

    Attributes:
        values: [n, rows, columns], of a dtype of `EIGHT_BIT`.
        scales: [n, parts, R, C], fp32: a scale for each of R times C blocks of a part. A matrix is `parts` parts of
            equal height, one above the other, and blocks do not reach from one into the next: gate and up of an expert
            are two parts where the checkpoint has them separately.
        block: Rows and columns that share a scale; blocks at the edges may have fewer.
    """

    values: Tensor
    scales: Tensor
    block: tuple[int, int]

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weights [n, rows, columns] in a floating dtype: value times scale in fp32, rounded once."""
        if self.values.is_cuda and dtype == torch.bfloat16:
            weights = _by_kernel(self.values, self.scales, self.block)
            if weights is not None:
                return weights
        wide = self.values.to(dtype)  # exactly, even in bf16
        scale_(wide.view(*self.scales.shape[:2], -1, wide.shape[-1]), self.scales, self.block)
        return wide

    def row(self, matrix: int, row: int, dtype: torch.dtype) -> Tensor:
        """Row `row` of `dequantized(dtype)[matrix]`: [columns]."""
        height = self.values.shape[1] // self.scales.shape[1]
        part, below = divmod(row, height)
        wide = self.values[matrix, row : row + 1].to(dtype)
        block = below // self.block[0]
        scale_(wide, self.scales[matrix, part, block : block + 1], (1, self.block[1]))
        return wide[0]


@dataclass
class ScaledExperts:
    """The 8-bit weights of n experts of a layer.

    Attributes:
        experts: Their ids, ascending.
        gate_up: Their gate and up projections, [n, 2I, H].
        down: Their down projections, [n, H, I].
    """

    experts: Sequence[int]
    gate_up: ScaledMatrices
    down: ScaledMatrices


# Whether Triton builds the kernel, for each dtype and device that it was tried on.
_kernel_runs: dict[tuple[torch.dtype, torch.device], bool] = {}


def _by_kernel(values: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor | None:
    """The weights in bf16, by Triton's kernel; None where it cannot be built."""
    kind = values.dtype, values.device
    if _kernel_runs.get(kind) is False:
        return None
    try:
        from .gpu.dequantize_kernel import dequantized

        weights = dequantized(values, scales, block)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no Triton, no compiler: what is raised then is not documented
        if kind in _kernel_runs:  # it was built: this is something else, memory that ran out for instance
            raise
        logger.info("kt_hf: PyTorch dequantizes %s, for Triton's kernel does not run here: %s", values.dtype, error)
        weights = None
    _kernel_runs[kind] = weights is not None
    return weights


def scale_(weight: Tensor, scales: Tensor, block: tuple[int, int]) -> None:
    """Multiply each weight by its block's scale, in place: computed in fp32 and rounded once.

    Args:
        weight: [..., rows, columns], floating.
        scales: [..., rows / block rows, columns / block columns], rounded up, fp32, on the same device.
        block: Rows and columns of a block.
    """
    for rows, over, height in _pieces(weight.shape[-2], block[0]):
        for columns, along, width in _pieces(weight.shape[-1], block[1]):
            blocks = weight[..., rows, columns].unflatten(-1, (-1, width)).unflatten(-3, (-1, height))
            blocks.mul_(scales[..., over, along][..., :, None, :, None])


def _pieces(total: int, size: int) -> Iterator[tuple[slice, slice, int]]:
    """(a span of `total`, its blocks, their size): first of the whole blocks, then of the rest."""
    count, rest = divmod(total, size)
    if count:
        yield slice(0, count * size), slice(0, count), size
    if rest:
        yield slice(count * size, total), slice(count, count + 1), rest
