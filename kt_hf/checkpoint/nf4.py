"""bitsandbytes' NF4: the bytes of the flattened weight, and an absmax for each block of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..backends.packed import NF4, PackedMatrices
from ..errors import KTAMXError
from ..system.json_fields import Field, parse_json
from .formats import Format, Kind, Parts, Tensors
from .tensor_files import StoredTensor

STATE = "weight.quant_state.bitsandbytes__nf4"


@dataclass(frozen=True)
class Nf4(Format):
    """bitsandbytes' NF4: `weight` uint8 [NK/2, 1], the even column in the HIGH nibble, `weight.absmax` for each block.

    Attributes:
        rows: Of the weight.
        columns: Of the weight.
        block: Weights that share an absmax.
        nested: Absmax that share one themselves, which are uint8 then; 0 if they are fp32.
        offset: That is added to nested ones.
    """

    words: ClassVar[str] = "bitsandbytes' NF4"
    rows: int
    columns: int
    block: int
    nested: int = 0
    offset: float = 0.0

    @property
    def scales(self) -> Sequence[str]:
        """The absmax that are floating."""
        return ("weight.nested_absmax", "weight.nested_quant_map") if self.nested else ("weight.absmax",)

    @property
    def described(self) -> Sequence[str]:
        """The values of the sixteen codes, and the state."""
        return "weight.quant_map", STATE

    def shape_of(self, parts: Parts) -> tuple[int, int]:
        """By the state that is saved with the weight."""
        return self.rows, self.columns

    def kind(self, parts: Parts, shape: tuple[int, int]) -> Kind:
        """Blocks must be of whole rows' parts."""
        rows, columns = shape
        state = self.present(parts, STATE)
        if (self.rows, self.columns) != shape:
            raise KTAMXError(
                f"{state} is of a weight of the shape {[self.rows, self.columns]}; by the model's config it is "
                f"{list(shape)}."
            )
        absmax = self.present(parts, "weight.absmax")
        self.group_of(absmax, columns, columns // max(self.block, 1), self.block)
        count = rows * columns // self.block
        stored = self.present(parts, "weight").shape
        flat = (rows * columns // 2,)
        self.part(parts, "weight", (torch.uint8,), flat if len(stored) == 1 else (*flat, 1))
        self.part(parts, "weight.quant_map", (torch.float32,), (16,))
        self.part(parts, "weight.absmax", (torch.uint8 if self.nested else torch.float32,), (count,))
        if self.nested:
            self.part(parts, "weight.nested_absmax", (torch.float32,), (-(-count // self.nested),))
            self.part(parts, "weight.nested_quant_map", (torch.float32,), (256,))
        return Kind("nf4", torch.float32, self.block)

    def packed(self, tensors: Tensors, shape: tuple[int, int]) -> PackedMatrices:
        """Copies with their nibbles the other way round, and absmax as they are used."""
        stored, absmax = tensors["weight"].view(shape[0], -1), tensors["weight.absmax"]
        if self.nested:
            values = tensors["weight.nested_quant_map"][absmax.int()]
            by_block = tensors["weight.nested_absmax"].repeat_interleave(self.nested)[: len(values)]
            absmax = values * by_block + self.offset
        return PackedMatrices("nf4", ((stored >> 4) | (stored << 4))[None], absmax.view(1, shape[0], -1))

    def problem(self, tensors: Tensors, shape: tuple[int, int]) -> tuple[str, str] | None:
        """Also a table of other values than NF4's."""
        table = tensors.get("weight.quant_map")
        if table is not None and not torch.equal(table, torch.tensor(NF4)):
            return "weight.quant_map", "has other values than those of NF4"
        return super().problem(tensors, shape)


def nf4_format(parts: Parts) -> Nf4:
    """The format of a weight, by the state that is saved with it, some hundred bytes of JSON.

    Args:
        parts: Of the weight.

    Raises:
        KTAMXError: The state is missing, or is not NF4's.
    """
    state = _state(parts)
    try:
        values = Field(state.file, state.name, parse_json(bytes(state.load().tolist()))).object()
    except ValueError:
        raise KTAMXError(f"{state} is no JSON.") from None
    kind = values["quant_type"].text()
    shape = [length.integer(least=1) for length in values["shape"].entries()]
    if kind != "nf4" or len(shape) != 2:
        raise KTAMXError(f"{state} is of quant_type {kind!r} and the shape {shape}; NF4 matrices alone can be read.")
    nested = values["nested_blocksize"].integer(least=1) if "nested_blocksize" in values else 0
    offset = float(values["nested_offset"].number()) if nested else 0.0
    return Nf4(shape[0], shape[1], values["blocksize"].integer(least=1), nested, offset)


def _state(parts: Parts) -> StoredTensor:
    first = next(iter(parts.values()))
    other = next((name for name in parts if "quant_state" in name and name != STATE), None)
    if other is not None:
        raise KTAMXError(f"{parts[other]}: of bitsandbytes' kinds NF4 alone can be read, not {other.rsplit('__')[-1]}.")
    if STATE not in parts:
        raise KTAMXError(f"{first}: its {STATE} is missing, without which bitsandbytes' weights cannot be read.")
    if parts[STATE].dtype != torch.uint8 or len(parts[STATE].shape) != 1 or parts[STATE].size > 10_000:
        raise KTAMXError(f"{parts[STATE]} is of {parts[STATE].dtype} {list(parts[STATE].shape)}: no text in bytes.")
    return parts[STATE]
