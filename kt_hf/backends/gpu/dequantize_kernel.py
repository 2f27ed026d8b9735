"""A Triton kernel that dequantizes 8-bit weights in one pass. Imported only where Triton is installed, with a GPU.

PyTorch alone would convert, then multiply by scales that are broadcast over blocks: 139 billion weights a second on an
H200, where the bus brings 54 billion.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 2048  # columns of a row that one program of the kernel computes


@triton.jit
def _widen(values, scales, out, rows, columns, part_rows, R, C, height, width, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    line = tl.program_id(0).to(tl.int64)  # of all matrices
    row = line % rows
    part = row // part_rows
    block_row = (line // rows * (rows // part_rows) + part) * R + (row - part * part_rows) // height
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    value = tl.load(values + line * columns + column, mask=inside).to(tl.float32)
    scale = tl.load(scales + block_row * C + column // width, mask=inside)
    tl.store(out + line * columns + column, (value * scale).to(tl.bfloat16), mask=inside)


def dequantized(values: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """The weights of `ScaledMatrices` in bf16: value times scale in fp32, rounded once.

    Args:
        values: [n, rows, columns], of 8 bits, contiguous, on a GPU.
        scales: [n, parts, R, C], fp32, contiguous, on the same GPU.
        block: Rows and columns that share a scale.

    Returns:
        [n, rows, columns], bf16, on that GPU.
    """
    n, rows, columns = values.shape
    parts, R, C = scales.shape[1:]
    out = torch.empty(values.shape, dtype=torch.bfloat16, device=values.device)
    height, width = min(block[0], rows), min(block[1], columns)
    with torch.cuda.device_of(values):
        _widen[n * rows, -(-columns // _COLUMNS)](
            values, scales, out, rows, columns, rows // parts, R, C, height, width, COLUMNS=_COLUMNS
        )
    return out
