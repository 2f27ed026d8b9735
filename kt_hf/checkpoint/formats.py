"""How a checkpoint stores a weight in low bits: its parts, and the one layout that they are brought to.

A `Format` is one such way. A linear weight [rows, columns] of it has several tensors in the files, its *parts*, each
under a name of its own behind the layer's (`weight_packed`, `qweight`, `weight_scale` …). A format checks them by the
files' headers, and rearranges them into the layout of `backends.packed`. Weights of the same `Kind` can share a stack.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..backends.gpu.pinned_weights import own_pages
from ..backends.packed import FOUR_BITS, Code, PackedMatrices
from ..errors import KTAMXError
from .tensor_files import StoredTensor

Parts = Mapping[str, StoredTensor]
Tensors = Mapping[str, Tensor]
E8M0 = getattr(torch, "float8_e8m0fnu", torch.uint8)  # a byte, the exponent of a power of two
KNOWN = (
    "bfloat16, float16, float32, FP8 or INT8 with a scale for each block or row, or four bits as compressed-tensors, "
    "GPTQ, AWQ, MXFP4, NVFP4 or NF4 have them"
)


@dataclass(frozen=True)
class Kind:
    """What weights must have in common to be stacked: the fields of `PackedMatrices` but for its tensors.

    Attributes:
        code: What the codes mean.
        scales: Dtype of the scales as they are stacked.
        group: Of 4 bits: columns that share a scale.
        block: Of 8 bits: rows and columns that share a scale.
        zeros: Whether there are zero-points.
        factor: Whether the scales of a matrix have a factor.
        divide: Whether they are divided by it.
    """

    code: Code
    scales: torch.dtype
    group: int = 0
    block: tuple[int, int] = (1, 1)
    zeros: bool = False
    factor: bool = False
    divide: bool = False

    def allocate(self, n: int, rows: int, columns: int, parts: int = 1) -> PackedMatrices:
        """Memory of any values for n matrices.

        Args:
            n: Matrices.
            rows: Of one of them.
            columns: Likewise.
            parts: Weights of the checkpoint that lie one above the other in a matrix.
        """
        if self.code not in FOUR_BITS:
            over, along = scale_shape((rows // parts, columns), self.block)
            dtype = torch.int8 if self.code == "int8" else torch.float8_e4m3fn
            scales = torch.empty(n, parts, over, along, dtype=self.scales)
            return PackedMatrices(self.code, own_pages((n, rows, columns), dtype), scales, self.block)
        size = n, rows, columns // self.group
        return PackedMatrices(
            self.code,
            own_pages((n, rows, columns // 2), torch.uint8),
            torch.empty(size, dtype=self.scales),
            zeros=torch.empty(size, dtype=torch.uint8) if self.zeros else None,
            factor=torch.empty(n, parts) if self.factor else None,
            divide=self.divide,
        )

    def size(self, rows: int, columns: int) -> int:
        """Bytes of a matrix, its scales included."""
        if self.code not in FOUR_BITS:
            over, along = scale_shape((rows, columns), self.block)
            return rows * columns + over * along * self.scales.itemsize
        groups = rows * (columns // self.group)
        return rows * columns // 2 + groups * (self.scales.itemsize + self.zeros) + 4 * self.factor


@dataclass(frozen=True)
class Format(ABC):
    """One way to store a weight in low bits.

    Attributes:
        words: Its name in messages.
    """

    words: ClassVar[str]

    @property
    def direct(self) -> Mapping[str, str]:
        """Parts whose bytes are already those of a field of `PackedMatrices`: they are read to their place at once."""
        return {}

    @property
    def scales(self) -> Sequence[str]:
        """Parts whose values must be finite."""
        return ()

    @property
    def described(self) -> Sequence[str]:
        """Small parts that say how the weight is stored, which `problem` looks at."""
        return ()

    @abstractmethod
    def shape_of(self, parts: Parts) -> tuple[int, int]:
        """The weight's rows and columns, by its parts alone."""

    @abstractmethod
    def kind(self, parts: Parts, shape: tuple[int, int]) -> Kind:
        """Check the parts of a weight by their dtypes and shapes.

        Args:
            parts: By their names.
            shape: The weight's rows and columns.

        Raises:
            KTAMXError: A part is missing, or does not fit; naming file and tensor.
        """

    @abstractmethod
    def packed(self, tensors: Tensors, shape: tuple[int, int]) -> PackedMatrices:
        """A stack of the one weight.

        Args:
            tensors: Its parts; the result may share their memory.
            shape: Its rows and columns.
        """

    def problem(self, tensors: Tensors, shape: tuple[int, int]) -> tuple[str, str] | None:
        """What the values of the small parts say against reading the weight: (part, why); None if nothing."""
        for part in self.scales:
            if part in tensors and not finite(tensors[part]):
                return part, "has a scale that is not a finite number"
        return None

    def part(self, parts: Parts, name: str, dtypes: Sequence[torch.dtype], shape: Sequence[int]) -> StoredTensor:
        """A part that must be there, of one of these dtypes and in this shape (KTAMXError if it is not)."""
        stored = self.present(parts, name)
        if stored.dtype not in dtypes or list(stored.shape) != list(shape):
            raise KTAMXError(
                f"{stored} is of {stored.dtype} and has the shape {list(stored.shape)}; {self.words} has there "
                f"{' or '.join(str(dtype) for dtype in dtypes)} and {list(shape)}."
            )
        return stored

    def present(self, parts: Parts, name: str) -> StoredTensor:
        """A part that must be there (KTAMXError if it is not)."""
        if name not in parts:
            other, stored = next(iter(parts.items()))
            missing = stored.name.removesuffix(other) + name
            raise KTAMXError(f"{missing} is missing beside {stored}: it is a part of a weight in {self.words}.")
        return parts[name]

    def group_of(self, stored: StoredTensor, columns: int, count: int, group: int | None) -> int:
        """Columns that share a scale.

        Args:
            stored: The scales, for messages.
            columns: Of the weight.
            count: Scales of a row, as stored.
            group: As the configuration has it, -1 for whole rows; None if it says nothing.

        Raises:
            KTAMXError: Groups do not divide the row, or not into groups that can be computed.
        """
        size = columns // max(count, 1) if group is None else columns if group == -1 else group
        if size < 1 or columns % size or columns // size != count or size % 8:
            raise KTAMXError(
                f"{stored}: {count} scales for {columns} columns, in groups of {group or size}. Groups must be of 8 "
                f"columns or a multiple and divide the row ({self.words})."
            )
        return size


def scale_shape(shape: Sequence[int], block: tuple[int, int]) -> tuple[int, int]:
    """Shape of the scales of an 8-bit weight; blocks at the edges may be smaller.

    Args:
        shape: Of the weight, [rows, columns].
        block: Rows and columns that share a scale.
    """
    return -(-shape[-2] // block[0]), -(-shape[-1] // block[1])


def finite(scales: Tensor) -> bool:
    """Whether all are finite numbers; uint8 are exponents, of which 255 is none."""
    if scales.dtype in (torch.uint8, E8M0):
        return not bool((scales.view(torch.uint8) == 255).any())
    return bool(torch.isfinite(scales if scales.element_size() > 1 else scales.float()).all())


def get(config: Any, name: str, other: Any = None) -> Any:
    """A field of a configuration, which transformers leaves a mapping or makes an object of."""
    value = config.get(name, other) if isinstance(config, Mapping) else getattr(config, name, other)
    return getattr(value, "value", value)  # an enumeration's
