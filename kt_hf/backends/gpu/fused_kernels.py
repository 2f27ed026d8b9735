"""Triton kernels for what is around the grouped products: rows gathered, activated, weighted, and summed by token.

Each is one pass over its rows, in fp32 inside, bf16 outside. Imported only where Triton runs (`kernels.py`);
`torch_rows.py` has the same functions without it. LoRA's part of a row comes as a tensor of its own and is added here,
which saves a pass. Rows after the last expert's end are of no expert: they are neither read nor written.

Gates are compile-time constants (`gate_kernels.py`).
"""
# mypy: allow-untyped-defs
# (the kernels: their arguments are pointers and numbers of the GPU)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...gates import PLAIN, Gate
from .gate_kernels import activated, constants, times_up

_ROWS, _COLUMNS = 4, 256  # of a tile: each of four warps has a row, each thread 16 bytes of it
_WIDE = 1024  # columns of a tile of one row
_INDICES = 512


@triton.jit
def _read(base, lora, at, inside, LORA: tl.constexpr):
    """Values in fp32, with LoRA's part added."""
    value = tl.load(base + at, mask=inside, other=0.0).to(tl.float32)
    if LORA:
        value += tl.load(lora + at, mask=inside, other=0.0).to(tl.float32)
    return value


@triton.jit
def _read_biased(base, lora, bias, at, at_bias, inside, LORA: tl.constexpr, BIAS: tl.constexpr):
    """Values in fp32, with LoRA's part and the biases added."""
    value = _read(base, lora, at, inside, LORA)
    if BIAS:
        value += tl.load(bias + at_bias, mask=inside, other=0.0).to(tl.float32)
    return value


