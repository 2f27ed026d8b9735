"""The mathematics of `backends/torch_loop.py` over rows sorted by expert, in bf16, by grouped matrix products alone.

No function of this module waits for a GPU. All T*K rows are kept (`rows.py`), and a grouped product gets the row where
each expert's rows end: `torch._grouped_mm` where that is fast, else a kernel of this package (`kernels.py` decides).

The LoRA of gate and up is one: A of gate above that of up, [E, 2r, H], B block-diagonal, [E, 2I, 2r]. Ranks are padded
to multiples of 8, for `_grouped_mm` wants strides of 16 bytes. Experts without a gate have up's alone: what is 2I and
2r here is I and r then.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import KTAMXConfigError
from ...shapes import ExpertShape
from ..transfer import to_device
from . import kernels
from .row_room import RowRoom
from .rows import PLAINLY, Addends, Gating, Rows

ALIGN = 8  # elements of 16 bits in 16 bytes
DTYPE = torch.bfloat16


class Lora(NamedTuple):
    """LoRA tensors in bf16 as they are multiplied, or gradients of these: the rank is padded to p.

    Attributes:
        a: A of gate above A of up, [E, 2p, H].
        b: B of gate and of up, block-diagonal, [E, 2I, 2p].
        down_a: [E, p, I].
        down_b: [E, H, p].
        rank: The rank before padding.
    """

    a: Tensor
    b: Tensor
    down_a: Tensor
    down_b: Tensor
    rank: int

    @classmethod
    def of(cls, tensors: tuple[Tensor, ...], shape: ExpertShape, device: torch.device) -> Lora:
        """Copy the tensors that `set_lora` is given, of any dtype and device, to new tensors on `device`."""
        E, H, I = shape.num_experts, shape.hidden_size, shape.intermediate_size  # noqa: E741
        # Those on the device are rounded by the copies below.
        there = (t.detach() if t.device == device else to_device(t.detach(), device, DTYPE) for t in tensors)
        *up, down_a, down_b = there
        halves, r = len(up) // 2, down_a.shape[1]
        p = -(-r // ALIGN) * ALIGN
        new = torch.empty if p == r else torch.zeros
        a = new(E, halves * p, H, dtype=DTYPE, device=device)
        wide_a, wide_b = (new(size, dtype=DTYPE, device=device) for size in ((E, p, I), (E, H, p)))
        b = torch.zeros(E, halves * I, halves * p, dtype=DTYPE, device=device)  # block-diagonal
        for i, (one_a, one_b) in enumerate(zip(up[::2], up[1::2], strict=True)):
            a[:, i * p : i * p + r].copy_(one_a)
            b[:, i * I : (i + 1) * I, i * p : i * p + r].copy_(one_b)
        wide_a[:, :r].copy_(down_a)
        wide_b[:, :, :r].copy_(down_b)
        return cls(a, b, wide_a, wide_b, r)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The four tensors, without the rank."""
        return self.a, self.b, self.down_a, self.down_b

    def part(self, experts: slice) -> Lora:
        """Views of consecutive experts."""
        return Lora(self.a[experts], self.b[experts], self.down_a[experts], self.down_b[experts], self.rank)

    def chosen(self, experts: Tensor) -> Lora:
        """Copies of some experts' tensors, whose numbers are integers [n] on the device."""
        a, b, down_a, down_b = (t.index_select(0, experts) for t in self.tensors)
        return Lora(a, b, down_a, down_b, self.rank)

    def zeros(self) -> Lora:
        """New tensors of zeros, of the same sizes."""
        a, b, down_a, down_b = (torch.zeros_like(t) for t in self.tensors)
        return Lora(a, b, down_a, down_b, self.rank)

    def projections(self) -> tuple[Tensor, ...]:
        """Views as the tensors of `set_lora`, of the rank before padding."""
        a, b, down_a, down_b, r = self
        I, p = down_a.shape[2], down_a.shape[1]  # noqa: E741
        pairs: list[Tensor] = []
        for i in range(a.shape[1] // p):
            ranks = slice(i * p, i * p + r)
            pairs += a[:, ranks], b[:, i * I : (i + 1) * I, ranks]
        return *pairs, down_a[:, :r], down_b[:, :, :r]


class RowGradients(NamedTuple):
    """The result of `gradients`.

    Attributes:
        x: Gradients of the rows' hidden states, [S, H] bf16.
        weights: Gradients of the rows' routing weights, [S] fp32.
        lora: Gradients of the LoRA tensors, bf16; None without LoRA.
    """

    x: Addends
    weights: Tensor
    lora: Lora | None


def outputs(
    x: Tensor, gate_up: Tensor, down: Tensor, lora: Lora | None, rows: Rows, gating: Gating = PLAINLY
) -> Addends:
    """Compute each row by its expert; the routing weights are for whoever sums the rows.

    Args:
        x: The tokens' hidden states, [T, H] bf16.
        gate_up: [E, 2I, H] bf16.
        down: [E, H, I] bf16.
        lora: LoRA of these experts; None without.
        rows: The rows' tokens, experts and weights.
        gating: The layer's gate, and its experts' biases.

    Returns:
        [S, H] bf16; undefined for rows of no expert.
    """
    return outputs_of_rows(rows.of_tokens(x), gate_up, down, lora, rows, gating)


def outputs_of_rows(
    x: Tensor, gate_up: Tensor, down: Tensor, lora: Lora | None, rows: Rows, gating: Gating = PLAINLY
) -> Addends:
    """`outputs`, of hidden states that are the rows' already, [S, H] bf16."""
    gu, _ = _up(x, gate_up, lora, rows)
    h = rows.gated(gu, gating)
    del gu
    y = _product(h, down.transpose(1, 2), rows)
    if lora is None:
        return Addends(y, None)
    inner = _product(h, lora.down_a.transpose(1, 2), rows)
    return Addends(y, _product(inner, lora.down_b.transpose(1, 2), rows))


def gradients(
    x: Tensor,
    grad_output: Tensor,
    gate_up: Tensor,
    down: Tensor,
    lora: Lora | None,
    rows: Rows,
    gating: Gating = PLAINLY,
) -> RowGradients:
    """Gradients of each row's hidden state, of its routing weight and of the LoRA.

    The forward is computed again from its inputs: a product more (0.3 ms a DeepSeek-V2-Lite layer on an H200) is
    cheaper than 6I + 2H bytes of GPU memory for each row of every layer.

    Args:
        x: The tokens' hidden states, [T, H] bf16.
        grad_output: The gradient of each token's output, [T, H] bf16.
        gate_up: [E, 2I, H] bf16.
        down: [E, H, I] bf16.
        lora: LoRA of these experts; None without.
        rows: The rows' tokens, experts and weights.
        gating: The layer's gate, and its experts' biases.

    Returns:
        The gradients; those of rows of no expert are undefined.
    """
    x, d = rows.of_tokens(x), rows.of_tokens(grad_output)
    gu, xa = _up(x, gate_up, lora, rows)
    if lora is None:
        q = _product(d, down, rows)
        by_row = rows.gate_gradients_(gu, Addends(q, None), gating)
        return RowGradients(Addends(_product(gu.base, gate_up, rows), None), by_row, None)
    through = _product(d, lora.down_b, rows)
    q = _product(d, down, rows)
    by_row = rows.gate_gradients_(gu, Addends(q, _product(through, lora.down_a, rows)), gating)
    dgu, h = gu.base, q  # what their memory holds now: h with its routing weight, as both gradients want it
    del gu, q
    grad_down_a = _outer(through, h, rows)
    grad_down_b = _outer(d, _product(h, lora.down_a.transpose(1, 2), rows), rows)
    da = _product(dgu, lora.b, rows)
    grad_lora = Lora(_outer(da, x, rows), _outer(dgu, xa, rows), grad_down_a, grad_down_b, lora.rank)
    del x, d, h  # gigabytes, of long batches
    return RowGradients(Addends(_product(dgu, gate_up, rows), _product(da, lora.a, rows)), by_row, grad_lora)


def _up(x: Tensor, gate_up: Tensor, lora: Lora | None, rows: Rows) -> tuple[Addends, Tensor]:
    """Gate and up before the activation, [S, 2I], and x multiplied by both A, [S, 2p]."""
    gu = _product(x, gate_up.transpose(1, 2), rows)
    if lora is None:
        return Addends(gu, None), x.new_empty(x.shape[0], 0)
    xa = _product(x, lora.a.transpose(1, 2), rows)
    return Addends(gu, _product(xa, lora.b.transpose(1, 2), rows)), xa


def _product(x: Tensor, w: Tensor, rows: Rows) -> Tensor:
    """x[rows of e] @ w[e] for every expert: [S, in], [E, in, out] -> [S, out], undefined for rows of no expert."""
    own = kernels.own_product(x.device)
    return own.product(x, w, rows.ends, rows.tiles) if own else torch._grouped_mm(x, w, offs=rows.ends)


def _outer(left: Tensor, right: Tensor, rows: Rows) -> Tensor:
    """left[rows of e].T @ right[rows of e] for every expert, [E, M, N]; zeros for experts without rows."""
    own = kernels.own_product(left.device)
    if own:
        return own.outer(left, right, rows.ends)
    return torch._grouped_mm(left.t(), right, offs=rows.ends).masked_fill_(rows.idle, 0)


class GroupedExperts:
    """Base class of the backends that compute by grouped products: it holds the sizes, and LoRA on the device.

    Args:
        shape: The layer's sizes, and its gate; H and I must be multiples of 8.
        device: The device that computes.
        bias: Of gate and up, [E, 2I] on any device, copied to `device`; None without.

    Raises:
        KTAMXConfigError: Other sizes.
    """

    torch_threads: int | None = None
    dtype = DTYPE
    max_rank: int | None = None
    max_len: int | None = None

    def __init__(self, shape: ExpertShape, device: torch.device, bias: Tensor | None = None) -> None:
        if not aligned(shape):
            raise KTAMXConfigError(
                f"Experts of hidden size {shape.hidden_size} and intermediate size {shape.intermediate_size}: grouped "
                f"products, on a GPU or streamed to it, need multiples of {ALIGN}."
            )
        self.shape = shape
        self.device = device
        self._numbers = torch.arange(shape.num_experts, dtype=torch.int16, device=device)
        self._lora: Lora | None = None
        self._room = RowRoom(shape.ranks)
        self._gating = Gating(shape.gate, None if bias is None else bias.to(device, DTYPE).contiguous())

    @property
    def rank(self) -> int:
        """The LoRA rank held, 0 without LoRA."""
        return self._lora.rank if self._lora else 0

    def set_lora(self, tensors: tuple[Tensor, ...]) -> None:
        """Copy the LoRA tensors, of one rank, to the device in bf16; () switches LoRA off. Saved forwards stay good."""
        # New tensors, never the old ones changed: saved forwards keep reading theirs.
        self._lora = None
        if tensors:
            self._lora = Lora.of(tensors, self.shape, self.device)

    def lora_copy(self) -> tuple[Tensor, ...]:
        """The LoRA tensors in bf16: views of tensors that are never written to again; () without LoRA."""
        return self._lora.projections() if self._lora else ()

    def careful_backward(self, x: Tensor, ids: Tensor, weights: Tensor, grad_output: Tensor, bad: Tensor) -> None:
        """None: a gradient that is not finite is none of the arithmetic's making, there is no other way."""
        return None


def aligned(shape: ExpertShape) -> bool:
    """Whether grouped products can compute experts of these sizes."""
    return shape.hidden_size % ALIGN == 0 and shape.intermediate_size % ALIGN == 0
