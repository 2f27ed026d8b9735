"""LoRA tensors as `torch_loop` multiplies them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# The B of gate and up are one block-diagonal matrix up to this rank: few rows take 20 µs whatever the size.
# Half of it are zeros, and from rank 64 on these take longer.
_ONE_B_TO_RANK = 32


class TorchLora(NamedTuple):
    """LoRA tensors as they are multiplied: gate's A above up's, and their B as one where that is faster.

    Without a gate there is up's alone, and what is 2I and 2r below is I and r.

    Attributes:
        a: [E, 2r, H].
        b: [E, 2I, 2r], block-diagonal; or gate's and up's, each [E, I, r].
        down_a: [E, r, I].
        down_b: [E, H, r].
    """

    a: Tensor
    b: tuple[Tensor, ...]
    down_a: Tensor
    down_b: Tensor

    @classmethod
    def of(cls, tensors: tuple[Tensor, ...]) -> TorchLora:
        """Copy the tensors that `set_lora` is given, of one dtype and device, to new ones."""
        *up, down_a, down_b = tensors
        a, b = up[::2], up[1::2]
        E, inner, r = b[0].shape
        if len(b) == 2 and r <= _ONE_B_TO_RANK:
            whole = b[0].new_zeros(E, 2 * inner, 2 * r)
            whole[:, :inner, :r], whole[:, inner:, r:] = b
            b = [whole]
        else:
            b = [one.clone() for one in b]
        return cls(torch.cat(a, 1), tuple(b), down_a.clone(), down_b.clone())

    @property
    def rank(self) -> int:
        """The LoRA rank r."""
        return self.down_a.shape[1]

    def projections(self) -> tuple[Tensor, ...]:
        """Views as the tensors of `set_lora`."""
        r, inner = self.rank, self.down_a.shape[2]
        pairs: list[Tensor] = []
        for i, a in enumerate(self.a.split(r, 1)):
            alone = len(self.b) > 1
            b = self.b[i] if alone else self.b[0][:, i * inner : (i + 1) * inner, i * r : (i + 1) * r]
            pairs += a, b
        return *pairs, self.down_a, self.down_b

    def through_b(self, e: int, xa: Tensor, out: Tensor) -> None:
        """Multiply `xa` [S, 2r] (x times both A) by the B of expert e: `out` [S, 2I]."""
        parts = len(self.b)
        for b, part, target in zip(self.b, xa.chunk(parts, 1), out.chunk(parts, 1), strict=True):
            torch.mm(part, b[e].t(), out=target)

    def through_b_of_each(self, chosen: Tensor, xa: Tensor) -> Tensor:
        """`through_b` of a row for each of the experts `chosen` [K]: `xa` is [K, 2r], the result [K, 2I]."""
        parts = xa.unsqueeze(1).chunk(len(self.b), 2)
        products = [
            torch.bmm(part, b.index_select(0, chosen).transpose(1, 2)) for b, part in zip(self.b, parts, strict=True)
        ]
        return torch.cat(products, 2).squeeze(1)

    def back_through_b(self, e: int, dgu: Tensor) -> Tensor:
        """Multiply the gradient of gate and up, [S, 2I], by both transposed B of expert e: [S, 2r]."""
        if len(self.b) == 1:
            return dgu @ self.b[0][e]
        return torch.cat([part @ b[e] for b, part in zip(self.b, dgu.chunk(2, 1), strict=True)], 1)

    def b_gradients(self, dgu: Tensor, xa: Tensor) -> tuple[Tensor, ...]:
        """The gradients of gate's and of up's B, each [I, r]."""
        inner, r = self.down_a.shape[2], self.rank
        if len(self.b) == 2:
            return tuple(d.t() @ part for d, part in zip(dgu.split(inner, 1), xa.split(r, 1), strict=True))
        both = dgu.t() @ xa  # off the diagonal it is of no use
        parts = dgu.shape[1] // inner
        return tuple(both[i * inner : (i + 1) * inner, i * r : (i + 1) * r] for i in range(parts))