@triton.jit(do_not_specialize=["count"])
def _indexed(order, weights, tokens, by_row, place, count, K, INDICES: tl.constexpr):
    row = tl.program_id(0) * INDICES + tl.arange(0, INDICES)
    inside = row < count
    choice = tl.load(order + row, mask=inside, other=0)
    tl.store(tokens + row, (choice // K).to(tl.int32), mask=inside)
    tl.store(by_row + row, tl.load(weights + choice, mask=inside, other=0.0), mask=inside)
    tl.store(place + choice, row, mask=inside)


@triton.jit(do_not_specialize=["last"], do_not_specialize_on_alignment=["tokens"])
def _gather(x, tokens, out, ends, last, H, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    valid = row < tl.load(ends + last)
    token = tl.load(tokens + row, mask=valid, other=0).to(tl.int64)
    inside = valid[:, None] & (column < H)[None, :]
    value = tl.load(x + token[:, None] * H + column[None, :], mask=inside)
    tl.store(out + row[:, None] * H + column[None, :], value, mask=inside)


@triton.jit(do_not_specialize=["last"], do_not_specialize_on_alignment=["experts"])
def _gate(
    gu,
    lora,
    bias,
    experts,
    h,
    ends,
    last,
    width,
    GATE: tl.constexpr,
    GATED: tl.constexpr,
    LORA: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    valid = row < tl.load(ends + last)
    inside = valid[:, None] & (column < width)[None, :]
    halves = 2 if GATED else 1
    at = row[:, None] * (halves * width) + column[None, :]
    at_bias = at
    if BIAS:
        expert = tl.load(experts + row, mask=valid, other=0).to(tl.int64)
        at_bias = expert[:, None] * (halves * width) + column[None, :]
    g = _read_biased(gu, lora, bias, at, at_bias, inside, LORA, BIAS)
    value, by_g = activated(g, GATE)
    if GATED:
        u = _read_biased(gu, lora, bias, at + width, at_bias + width, inside, LORA, BIAS)
        value, by_g, _ = times_up(value, by_g, u, GATE)
    tl.store(h + row[:, None] * width + column[None, :], value.to(h.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["last"], do_not_specialize_on_alignment=["weights", "experts"])
def _gate_gradients(
    gu,
    gu_lora,
    bias,
    experts,
    q,
    q_lora,
    weights,
    by_row,
    ends,
    last,
    width,
    GATE: tl.constexpr,
    GATED: tl.constexpr,
    LORA: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < tl.load(ends + last)
    weight = tl.load(weights + row, mask=valid, other=0.0)[:, None]
    halves = 2 if GATED else 1
    if BIAS:
        expert = tl.load(experts + row, mask=valid, other=0).to(tl.int64)[:, None] * (halves * width)
    total = tl.zeros([ROWS], dtype=tl.float32)
    for first in range(0, width, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = valid[:, None] & (column < width)[None, :]
        at = row[:, None] * (halves * width) + column[None, :]
        at_q = row[:, None] * width + column[None, :]
        at_bias = at
        if BIAS:
            at_bias = expert + column[None, :]
        g = _read_biased(gu, gu_lora, bias, at, at_bias, inside, LORA, BIAS)
        h, by_g = activated(g, GATE)
        if GATED:
            u = _read_biased(gu, gu_lora, bias, at + width, at_bias + width, inside, LORA, BIAS)
            h, by_g, by_u = times_up(h, by_g, u, GATE)
        d = _read(q, q_lora, at_q, inside, LORA)
        total += tl.sum(d * h, axis=1)
        d *= weight
        tl.store(gu + at, (d * by_g).to(gu.dtype.element_ty), mask=inside)
        if GATED:
            tl.store(gu + at + width, (d * by_u).to(gu.dtype.element_ty), mask=inside)
        if LORA:
            tl.store(q + at_q, (h * weight).to(q.dtype.element_ty), mask=inside)
    tl.store(by_row + row, total, mask=valid)


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["weights"])
def _weight(
    base,
    lora,
    weights,
    out,
    count,
    H,
    LORA: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    valid = row < count
    inside = valid[:, None] & (column < H)[None, :]
    at = row[:, None] * H + column[None, :]
    value = _read(base, lora, at, inside, LORA)
    if WEIGHTED:
        value *= tl.load(weights + row, mask=valid, other=0.0)[:, None]
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["last"])
def _sum(
    base,
    lora,
    weights,
    place,
    ends,
    last,
    out,
    H,
    K: tl.constexpr,
    LORA: tl.constexpr,
    WEIGHTED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    end = tl.load(ends + last)
    total = tl.zeros([COLUMNS], dtype=tl.float32)
    for k in tl.static_range(K):
        row = tl.load(place + token * K + k).to(tl.int64)
        inside = (column < H) & (row < end)
        value = _read(base, lora, row * H + column, inside, LORA)
        if WEIGHTED:
            value *= tl.load(weights + row, mask=row < end, other=0.0)
        total += value.to(base.dtype.element_ty).to(tl.float32)  # as a row is where `_weight` has written it
    tl.store(out + token * H + column, total.to(out.dtype.element_ty), mask=column < H)


def indexed(order: Tensor, weights: Tensor, K: int) -> tuple[Tensor, Tensor, Tensor]:
    """What rows sorted by expert are looked up by.

    Args:
        order: [T*K] int64: sorted row i is row `order[i]` of the unsorted ones.
        weights: Routing weights, [T*K] fp32, contiguous.
        K: Experts of a token.

    Returns:
        The token of each sorted row, its routing weight (fp32), and the sorted row of each unsorted one; each [T*K].
    """
    count = len(order)
    tokens, place = (torch.empty(count, dtype=torch.int32, device=order.device) for _ in range(2))
    by_row = torch.empty_like(weights)
    with torch.cuda.device_of(order):
        _indexed[triton.cdiv(count, _INDICES),](order, weights, tokens, by_row, place, count, K, INDICES=_INDICES)
    return tokens, by_row, place


def gathered(x: Tensor, tokens: Tensor, ends: Tensor) -> Tensor:
    """The rows of tokens.

    Args:
        x: [T, H], contiguous.
        tokens: [S] integers.
        ends: [E] int32, the row after each expert's last.

    Returns:
        [S, H]; undefined for rows of no expert.
    """
    S, H = len(tokens), x.shape[1]
    out = x.new_empty(S, H)
    grid = triton.cdiv(S, _ROWS), triton.cdiv(H, _COLUMNS)
    with torch.cuda.device_of(x):
        _gather[grid](x, tokens, out, ends, len(ends) - 1, H, ROWS=_ROWS, COLUMNS=_COLUMNS)
    return out


def gated(
    gu: Tensor, lora: Tensor | None, ends: Tensor, gate: Gate = PLAIN, bias: Tensor | None = None,
    experts: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The gated product: of the plain gate, silu(gate) times up.

    Args:
        gu: Gate beside up, [S, 2I] bf16; up alone, [S, I], without a gate. The memory may be overwritten.
        lora: What LoRA adds to them, [S, 2I] bf16; None without.
        ends: [E] int32, the row after each expert's last.
        gate: How gate and up are multiplied.
        bias: Added to gate and up before, [experts, 2I] bf16; None without.
        experts: The row of `bias` for each row, [S] integers; read only with a bias.

    Returns:
        [S, I] bf16; undefined for rows of no expert.
    """
    S, I = gu.shape[0], gu.shape[1] // gate.halves  # noqa: E741
    h = gu.new_empty(S, I)
    grid = triton.cdiv(S, _ROWS), triton.cdiv(I, _COLUMNS)
    with torch.cuda.device_of(gu):
        _gate[grid](
            gu, lora, bias, None if bias is None else experts, h, ends, len(ends) - 1, I, GATE=constants(gate),
            GATED=gate.gated, LORA=lora is not None, BIAS=bias is not None, ROWS=_ROWS, COLUMNS=_COLUMNS,
        )  # fmt: skip
    return h


def gate_gradients_(
    gu: Tensor, gu_lora: Tensor | None, q: Tensor, q_lora: Tensor | None, weights: Tensor, ends: Tensor,
    gate: Gate = PLAIN, bias: Tensor | None = None, experts: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The backward of the gated product h and of the routing weights, in place.

    Args:
        gu: Gate beside up, [S, 2I] bf16 (up alone, [S, I], without a gate); overwritten by the gradients of both.
        gu_lora: What LoRA adds to them, [S, 2I] bf16; None without.
        q: The gradient of h before it is multiplied by the routing weight, [S, I] bf16; with LoRA overwritten by h
            times the routing weight, without it undefined afterwards.
        q_lora: What LoRA adds to q, [S, I] bf16; given if `gu_lora` is.
        weights: Routing weights of the rows, [S] fp32.
        ends: [E] int32, the row after each expert's last.
        gate: How gate and up are multiplied.
        bias: Added to gate and up before, [experts, 2I] bf16; None without.
        experts: The row of `bias` for each row, [S] integers; read only with a bias.

    Returns:
        The gradient of each row's routing weight, [S] fp32. This and all else is undefined for rows of no expert.
    """
    S, I = q.shape  # noqa: E741
    by_row = torch.empty_like(weights)
    with torch.cuda.device_of(gu):
        _gate_gradients[triton.cdiv(S, _ROWS),](
            gu, gu_lora, bias, None if bias is None else experts, q, q_lora, weights, by_row, ends, len(ends) - 1, I,
            GATE=constants(gate), GATED=gate.gated, LORA=gu_lora is not None, BIAS=bias is not None, ROWS=_ROWS,
            COLUMNS=_COLUMNS,
        )  # fmt: skip
    return by_row


def weighted(base: Tensor, lora: Tensor | None, weights: Tensor | None, out: Tensor) -> None:
    """Write rows, with LoRA's part added, and times their routing weights, to `out`.

    Args:
        base: [S, H] bf16. The memory may be overwritten.
        lora: What LoRA adds, [S, H] bf16; None without.
        weights: [S] fp32; None for rows that are not weighted.
        out: [S, H] bf16, contiguous.
    """
    S, H = base.shape
    grid = triton.cdiv(S, _ROWS), triton.cdiv(H, _COLUMNS)
    with torch.cuda.device_of(base):
        _weight[grid](
            base, lora, weights, out, S, H, LORA=lora is not None, WEIGHTED=weights is not None, ROWS=_ROWS,
            COLUMNS=_COLUMNS,
        )  # fmt: skip


def summed(
    base: Tensor, lora: Tensor | None, weights: Tensor | None, place: Tensor, ends: Tensor, K: int
) -> Tensor:  # fmt: skip
    """The sum over each token's experts in fp32, in the order of its choices; each row is rounded to bf16 before.

    Args:
        base: All rows, sorted by expert, [T*K, H] bf16. The memory may be overwritten.
        lora: What LoRA adds, [T*K, H] bf16; None without.
        weights: Routing weights of the sorted rows, [T*K] fp32; None for rows that are not weighted any more.
        place: [T*K] integers: the sorted row of each unsorted one.
        ends: [E] int32, the row after each expert's last.
        K: Experts of a token.

    Returns:
        [T, H] bf16. Rows of no expert count as zero, whatever their memory holds.
    """
    T, H = len(place) // K, base.shape[1]
    out = base.new_empty(T, H)
    grid = T, triton.cdiv(H, _WIDE)
    with torch.cuda.device_of(base):
        _sum[grid](
            base, lora, weights, place, ends, len(ends) - 1, out, H, K=K, LORA=lora is not None,
            WEIGHTED=weights is not None, COLUMNS=_WIDE,
        )  # fmt: skip
    return out
