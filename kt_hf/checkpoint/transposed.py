"""Formats of 4 bits that are stored [columns, rows], the weight transposed: GPTQ and AWQ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..backends.packed import PackedMatrices, join_nibbles
from ..discovery import FLOATING
from .formats import Format, Kind, Parts, Tensors
from .four_bit import unpacked

# AutoAWQ writes eight neighbours 0 2 4 6 1 3 5 7 into the nibbles of an int32: column i is in nibble _AWQ[i].
_AWQ = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])


@dataclass(frozen=True)
class Gptq(Format):
    """GPTQ: qweight int32 [K/8, N] packed along K, qzeros int32 [K/g, N/8] along N, scales [K/g, N].

    Attributes:
        group: Columns that share a scale, -1 for whole rows; None if the configuration does not say.
        version: 1 stores each zero-point less 1, 2 the zero-point.
        act_order: Whether columns may be out of the order of their groups, which g_idx tells then.
    """

    words: ClassVar[str] = "GPTQ of 4 bits"
    group: int | None = None
    version: int = 1
    act_order: bool = False

    @property
    def scales(self) -> Sequence[str]:
        """The scales."""
        return ("scales",)

    @property
    def described(self) -> Sequence[str]:
        """Which group each column is of."""
        return ("g_idx",)

    def shape_of(self, parts: Parts) -> tuple[int, int]:
        """By the codes."""
        stored = self.present(parts, "qweight")
        rows, columns = (*stored.shape, 0, 0)[1], (*stored.shape, 0)[0] * 8
        self.part(parts, "qweight", (torch.int32,), (columns // 8, rows))
        return rows, columns

    def kind(self, parts: Parts, shape: tuple[int, int]) -> Kind:
        """Whether columns are in the order of their groups is seen from the values of g_idx."""
        rows, columns = shape
        self.part(parts, "qweight", (torch.int32,), (columns // 8, rows))
        if self.act_order or "g_idx" in parts:
            self.part(parts, "g_idx", (torch.int32, torch.int64), (columns,))
        return _kind(self, parts, shape, self.group)

    def packed(self, tensors: Tensors, shape: tuple[int, int]) -> PackedMatrices:
        """Transposed copies; the four bytes of an int32 are eight columns of a row, as they are to be."""
        zeros = unpacked(tensors["qzeros"]).flatten(1)
        if self.version == 1:
            zeros = (zeros + 1) & 15
        by_four = tensors["qweight"].view(torch.uint8).unflatten(1, (-1, 4))  # [K/8, N, 4]
        return _stack(by_four.transpose(0, 1).flatten(1), tensors["scales"], zeros)

    def problem(self, tensors: Tensors, shape: tuple[int, int]) -> tuple[str, str] | None:
        """Also columns that are not in the order of their groups."""
        order, columns = tensors.get("g_idx"), shape[1]
        if order is not None:
            changes = int((order[1:] != order[:-1]).sum()) + 1
            group = columns // changes
            if not torch.equal(order.long(), torch.arange(columns) // group) or self.group not in (None, -1, group):
                return "g_idx", "is act-order (desc_act): it mixes the columns of groups, which cannot be read"
        return super().problem(tensors, shape)


@dataclass(frozen=True)
class Awq(Format):
    """AWQ's "gemm": qweight int32 [K, N/8] packed along N in AutoAWQ's order, qzeros int32 [K/g, N/8] likewise, scales.

    Attributes:
        group: Columns that share a scale, -1 for whole rows; None if the configuration does not say.
    """

    words: ClassVar[str] = "AWQ of 4 bits"
    group: int | None = None

    @property
    def scales(self) -> Sequence[str]:
        """The scales."""
        return ("scales",)

    def shape_of(self, parts: Parts) -> tuple[int, int]:
        """By the codes."""
        stored = self.present(parts, "qweight")
        rows, columns = (*stored.shape, 0, 0)[1] * 8, (*stored.shape, 0)[0]
        self.part(parts, "qweight", (torch.int32,), (columns, rows // 8))
        return rows, columns

    def kind(self, parts: Parts, shape: tuple[int, int]) -> Kind:
        """Rows are eight to an int32."""
        rows, columns = shape
        self.part(parts, "qweight", (torch.int32,), (columns, -(-rows // 8)))
        return _kind(self, parts, shape, self.group)

    def packed(self, tensors: Tensors, shape: tuple[int, int]) -> PackedMatrices:
        """Transposed copies."""
        codes, zeros = (unpacked(tensors[name])[..., _AWQ].flatten(1) for name in ("qweight", "qzeros"))
        return _stack(join_nibbles(codes[:, : shape[0]].T.contiguous()), tensors["scales"], zeros)


def _kind(form: Format, parts: Parts, shape: tuple[int, int], group: int | None) -> Kind:
    """Check scales and zero-points, which both have in common."""
    rows, columns = shape
    scales = form.present(parts, "scales")
    group = form.group_of(scales, columns, scales.shape[0] if scales.shape else 0, group)
    form.part(parts, "scales", FLOATING, (columns // group, rows))
    form.part(parts, "qzeros", (torch.int32,), (columns // group, -(-rows // 8)))
    return Kind("int4", scales.dtype, group, zeros=True)


def _stack(codes: Tensor, scales: Tensor, zeros: Tensor) -> PackedMatrices:
    """Codes [N, K/2] with scales [K/g, N] and zero-points [K/g, N or more], as a stack of one."""
    zeros = zeros[:, : len(codes)].T.contiguous()[None]
    return PackedMatrices("int4", codes[None], scales.T.contiguous()[None], zeros=zeros)
