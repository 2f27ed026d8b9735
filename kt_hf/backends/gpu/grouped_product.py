"""A grouped matrix product in Triton, for GPUs where `torch._grouped_mm` waits for the host.

Rows are sorted by expert. They are cut into tiles of one expert each; how many there are is known on the GPU alone, so
as many programs are launched as there can be at most, and those without a tile end at once. Sums are in fp32. Imported
only where Triton runs (`kernels.py`).

Block sizes are a table and not searched for at run time: a search would measure beside copies of weights, and again for
each process. Two rows of it, by the shared memory of a block: 99 KB (sm_86, 89, 120) or 163 KB and more (sm_80, 90).
"""
# mypy: allow-untyped-defs
# (the kernels: their arguments are pointers and numbers of the GPU)

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_AT_ONCE = 64  # tiles of an expert that are listed at a time


class Blocks(NamedTuple):
    """Of a product's tile.

    Attributes:
        width: Columns of the result, at most.
        depth: Columns of x (or rows, in an outer product) multiplied at a time, at most.
        stages: Loads that are under way at a time.
        warps: Of a program.
    """

    width: int
    depth: int
    stages: int
    warps: int


LARGE = 160 * 1024  # bytes of shared memory of a block: as much makes a GPU `large`
# (large, rows of a tile) -> the rest of the tile's sizes
PRODUCT = {
    (False, 16): Blocks(128, 64, 4, 4),
    (False, 64): Blocks(128, 32, 4, 4),
    (False, 128): Blocks(128, 32, 4, 8),
    (True, 16): Blocks(128, 64, 4, 4),
    (True, 64): Blocks(128, 64, 3, 4),
    (True, 128): Blocks(256, 64, 3, 8),
}
OUTER_HEIGHT = 64  # rows of an outer product's tile, at most
OUTER = {False: Blocks(128, 32, 3, 4), True: Blocks(128, 64, 3, 4)}


def height_of(average: float) -> int:
    """Rows of a tile, by how many an expert has on average."""
    return 16 if average <= 16 else 64 if average <= 256 else 128


@triton.jit(do_not_specialize=["E", "count"])
def _list_tiles(
    ends, tile_expert, tile_row, E, count, HEIGHT: tl.constexpr, EXPERTS: tl.constexpr, AT_ONCE: tl.constexpr
):
    """Program e lists the tiles of expert e; the last one marks those that there are not by -1."""
    expert = tl.program_id(0)
    number = tl.arange(0, EXPERTS)
    starts = tl.load(ends + number - 1, mask=(number > 0) & (number < E), other=0)
    tiles = (tl.load(ends + number, mask=number < E, other=0) - starts + HEIGHT - 1) // HEIGHT
    tiles = tl.where(number < E, tiles, 0)
    first = tl.sum(tl.where(number < expert, tiles, 0), axis=0)
    own = tl.sum(tl.where(number == expert, tiles, 0), axis=0)
    start = tl.sum(tl.where(number == expert, starts, 0), axis=0)
    for begin in range(0, own, AT_ONCE):
        tile = begin + tl.arange(0, AT_ONCE)
        tl.store(tile_expert + first + tile, tl.zeros([AT_ONCE], tl.int32) + expert, mask=tile < own)
        tl.store(tile_row + first + tile, start + tile * HEIGHT, mask=tile < own)
    if expert == E - 1:
        for begin in range(first + own, count, AT_ONCE):
            tile = begin + tl.arange(0, AT_ONCE)
            tl.store(tile_expert + tile, tl.full([AT_ONCE], -1, tl.int32), mask=tile < count)


