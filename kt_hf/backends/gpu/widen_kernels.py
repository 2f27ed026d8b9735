"""Triton kernels that widen low-bit weights in one pass; imported only where Triton is installed.

PyTorch alone needs several passes over wide copies: 0.06 T weights a second of 4 bits on an H100, where the bus brings
0.1 T; these run at the rate of the card's memory.

Floats of 8 bits are decoded by hand, because Triton has none before sm_89 (A100, 3090).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..packed import FOUR_BITS, NF4, PackedMatrices

_WORDS, _WARPS = 512, 4  # int32 words of 4-bit codes that one program widens
_TILE = 1024  # int32 words of 8-bit codes that one program widens: a row's first 512 at most, of several rows
_CODES = {"int4": 0, "e2m1": 1, "nf4": 2}


@triton.jit
def _e4m3(bits):  # type: ignore[no-untyped-def]
    """Bits of float8_e4m3fn, as int32 of 0 to 255, to fp32.

    Exponent and mantissa are moved to where fp16 has them, and 2^8 makes up for the other bias; of subnormals too,
    which fp16 has as well.
    """
    moved = (((bits & 128) << 8) | ((bits & 127) << 7)).to(tl.int16).to(tl.float16, bitcast=True)
    return tl.where((bits & 127) == 127, float("nan"), moved.to(tl.float32) * 256.0)


@triton.jit
def _widen4(  # type: ignore[no-untyped-def]
    words, scales, zeros, factors, table, out, count, part_words,
    CODE: tl.constexpr, SCALE: tl.constexpr, ZERO: tl.constexpr, FACTOR: tl.constexpr, GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Everything lies contiguous, so a flat index tells the group and the part; there are no rows here.

    CODE: of `_CODES`. SCALE: 0 floating, 1 E8M0, 2 E4M3. FACTOR: 0 none, 1 multiply, 2 divide. GROUP: int32 words, of
    eight weights, that share a scale.
    """
    word = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = word < count
    bits = tl.load(words + word, mask=inside, other=0, eviction_policy="evict_first")
    group = word // GROUP
    if SCALE == 0:
        scale = tl.load(scales + group, mask=inside, other=0.0).to(tl.float32)
    else:
        raw = tl.load(scales + group, mask=inside, other=1).to(tl.int32)
        if SCALE == 1:
            power = tl.where(raw == 255, 0x7FC00000, raw << 23)
            scale = tl.where(raw == 0, 0x00400000, power).to(tl.float32, bitcast=True)  # 0: a subnormal, 2^-127
        else:
            scale = _e4m3(raw)
    if FACTOR != 0:
        factor = tl.load(factors + word // part_words, mask=inside, other=1.0)
        scale = scale * factor if FACTOR == 1 else tl.div_rn(scale, factor)
    place = tl.arange(0, 8)
    code = (bits[:, None] >> (place * 4)[None, :]) & 15
    # A small integer as fp32 without a conversion: it is the mantissa of 2^23 + integer (0x4B000000).
    if CODE == 0:
        value = (code | 0x4B000000).to(tl.float32, bitcast=True)
        if ZERO:
            zero = tl.load(zeros + group, mask=inside, other=0).to(tl.int32) | 0x4B000000
            value = value - zero.to(tl.float32, bitcast=True)[:, None]
        else:
            value = value - 8388616.0
    elif CODE == 1:
        # As in `_e4m3`, in fp32: two bits of exponent, whose bias is 1, and one of mantissa; 0.5 is a subnormal.
        moved = (((code & 7) << 22) | ((code & 8) << 28)).to(tl.float32, bitcast=True)
        value = moved * 8.507059173023462e37  # 2^126
    else:
        value = tl.load(table + code)
    wide = (value * scale[:, None]).to(out.dtype.element_ty)
    # Written once and read once, by the product: neither should push other things out of the cache.
    tl.store(out + word[:, None] * 8 + place[None, :], wide, mask=inside[:, None], cache_modifier=".cs")


@triton.jit
def _widen8(  # type: ignore[no-untyped-def]
    words, scales, out, lines, rows, row_words, part_rows, R, C, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    FP8: tl.constexpr, PER: tl.constexpr, LINES: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """A tile of LINES rows, of all matrices one after the other, and of WORDS words of PER codes each.

    HEIGHT, WIDTH: rows and words of a block that shares a scale.
    """
    line = tl.program_id(0) * LINES + tl.arange(0, LINES)
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    inside = (line < lines)[:, None] & (word < row_words)[None, :]
    row = line % rows
    part = row // part_rows
    block = (line // rows * (rows // part_rows) + part) * R + (row - part * part_rows) // HEIGHT
    at = line.to(tl.int64)[:, None] * row_words + word[None, :]
    bits = tl.load(words + at, mask=inside, other=0, eviction_policy="evict_first").to(tl.int32)
    scale = tl.load(scales + block[:, None] * C + (word // WIDTH)[None, :], mask=inside, other=0.0)
    place = tl.arange(0, PER)
    if FP8:
        value = _e4m3((bits[:, :, None] >> (place * 8)[None, None, :]) & 255)
    else:  # the shift back brings the sign
        value = ((bits[:, :, None] << (24 - place * 8)[None, None, :]) >> 24).to(tl.float32)
    wide = (value * scale[:, :, None]).to(out.dtype.element_ty)
    tl.store(out + at[:, :, None] * PER + place[None, None, :], wide, mask=inside[:, :, None], cache_modifier=".cs")


def widened(matrices: PackedMatrices, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The weights of low-bit matrices: computed in fp32, rounded once.

    Args:
        matrices: Of any code, contiguous, on a GPU, 4-bit codes at a multiple of four bytes.
        dtype: bfloat16, float16 or float32.

    Returns:
        [n, rows, columns] on that GPU.
    """
    out = torch.empty(matrices.shape, dtype=dtype, device=matrices.codes.device)
    if out.numel():
        with torch.cuda.device_of(out):
            (_launch4 if matrices.code in FOUR_BITS else _launch8)(matrices, out)
    return out


def _launch4(matrices: PackedMatrices, out: Tensor) -> None:
    words, scales, factor = matrices.codes.view(-1).view(torch.int32), matrices.scales, matrices.factor
    kind = {torch.uint8: 1, torch.float8_e4m3fn: 2}.get(scales.dtype, 0)
    raw = scales.view(torch.uint8) if kind else scales
    table = _table(out.device)
    parts = 1 if factor is None else factor.numel()
    _widen4[triton.cdiv(words.numel(), _WORDS),](
        words, raw, raw if matrices.zeros is None else matrices.zeros, table if factor is None else factor, table, out,
        words.numel(), words.numel() // parts,
        CODE=_CODES[matrices.code], SCALE=kind, ZERO=matrices.zeros is not None,
        FACTOR=0 if factor is None else 2 if matrices.divide else 1,
        GROUP=matrices.group // 8, BLOCK=_WORDS, num_warps=_WARPS,
    )  # fmt: skip


def _launch8(matrices: PackedMatrices, out: Tensor) -> None:
    n, rows, columns = matrices.shape
    parts, R, C = matrices.scales.shape[1:]
    height, width = min(matrices.block[0], rows), min(matrices.block[1], columns)
    codes = matrices.codes.view(torch.int8).view(-1)
    per = 4 if columns % 4 == width % 4 == codes.data_ptr() % 4 == 0 else 1
    words, row_words = codes.view(torch.int32) if per == 4 else codes, columns // per
    across = min(_TILE // 2, triton.next_power_of_2(row_words))
    lines = _TILE // across
    _widen8[triton.cdiv(n * rows, lines), triton.cdiv(row_words, across)](
        words, matrices.scales, out, n * rows, rows, row_words, rows // parts, R, C, HEIGHT=height, WIDTH=width // per,
        FP8=matrices.code == "e4m3", PER=per, LINES=lines, WORDS=across, num_warps=_WARPS,
    )  # fmt: skip


_tables: dict[torch.device, Tensor] = {}


def _table(device: Any) -> Tensor:
    """NF4's values on a device."""
    if device not in _tables:
        _tables[device] = torch.tensor(NF4, device=device)
    return _tables[device]
