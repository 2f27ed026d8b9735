"""The mathematics of `backends/torch_loop.py` over rows sorted by expert, in bf16, by grouped matrix products alone.

No function of this module waits for a GPU. All T*K rows are kept, sorted by expert, those of no expert at the end;
`torch._grouped_mm` gets the row where each expert's rows end. It leaves the rows after the last end undefined (NaN,
perhaps), and never reads them for another row or a weight's gradient: they are zeroed where rows are summed by token.

The LoRA of gate and up is one: A of gate above that of up, [E, 2r, H], B block-diagonal, [E, 2I, 2r]. Ranks are padded
to multiples of 8, for `_grouped_mm` wants strides of 16 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import silu as _silu

from ...errors import KTAMXConfigError
from ...shapes import ExpertShape
from ..transfer import to_device

ALIGN = 8  # elements of 16 bits in 16 bytes
DTYPE = torch.bfloat16


@dataclass
class Rows:
    """The T*K rows (a token and one of its experts) sorted by expert, or S consecutive ones of them.

    Attributes:
        order: [S] int64: row i is row `order[i]` of the unsorted T*K.
        tokens: [S] int64: row i is of token `tokens[i]`.
        ends: [E] int32: the row after each expert's last.
        valid: [S, 1] bool: whether the row is of an expert.
        weights: [S, 1] fp32: the routing weights.
        idle: [E, 1, 1] bool: the experts without rows.
        T: Number of tokens.
        K: Number of experts of a token.
    """

    order: Tensor
    tokens: Tensor
    ends: Tensor
    valid: Tensor
    weights: Tensor
    idle: Tensor
    T: int
    K: int

    @classmethod
    def by_expert(cls, ids: Tensor, weights: Tensor, numbers: Tensor) -> Rows:
        """Sort the rows of a batch.

        Args:
            ids: [T, K] int64, -1 for no expert.
            weights: Routing weights, [T, K] fp32.
            numbers: 0 to E - 1, int64, on the device of both.
        """
        T, K = ids.shape
        flat, E = ids.reshape(-1), len(numbers)
        key, order = flat.masked_fill(flat < 0, E).sort(stable=True)  # torch.where would wait for its scalar's copy
        ends = torch.searchsorted(key, numbers, right=True, out_int32=True)
        idle = torch.diff(ends, prepend=ends.new_zeros(1)) == 0
        by_row = weights.reshape(-1).index_select(0, order).unsqueeze(1)
        tokens = order.div(K, rounding_mode="floor")
        return cls(order, tokens, ends, (key < E).unsqueeze(1), by_row, idle[:, None, None], T, K)

    def part(self, experts: slice, rows: slice) -> Rows:
        """The rows `rows`, which must be exactly those of `experts`."""
        return Rows(
            self.order[rows], self.tokens[rows], self.ends[experts] - rows.start, self.valid[rows],
            self.weights[rows], self.idle[experts], self.T, self.K,
        )  # fmt: skip

    def sum_by_token(self, spread: Tensor) -> Tensor:
        """Sum over each token's experts, in fp32 and in a fixed order: [T*K, H], unsorted -> [T, H] in bf16."""
        return spread.view(self.T, self.K, spread.shape[1]).sum(1, dtype=torch.float32).to(DTYPE)


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
        """Copy the six tensors that `set_lora` is given, of any dtype and device, to new tensors on `device`."""
        E, H, I = shape.num_experts, shape.hidden_size, shape.intermediate_size  # noqa: E741
        gate_a, gate_b, up_a, up_b, down_a, down_b = (to_device(t.detach(), device, DTYPE) for t in tensors)
        r = gate_a.shape[1]
        p = -(-r // ALIGN) * ALIGN
        a, b = gate_a.new_zeros(E, 2 * p, H), gate_a.new_zeros(E, 2 * I, 2 * p)
        a[:, :r], a[:, p : p + r] = gate_a, up_a
        b[:, :I, :r], b[:, I:, p : p + r] = gate_b, up_b
        wide_a, wide_b = gate_a.new_zeros(E, p, I), gate_a.new_zeros(E, H, p)
        wide_a[:, :r], wide_b[:, :, :r] = down_a, down_b
        return cls(a, b, wide_a, wide_b, r)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The four tensors, without the rank."""
        return self.a, self.b, self.down_a, self.down_b

    def part(self, experts: slice) -> Lora:
        """Views of consecutive experts."""
        return Lora(self.a[experts], self.b[experts], self.down_a[experts], self.down_b[experts], self.rank)

    def zeros(self) -> Lora:
        """New tensors of zeros, of the same sizes."""
        a, b, down_a, down_b = (torch.zeros_like(t) for t in self.tensors)
        return Lora(a, b, down_a, down_b, self.rank)

    def projections(self) -> tuple[Tensor, ...]:
        """Views as the six tensors of `set_lora`, of the rank before padding."""
        a, b, down_a, down_b, r = self
        I, p = down_a.shape[2], down_a.shape[1]  # noqa: E741
        gate, up = slice(0, r), slice(p, p + r)
        return a[:, gate], b[:, :I, gate], a[:, up], b[:, I:, up], down_a[:, :r], down_b[:, :, :r]


class RowGradients(NamedTuple):
    """The result of `gradients`.

    Attributes:
        x: Gradients of the rows' hidden states, [S, H] bf16.
        weights: Gradients of the rows' routing weights, [S] fp32.
        lora: Gradients of the LoRA tensors, bf16; None without LoRA.
    """

    x: Tensor
    weights: Tensor
    lora: Lora | None


def outputs(x: Tensor, gate_up: Tensor, down: Tensor, lora: Lora | None, rows: Rows) -> Tensor:
    """Compute each row by its expert, times its routing weight.

    Args:
        x: The rows' hidden states, [S, H] bf16.
        gate_up: [E, 2I, H] bf16.
        down: [E, H, I] bf16.
        lora: LoRA of these experts; None without.
        rows: The rows' experts and weights.

    Returns:
        [S, H] bf16; undefined where `rows.valid` is false.
    """
    gu, _ = _up(x, gate_up, lora, rows)
    I = down.shape[2]  # noqa: E741
    h = _silu(gu[:, :I]).mul_(gu[:, I:])
    y = _product(h, down.transpose(1, 2), rows)
    if lora:
        y.add_(_product(_product(h, lora.down_a.transpose(1, 2), rows), lora.down_b.transpose(1, 2), rows))
    return y.mul_(rows.weights)


def gradients(
    x: Tensor, d: Tensor, gate_up: Tensor, down: Tensor, lora: Lora | None, rows: Rows
) -> RowGradients:  # fmt: skip
    """Gradients of each row's hidden state, of its routing weight and of the LoRA.

    The forward is computed again from its inputs: a product more (0.3 ms a DeepSeek-V2-Lite layer on an H200) is
    cheaper than 6I + 2H bytes of GPU memory for each row of every layer.

    Args:
        x: The rows' hidden states, [S, H] bf16.
        d: The gradient of each row's weighted output, [S, H] bf16.
        gate_up: [E, 2I, H] bf16.
        down: [E, H, I] bf16.
        lora: LoRA of these experts; None without.
        rows: The rows' experts and weights.

    Returns:
        The gradients; those of a row are undefined where `rows.valid` is false.
    """
    gu, xa = _up(x, gate_up, lora, rows)
    I = down.shape[2]  # noqa: E741
    g, u = gu[:, :I], gu[:, I:]
    s = torch.sigmoid(g)
    silu = g * s
    h = silu * u
    q = _product(d, down, rows)
    grad_down_a = grad_down_b = None
    if lora:
        through = _product(d, lora.down_b, rows)
        q.add_(_product(through, lora.down_a, rows))
        grad_down_a = _outer(through.mul_(rows.weights), h, rows)
        inner = _product(h, lora.down_a.transpose(1, 2), rows)
        grad_down_b = _outer(d, inner.mul_(rows.weights), rows)
    by_row = (q.float() * h).sum(1)

    q.mul_(rows.weights)
    dgu = torch.empty_like(gu)
    # silu'(g) = s (1 + g (1 - s)) = s + silu(g) (1 - s)
    torch.mul(q * u, s + silu * (1 - s), out=dgu[:, :I])
    torch.mul(q, silu, out=dgu[:, I:])
    dx = _product(dgu, gate_up, rows)
    grad_lora = None
    if lora:
        assert grad_down_a is not None
        assert grad_down_b is not None
        da = _product(dgu, lora.b, rows)
        dx.add_(_product(da, lora.a, rows))
        grad_lora = Lora(_outer(da, x, rows), _outer(dgu, xa, rows), grad_down_a, grad_down_b, lora.rank)
    return RowGradients(dx, by_row, grad_lora)


def _up(x: Tensor, gate_up: Tensor, lora: Lora | None, rows: Rows) -> tuple[Tensor, Tensor]:
    """Gate and up before the activation, [S, 2I], and x multiplied by both A, [S, 2p]."""
    gu = _product(x, gate_up.transpose(1, 2), rows)
    if lora is None:
        return gu, x.new_empty(x.shape[0], 0)
    xa = _product(x, lora.a.transpose(1, 2), rows)
    return gu.add_(_product(xa, lora.b.transpose(1, 2), rows)), xa


def _product(x: Tensor, w: Tensor, rows: Rows) -> Tensor:
    """x[rows of e] @ w[e] for every expert: [S, in], [E, in, out] -> [S, out], undefined where `valid` is false."""
    return torch._grouped_mm(x, w, offs=rows.ends)


def _outer(left: Tensor, right: Tensor, rows: Rows) -> Tensor:
    """left[rows of e].T @ right[rows of e] for every expert, [E, M, N]; zeros for experts without rows."""
    return torch._grouped_mm(left.t(), right, offs=rows.ends).masked_fill_(rows.idle, 0)


class GroupedExperts:
    """Base class of the backends that compute by grouped products: it holds the sizes, and LoRA on the device.

    Args:
        shape: The layer's sizes; H and I must be multiples of 8.
        device: The device that computes.

    Raises:
        KTAMXConfigError: Other sizes.
    """

    torch_threads: int | None = None
    dtype = DTYPE
    max_rank: int | None = None
    max_len: int | None = None

    def __init__(self, shape: ExpertShape, device: torch.device) -> None:
        if not aligned(shape):
            raise KTAMXConfigError(
                f"Experts of hidden size {shape.hidden_size} and intermediate size {shape.intermediate_size}: grouped "
                f"products, on a GPU or streamed to it, need multiples of {ALIGN}."
            )
        self.shape = shape
        self.device = device
        self._numbers = torch.arange(shape.num_experts, device=device)
        self._lora: Lora | None = None

    @property
    def rank(self) -> int:
        """The LoRA rank held, 0 without LoRA."""
        return self._lora.rank if self._lora else 0

    def set_lora(self, tensors: tuple[Tensor, ...]) -> None:
        """Copy six LoRA tensors of one rank to the device, in bf16; () switches LoRA off. Saved forwards stay good."""
        # New tensors, never the old ones changed: saved forwards keep reading theirs.
        self._lora = None
        if tensors:
            self._lora = Lora.of(tensors, self.shape, self.device)

    def lora_copy(self) -> tuple[Tensor, ...]:
        """The six LoRA tensors in bf16: views of tensors that are never written to again; () without LoRA."""
        return self._lora.projections() if self._lora else ()

    def careful_backward(self, x: Tensor, ids: Tensor, weights: Tensor, grad_output: Tensor, bad: Tensor) -> None:
        """None: a gradient that is not finite is none of the arithmetic's making, there is no other way."""
        return None


def aligned(shape: ExpertShape) -> bool:
    """Whether grouped products can compute experts of these sizes."""
    return shape.hidden_size % ALIGN == 0 and shape.intermediate_size % ALIGN == 0
