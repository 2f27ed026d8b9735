"""Formats of 4 bits whose rows are the weight's: compressed-tensors' integers, MXFP4 and NVFP4."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..backends.packed import PackedMatrices, nibbles
from ..discovery import FLOATING
from ..errors import KTAMXError
from .formats import E8M0, Format, Kind, Parts, Tensors

_BYTES = (torch.uint8, torch.int8)


@dataclass(frozen=True)
class PackedInt4(Format):
    """compressed-tensors' pack-quantized: int32 [N, K/8] of nibbles, the first column in the lowest; floating scales.

    Attributes:
        group: Columns that share a scale, -1 for whole rows; None if the configuration does not say.
        symmetric: Whether there are no zero-points; None if it does not say.
    """

    words: ClassVar[str] = "compressed-tensors' pack-quantized int4"
    group: int | None = None
    symmetric: bool | None = None

    @property
    def direct(self) -> Mapping[str, str]:
        """Codes and scales."""
        return {"weight_packed": "codes", "weight_scale": "scales"}

    @property
    def scales(self) -> Sequence[str]:
        """The scales."""
        return ("weight_scale",)

    @property
    def described(self) -> Sequence[str]:
        """The weight's shape."""
        return ("weight_shape",)

    def shape_of(self, parts: Parts) -> tuple[int, int]:
        """By the packed codes, of which there may be more columns than the weight has only if a row does not fill."""
        rows, columns = _two(self, parts, "weight_packed")
        return rows, columns * 8

    def kind(self, parts: Parts, shape: tuple[int, int]) -> Kind:
        """Also refuses act-order, and zero-points that are not as the configuration says."""
        rows, columns = shape
        self.part(parts, "weight_packed", (torch.int32,), (rows, -(-columns // 8)))
        if "weight_g_idx" in parts:
            raise KTAMXError(f"{parts['weight_g_idx']}: act-order mixes the columns of groups, which cannot be read.")
        scales = self.present(parts, "weight_scale")
        group = self.group_of(scales, columns, _two(self, parts, "weight_scale")[1], self.group)
        self.part(parts, "weight_scale", FLOATING, (rows, columns // group))
        zeros = "weight_zero_point" in parts if self.symmetric is None else not self.symmetric
        if zeros:
            self.part(parts, "weight_zero_point", (torch.int32,), (-(-rows // 8), columns // group))
        elif "weight_zero_point" in parts:
            raise KTAMXError(
                f"{parts['weight_zero_point']}: zero-points, but quantization_config says that weights are symmetric."
            )
        return Kind("int4", scales.dtype, group, zeros=zeros)

    def packed(self, tensors: Tensors, shape: tuple[int, int]) -> PackedMatrices:
        """The codes are a view of the stored ones."""
        zeros = None
        if "weight_zero_point" in tensors:  # packed along the rows
            by_eight = unpacked(tensors["weight_zero_point"]).transpose(1, 2)
            zeros = by_eight.flatten(0, 1)[None, : shape[0]].contiguous()
        codes = tensors["weight_packed"].view(torch.uint8)[None]
        return PackedMatrices("int4", codes, tensors["weight_scale"][None], zeros=zeros)

    def problem(self, tensors: Tensors, shape: tuple[int, int]) -> tuple[str, str] | None:
        """Also what `weight_shape` says."""
        stored = tensors.get("weight_shape")
        if stored is not None and stored.flatten().tolist() != list(shape):
            return "weight_shape", f"is {stored.flatten().tolist()}; by the model's config it is {list(shape)}"
        return super().problem(tensors, shape)


@dataclass(frozen=True)
class Mxfp4(Format):
    """MXFP4: a byte for two columns, the even one in the low nibble, and an E8M0 exponent for 32.

    DeepSeek-V4 has `weight` int8 and `scale`, compressed-tensors `weight_packed` and `weight_scale`.

    Attributes:
        codes: Name of the part with the codes, [N, K/2].
        exponents: Of that with the exponents, [N, K/32].
    """

    words: ClassVar[str] = "MXFP4"
    codes: str = "weight_packed"
    exponents: str = "weight_scale"

    @property
    def direct(self) -> Mapping[str, str]:
        """Both."""
        return {self.codes: "codes", self.exponents: "scales"}

    @property
    def scales(self) -> Sequence[str]:
        """The exponents."""
        return (self.exponents,)

    def shape_of(self, parts: Parts) -> tuple[int, int]:
        """By the codes."""
        rows, columns = _two(self, parts, self.codes)
        return rows, columns * 2

    def kind(self, parts: Parts, shape: tuple[int, int]) -> Kind:
        """Groups are of 32."""
        rows, columns = shape
        self.part(parts, self.codes, _BYTES, (rows, columns // 2))
        exponents = self.present(parts, self.exponents)
        self.group_of(exponents, columns, _two(self, parts, self.exponents)[1], 32)
        self.part(parts, self.exponents, (E8M0, torch.uint8), (rows, columns // 32))
        return Kind("e2m1", torch.uint8, 32)

    def packed(self, tensors: Tensors, shape: tuple[int, int]) -> PackedMatrices:
        """Views of the stored bytes."""
        codes, exponents = (tensors[name].view(torch.uint8)[None] for name in (self.codes, self.exponents))
        return PackedMatrices("e2m1", codes, exponents)


@dataclass(frozen=True)
class Mxfp4Blocks(Format):
    """gpt-oss's MXFP4: uint8 [N, K/32, 16] and exponents [N, K/32]; its gate and up have their rows in turns.

    Attributes:
        in_turns: Whether a row of the gate is followed by one of the up-projection; they are put apart.
    """

    words: ClassVar[str] = "gpt-oss's MXFP4 blocks"
    in_turns: bool = False

    @property
    def scales(self) -> Sequence[str]:
        """The exponents."""
        return ("scales",)

    @property
    def direct(self) -> Mapping[str, str]:
        """Both, if rows are in their order."""
        return {} if self.in_turns else {"blocks": "codes", "scales": "scales"}

    def shape_of(self, parts: Parts) -> tuple[int, int]:
        """By the exponents."""
        rows, columns = _two(self, parts, "scales")
        return rows, columns * 32

    def kind(self, parts: Parts, shape: tuple[int, int]) -> Kind:
        """Groups are of 32."""
        rows, columns = shape
        self.group_of(self.present(parts, "scales"), columns, _two(self, parts, "scales")[1], 32)
        self.part(parts, "blocks", (torch.uint8,), (rows, columns // 32, 16))
        self.part(parts, "scales", (torch.uint8, E8M0), (rows, columns // 32))
        return Kind("e2m1", torch.uint8, 32)

    def packed(self, tensors: Tensors, shape: tuple[int, int]) -> PackedMatrices:
        """The gate's rows before the up-projection's."""
        codes, exponents = tensors["blocks"].flatten(1)[None], tensors["scales"].view(torch.uint8)[None]
        if self.in_turns:
            codes, exponents = (torch.cat((t[:, 0::2], t[:, 1::2]), 1) for t in (codes, exponents))
        return PackedMatrices("e2m1", codes, exponents)


@dataclass(frozen=True)
class Nvfp4(Format):
    """NVFP4: a byte for two columns, an E4M3 scale for 16, and a factor fp32 for the matrix.

    modelopt has `weight`, `weight_scale` and `weight_scale_2`, which multiplies; compressed-tensors has
    `weight_packed`, `weight_scale` and `weight_global_scale`, which divides.

    Attributes:
        codes: Name of the part with the codes.
        factor: Of that with the factor.
        divide: Whether scales are divided by it.
    """

    words: ClassVar[str] = "NVFP4"
    codes: str = "weight_packed"
    factor: str = "weight_global_scale"
    divide: bool = True

    @property
    def direct(self) -> Mapping[str, str]:
        """Codes and scales."""
        return {self.codes: "codes", "weight_scale": "scales"}

    @property
    def scales(self) -> Sequence[str]:
        """The scales and the factor."""
        return "weight_scale", self.factor

    def shape_of(self, parts: Parts) -> tuple[int, int]:
        """By the codes."""
        rows, columns = _two(self, parts, self.codes)
        return rows, columns * 2

    def kind(self, parts: Parts, shape: tuple[int, int]) -> Kind:
        """Groups are of 16."""
        rows, columns = shape
        self.part(parts, self.codes, _BYTES, (rows, columns // 2))
        self.group_of(self.present(parts, "weight_scale"), columns, _two(self, parts, "weight_scale")[1], 16)
        self.part(parts, "weight_scale", (torch.float8_e4m3fn,), (rows, columns // 16))
        factor = self.present(parts, self.factor)
        self.part(parts, self.factor, (torch.float32,), factor.shape if factor.shape in ((), (1,), (1, 1)) else (1,))
        return Kind("e2m1", torch.float8_e4m3fn, 16, factor=True, divide=self.divide)

    def packed(self, tensors: Tensors, shape: tuple[int, int]) -> PackedMatrices:
        """Views of the stored bytes."""
        codes, factor = tensors[self.codes].view(torch.uint8)[None], tensors[self.factor].reshape(1, 1)
        return PackedMatrices("e2m1", codes, tensors["weight_scale"][None], factor=factor, divide=self.divide)

    def problem(self, tensors: Tensors, shape: tuple[int, int]) -> tuple[str, str] | None:
        """Also a factor of 0, by which cannot be divided."""
        if self.divide and self.factor in tensors and not tensors[self.factor].all():
            return self.factor, "is 0, and scales are divided by it"
        return super().problem(tensors, shape)


def unpacked(packed: torch.Tensor) -> torch.Tensor:
    """int32 [..., M] -> its nibbles, uint8 [..., M, 8], the lowest first."""
    return nibbles(packed.contiguous().view(torch.uint8).unflatten(-1, (-1, 4)))


def _two(form: Format, parts: Parts, name: str) -> tuple[int, int]:
    """The lengths of a part that must have two dimensions."""
    stored = form.present(parts, name)
    if len(stored.shape) != 2:
        raise KTAMXError(f"{stored} has the shape {list(stored.shape)}; {form.words} has rows and columns there.")
    return stored.shape[0], stored.shape[1]
