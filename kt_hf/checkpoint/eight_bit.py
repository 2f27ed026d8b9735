"""Block-scaled 8-bit weights in checkpoints: FP8 or INT8, each block of rows and columns with a scale.

Known are DeepSeek-V3's block-wise FP8 and the same of INT8 (`weight_scale_inv`, blocks by the configuration),
DeepSeek-V4's (`scale`, of powers of two), one scale a row (`weight_scale`, of compressed-tensors and of w8a8_int8), and
one for the whole weight (of modelopt's FP8). A weight is its value times its block's scale.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..backends.packed import EIGHT_BIT, PackedMatrices
from ..discovery import FLOATING
from ..errors import KTAMXConfigError, KTAMXError
from .formats import E8M0, Format, Kind, Parts, Tensors, scale_shape

# What the scales of an 8-bit weight are called.
SCALES = ("weight_scale_inv", "weight_scale", "scale")
DEFAULT_BLOCK = (128, 128)
A_ROW = (1, sys.maxsize)
WHOLE = (sys.maxsize, sys.maxsize)


@dataclass(frozen=True)
class EightBit(Format):
    """8 bits with a scale for each block.

    Attributes:
        block: Rows and columns that share a scale.
        name: Of the part with the scales.
    """

    words: ClassVar[str] = "8 bits"
    block: tuple[int, int] = DEFAULT_BLOCK
    name: str = SCALES[0]

    @property
    def direct(self) -> Mapping[str, str]:
        """The values."""
        return {"weight": "codes"}

    @property
    def scales(self) -> Sequence[str]:
        """The scales."""
        return (self.name,)

    def shape_of(self, parts: Parts) -> tuple[int, int]:
        """That of the values."""
        weight = self.present(parts, "weight")
        if len(weight.shape) != 2:
            raise KTAMXError(f"{weight} is of {weight.dtype} and has the shape {list(weight.shape)}: no matrix.")
        return weight.shape[0], weight.shape[1]

    def kind(self, parts: Parts, shape: tuple[int, int]) -> Kind:
        """Scales become fp32."""
        weight, scales = self.present(parts, "weight"), parts.get(self.name)
        if weight.dtype not in EIGHT_BIT:
            raise KTAMXError(f"{weight} is of {weight.dtype}, but has scales in {scales}; they belong to FP8 or INT8.")
        if scales is None:
            head = weight.name.removesuffix("weight")
            names = " or ".join(head + tail for tail in SCALES[:2])
            raise KTAMXError(f"{weight} is of {weight.dtype}, but its scales, {names}, are missing.")
        if weight.shape != shape:
            raise KTAMXError(f"{weight} has the shape {list(weight.shape)}; by the model's config it is {list(shape)}.")
        expected = scale_shape(shape, self.block)
        whole = expected == (1, 1) and scales.shape in ((), (1,))
        if not (scales.shape == expected or whole) or scales.dtype not in (*FLOATING, E8M0):
            raise KTAMXError(
                f"{scales} is of {scales.dtype} and has the shape {list(scales.shape)}; for a weight of the shape "
                f"{list(weight.shape)} and {_block_words(self.block)} it is floating and {list(expected)}."
            )
        code = "int8" if weight.dtype == torch.int8 else "e4m3"
        return Kind(code, torch.float32, block=self.block)  # type: ignore[arg-type]

    def packed(self, tensors: Tensors, shape: tuple[int, int]) -> PackedMatrices:
        """The values are those stored."""
        values, scales = tensors["weight"], tensors[self.name].float()
        code = "int8" if values.dtype == torch.int8 else "e4m3"
        scales = scales.reshape(1, 1, *scale_shape(shape, self.block))
        return PackedMatrices(code, values[None], scales, self.block)  # type: ignore[arg-type]


def eight_bit(parts: Parts, block: tuple[int, int]) -> EightBit:
    """The format of an 8-bit weight, by the name that its scales have."""
    return EightBit(block, next((name for name in SCALES if name in parts), SCALES[0]))


def block_of(name: str, block: Any) -> tuple[int, int]:
    """A block's rows and columns, as a configuration's field `name` has them (KTAMXConfigError if it is none)."""
    if not isinstance(block, (list, tuple)) or len(block) != 2 or not all(isinstance(n, int) and n > 0 for n in block):
        raise KTAMXConfigError(f"quantization_config: {name}={block!r} is not two numbers, of rows and columns.")
    return int(block[0]), int(block[1])


def _block_words(block: tuple[int, int]) -> str:
    if block == WHOLE:
        return "one scale"
    return "a scale for each row" if block == A_ROW else f"blocks of {block[0]} × {block[1]}"