@triton.jit
def _product(
    x,
    w,
    out,
    tile_expert,
    tile_row,
    ends,
    K,
    N,
    w_expert,
    w_in,
    w_out,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """EVEN_K, EVEN_N: whether K is a multiple of DEPTH, N of WIDTH."""
    columns = tl.cdiv(N, WIDTH)
    tile = tl.program_id(0) // columns  # neighbours share rows of x
    expert = tl.load(tile_expert + tile)
    if expert < 0:
        return
    row = tl.load(tile_row + tile) + tl.arange(0, HEIGHT)
    end = tl.load(ends + expert)
    column = tl.program_id(0) % columns * WIDTH + tl.arange(0, WIDTH)
    k = tl.arange(0, DEPTH)
    read = tl.minimum(row, end - 1).to(tl.int64)  # a row of this expert in any case: it needs no mask
    left = x + read[:, None] * K + k[None, :]
    right = w + expert.to(tl.int64) * w_expert + k[:, None] * w_in + column[None, :] * w_out
    total = tl.zeros((HEIGHT, WIDTH), dtype=tl.float32)
    for at in range(0, K, DEPTH):
        # Only what does not divide is masked: in most models nothing.
        a = tl.load(left) if EVEN_K else tl.load(left, mask=(at + k < K)[None, :], other=0.0)
        if EVEN_K and EVEN_N:
            b = tl.load(right)
        elif EVEN_K:
            b = tl.load(right, mask=(column < N)[None, :], other=0.0)
        else:
            b = tl.load(right, mask=(at + k < K)[:, None] & (column < N)[None, :], other=0.0)
        total = tl.dot(a, b, total)
        left += DEPTH
        right += DEPTH * w_in
    into = out + row[:, None].to(tl.int64) * N + column[None, :]
    tl.store(into, total.to(out.dtype.element_ty), mask=(row < end)[:, None] & (column < N)[None, :])


@triton.jit
def _outer(
    left, right, out, ends, M, N, EVEN: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr
):
    """EVEN: whether M and N are multiples of HEIGHT and WIDTH."""
    columns = tl.cdiv(N, WIDTH)
    tiles = tl.cdiv(M, HEIGHT) * columns
    expert = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    m = tile // columns * HEIGHT + tl.arange(0, HEIGHT)
    n = tile % columns * WIDTH + tl.arange(0, WIDTH)
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)
    total = tl.zeros((HEIGHT, WIDTH), dtype=tl.float32)
    for first in range(start, end, DEPTH):
        row = first + tl.arange(0, DEPTH)
        inside, at = row < end, row.to(tl.int64)
        a_inside, b_inside = inside[None, :], inside[:, None]
        if not EVEN:
            a_inside, b_inside = a_inside & (m < M)[:, None], b_inside & (n < N)[None, :]
        a = tl.load(left + at[None, :] * M + m[:, None], mask=a_inside, other=0.0)
        b = tl.load(right + at[:, None] * N + n[None, :], mask=b_inside, other=0.0)
        total = tl.dot(a, b, total)
    into = out + expert.to(tl.int64) * M * N + m[:, None] * N + n[None, :]
    tl.store(into, total.to(out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def tiles(ends: Tensor, rows: int, average: float) -> tuple[Tensor, Tensor, int]:
    """Cut rows into tiles of one expert each, for `product`.

    Args:
        ends: [E] int32, the row after each expert's last.
        rows: S, with the rows of no expert.
        average: Rows of an expert, by which the height of tiles is chosen.

    Returns:
        The expert of each tile (-1: there is no such tile) and its first row, both int32, as many as there can be at
        most; and the rows of a tile.
    """
    E = len(ends)
    height = height_of(average)
    count = rows // height + min(E, rows)  # each expert with rows has one tile, at most, that is not full
    table = torch.empty(2, count, dtype=torch.int32, device=ends.device)
    with torch.cuda.device_of(ends):
        _list_tiles[E,](
            ends, table[0], table[1], E, count, HEIGHT=height, EXPERTS=triton.next_power_of_2(E), AT_ONCE=_AT_ONCE
        )
    return table[0], table[1], height


def product(x: Tensor, w: Tensor, ends: Tensor, cut: tuple[Tensor, Tensor, int]) -> Tensor:
    """x[rows of e] @ w[e] for every expert e.

    Args:
        x: [S, in] bf16, contiguous.
        w: [E, in, out] bf16; either of the last two dimensions may be the one of stride 1.
        ends: [E] int32, the row after each expert's last.
        cut: Of `tiles`.

    Returns:
        [S, out] bf16; undefined for rows of no expert.
    """
    tile_expert, tile_row, height = cut
    K, N = w.shape[1:]
    blocks = PRODUCT[_large(x.device), height]
    width, depth = _block(N, blocks.width), _block(K, blocks.depth)
    out = x.new_empty(x.shape[0], N)
    with torch.cuda.device_of(x):
        _product[len(tile_expert) * triton.cdiv(N, width),](
            x, w, out, tile_expert, tile_row, ends, K, N, *w.stride(), EVEN_K=K % depth == 0, EVEN_N=N % width == 0,
            HEIGHT=height, WIDTH=width, DEPTH=depth, num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip
    return out


def outer(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """left[rows of e].T @ right[rows of e] for every expert e.

    Args:
        left: [S, M] bf16, contiguous.
        right: [S, N] bf16, contiguous.
        ends: [E] int32, the row after each expert's last.

    Returns:
        [E, M, N] bf16; zeros for experts without rows.
    """
    E, M, N = len(ends), left.shape[1], right.shape[1]
    blocks = OUTER[_large(left.device)]
    height, width = _block(M, OUTER_HEIGHT), _block(N, blocks.width)
    out = left.new_empty(E, M, N)
    even = M % height == 0 and N % width == 0
    with torch.cuda.device_of(left):
        _outer[E * triton.cdiv(M, height) * triton.cdiv(N, width),](
            left, right, out, ends, M, N, EVEN=even, HEIGHT=height, WIDTH=width, DEPTH=blocks.depth,
            num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip
    return out


def _block(size: int, most: int) -> int:
    """Size of a block along a dimension: a power of two, 16 at least, which tl.dot wants; a divisor if not below 64."""
    block = min(most, max(16, triton.next_power_of_2(size)))
    while block > 64 and size % block:
        block //= 2
    return block


@functools.cache
def _large(device: torch.device) -> bool:
    if device.type != "cuda":  # Triton's interpreter
        return False
    properties = torch.cuda.get_device_properties(device)
    return bool(properties.shared_memory_per_block_optin >= LARGE)  # type: ignore[attr-defined]
