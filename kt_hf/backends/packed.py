"""Weights of 4 and 8 bits as they are stored, of any format, and what they are worth.

Five codes. A weight is the value of its code times a scale that it shares with its neighbours:

| code | stored as | value |
|---|---|---|
| int4 | a nibble | nibble - 8, or nibble - zero where there are zero-points |
| e2m1 | a nibble | one of 0 0.5 1 1.5 2 3 4 6, and their negatives: MXFP4 and NVFP4 |
| nf4 | a nibble | bitsandbytes' table, -1 to 1 |
| e4m3 | a byte | a float of 8 bits |
| int8 | a byte | an integer, -127 to 127 |

The arithmetic is one for all: scale (times or divided by the matrix's factor, if it has one) and product in fp32,
rounded once to the dtype that is asked for. This is what transformers, bitsandbytes, modelopt and torchao compute;
compressed-tensors, gptqmodel and AutoAWQ multiply in the scale's own dtype, which is the same where that is the dtype
asked for, because values are small and exact.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Code = Literal["int4", "e2m1", "nf4", "e4m3", "int8"]
CODES: tuple[str, ...] = get_args(Code)
FOUR_BITS = ("int4", "e2m1", "nf4")
# What 8-bit codes are stored as.
EIGHT_BIT = (torch.float8_e4m3fn, torch.int8)
# Values by nibble; the sign is the high bit.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_PIECE = 2**23  # weights that PyTorch widens at a time: it needs 16 bytes for each meanwhile


@dataclass
class PackedMatrices:
    """A stack of n matrices of low-bit weights, each [rows, columns]: rows are outputs, columns inputs.

    All tensors are contiguous, on one device, and have the matrices as their first dimension.

    Attributes:
        code: What the codes mean, one of `CODES`.
        codes: Of 4 bits uint8 [n, rows, columns / 2], the even column in the low nibble; of 8 bits [n, rows, columns],
            float8_e4m3fn or int8.
        scales: Of 4 bits [n, rows, columns / group]: bf16, fp16, fp32, float8_e4m3fn, or uint8, which is the exponent e
            of 2^(e-127) (E8M0). Of 8 bits fp32 [n, parts, R, C], a scale for each of R times C blocks of a part: a
            matrix is `parts` parts of equal height, one above the other, and blocks do not reach from one into the
            next. Gate and up of an expert are two parts where the checkpoint has them separately.
        block: Of 8 bits: rows and columns that share a scale; blocks at the edges may have fewer. Of 4 bits unused,
            for a group is whole and in one row.
        zeros: Of int4, the zero-points uint8 [n, rows, columns / group]; None if they are 8.
        factor: Of 4 bits, fp32 [n, parts], a factor of all scales of a part; None without.
        divide: Whether scales are divided by the factor, not multiplied.

    Raises:
        ValueError: Shapes or dtypes that do not go together.
    """

    code: Code
    codes: Tensor
    scales: Tensor
    block: tuple[int, int] = (1, 1)
    zeros: Tensor | None = None
    factor: Tensor | None = None
    divide: bool = False

    def __post_init__(self) -> None:
        if self.code not in FOUR_BITS:
            expected = torch.int8 if self.code == "int8" else torch.float8_e4m3fn
            if self.codes.dtype != expected or self.scales.dim() != 4:
                raise ValueError(f"{self.code}: codes of {self.codes.dtype}, scales {list(self.scales.shape)}")
            return
        n, rows, columns = self.shape
        groups = self.scales.shape[-1]
        if self.codes.dtype != torch.uint8 or self.scales.shape != (n, rows, groups) or columns % groups:
            raise ValueError(f"{self.code}: codes {self.codes.dtype} {n, rows, columns}, scales {self.scales.shape}")
        if self.group % 8:
            raise ValueError(f"{self.code}: groups of {self.group}; eight weights share a scale at least")
        if self.zeros is not None and (self.code != "int4" or self.zeros.shape != self.scales.shape):
            raise ValueError(f"{self.code}: zero-points {list(self.zeros.shape)}, scales {list(self.scales.shape)}")
        if self.factor is not None and (self.factor.dim() != 2 or self.factor.dtype != torch.float32):
            raise ValueError(f"{self.code}: a factor of {self.factor.dtype} {list(self.factor.shape)}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(n, rows, columns) of the weights."""
        n, rows, columns = self.codes.shape
        return n, rows, columns * 2 if self.code in FOUR_BITS else columns

    @property
    def group(self) -> int:
        """Of 4 bits, weights of a row that share a scale."""
        return self.shape[2] // self.scales.shape[-1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What is stored: codes, scales, and zeros and factor where there are any; each [n, ...]."""
        return tuple(t for t in (self.codes, self.scales, self.zeros, self.factor) if t is not None)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is stored."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def bits(self) -> float:
        """Bits of a weight as stored, its part of the scales included; at least one matrix is needed."""
        n, rows, columns = self.shape
        return 8 * self.nbytes / (n * rows * columns)

    def with_tensors(self, tensors: Sequence[Tensor]) -> PackedMatrices:
        """The same format around other tensors: those of some of the matrices, or copies of them.

        Args:
            tensors: In the order of `tensors`.
        """
        codes, scales, *more = tensors
        zeros = more.pop(0) if self.zeros is not None else None
        factor = more.pop(0) if self.factor is not None else None
        return replace(self, codes=codes, scales=scales, zeros=zeros, factor=factor)

    def select(self, matrices: Sequence[int]) -> PackedMatrices:
        """Some of the matrices, copied."""
        index = torch.tensor(list(matrices), dtype=torch.int64, device=self.codes.device)
        return self.with_tensors(picked(self.tensors, index))

    def to(self, device: torch.device) -> PackedMatrices:
        """The same on another device."""
        return self.with_tensors([tensor.to(device) for tensor in self.tensors])

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weights [n, rows, columns] in a floating dtype: computed in fp32, rounded once."""
        if self.codes.is_cuda and dtype == torch.bfloat16:
            weights = _by_kernel(self)
            if weights is not None:
                return weights
        n, rows, columns = self.shape
        out = torch.empty(n, rows, columns, dtype=dtype, device=self.codes.device)
        step = max(1, _PIECE // max(1, rows * columns))
        for first in range(0, n, step):
            some = slice(first, first + step)
            self.with_tensors([tensor[some] for tensor in self.tensors])._widen_to(out[some])
        return out

    def _widen_to(self, out: Tensor) -> None:
        """The weights, by PyTorch, to `out` [n, rows, columns]."""
        if self.code not in FOUR_BITS:
            out.copy_(self.codes)  # exactly, even in bf16
            scale_(out.view(*self.scales.shape[:2], -1, out.shape[-1]), self.scales, self.block)
            return
        scales = _float_scales(self.scales)
        if self.factor is not None:
            n, parts = self.factor.shape
            by_part, factor = scales.view(n, parts, -1), self.factor[..., None]
            scales = (by_part / factor if self.divide else by_part * factor).view(scales.shape)
        values = _values(self.code, nibbles(self.codes)).unflatten(-1, (-1, self.group))
        if self.zeros is not None:
            values += 8 - self.zeros.float()[..., None]  # exact: small integers
        out.copy_((values * scales[..., None]).flatten(-2))

    def row(self, matrix: int, row: int, dtype: torch.dtype) -> Tensor:
        """Row `row` of `dequantized(dtype)[matrix]`: [columns]."""
        one = self.with_tensors([tensor[matrix : matrix + 1] for tensor in self.tensors])
        rows, codes = self.codes.shape[1], one.codes[:, row : row + 1]
        out = torch.empty(1, 1, self.shape[2], dtype=dtype, device=codes.device)
        if self.code in FOUR_BITS:
            at = slice(row, row + 1)
            zeros = None if one.zeros is None else one.zeros[:, at]
            part = 0 if one.factor is None else row // (rows // one.factor.shape[1])
            factor = None if one.factor is None else one.factor[:, part : part + 1]
            replace(one, codes=codes, scales=one.scales[:, at], zeros=zeros, factor=factor)._widen_to(out)
        else:
            part, below = divmod(row, rows // one.scales.shape[1])
            at = slice(below // self.block[0], below // self.block[0] + 1)
            scales = one.scales[:, part : part + 1, at]
            replace(one, codes=codes, scales=scales, block=(1, self.block[1]))._widen_to(out)
        return out[0, 0]


@dataclass
class PackedExperts:
    """The low-bit weights of n experts of a layer.

    Attributes:
        experts: Their ids, ascending.
        gate_up: Their gate and up projections, [n, 2I, H]: the gate's rows before the up-projection's.
        down: Their down projections, [n, H, I].
    """

    experts: Sequence[int]
    gate_up: PackedMatrices
    down: PackedMatrices

    @property
    def bits(self) -> float:
        """Bits of a weight as stored, scales included."""
        weights = sum(torch.Size(part.shape).numel() for part in (self.gate_up, self.down))
        return 8 * (self.gate_up.nbytes + self.down.nbytes) / weights

    def select(self, experts: Sequence[int]) -> PackedExperts:
        """Some of them by their ids, ascending; all of them are not copied."""
        if list(experts) == list(self.experts):
            return self
        at = [list(self.experts).index(e) for e in experts]
        return PackedExperts(list(experts), self.gate_up.select(at), self.down.select(at))


def picked(tensors: Sequence[Tensor], index: Tensor) -> list[Tensor]:
    """The same rows of several tensors, copied.

    Args:
        tensors: Each [n, ...], of any dtype, on one device.
        index: Numbers of the rows, integers on that device.
    """
    raw = [t.view(torch.uint8) if t.element_size() == 1 else t for t in tensors]  # FP8 cannot be indexed
    return [part.index_select(0, index).view(t.dtype) for part, t in zip(raw, tensors, strict=True)]


def nibbles(codes: Tensor) -> Tensor:
    """uint8 [..., B] -> its nibbles, uint8 [..., 2B], the low one first."""
    return torch.stack((codes & 15, codes >> 4), -1).flatten(-2)


def join_nibbles(values: Tensor) -> Tensor:
    """The inverse: uint8 [..., 2B] of 0 to 15 -> uint8 [..., B]."""
    return values[..., 0::2] | (values[..., 1::2] << 4)


def power_of_two(exponents: Tensor) -> Tensor:
    """uint8 exponents e (E8M0) to fp32 2^(e-127); 255 is NaN."""
    powers = torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents.to(torch.int32) - 127)
    return powers.masked_fill(exponents == 255, torch.nan)


def _float_scales(scales: Tensor) -> Tensor:
    return power_of_two(scales) if scales.dtype == torch.uint8 else scales.float()


def _values(code: str, codes: Tensor) -> Tensor:
    """What nibbles are worth, fp32; a new tensor."""
    if code == "int4":
        return codes.float().sub_(8)
    table = torch.tensor(E2M1 if code == "e2m1" else NF4, device=codes.device)
    return table.index_select(0, codes.flatten().int()).view(codes.shape)


# Whether Triton builds the kernel, for each code, dtype of scales and device that it was tried on.
_kernel_runs: dict[tuple[object, ...], bool] = {}


def _by_kernel(matrices: PackedMatrices) -> Tensor | None:
    """The weights in bf16, by Triton's kernel; None where it cannot be built."""
    kind = matrices.code, matrices.scales.dtype, matrices.codes.device
    if _kernel_runs.get(kind) is False:
        return None
    try:
        from .gpu.widen_kernels import widened

        weights = widened(matrices)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no Triton, no compiler: what is raised then is not documented
        if kind in _kernel_runs:  # it was built: this is something else, memory that ran out for instance
            raise
        logger.info("kt_hf: PyTorch widens %s, for Triton's kernel does not run here: %s", matrices.code, error)
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
