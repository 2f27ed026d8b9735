"""The mathematics of `torch_grouped` over rows sorted by expert, in bf16, by grouped matrix products alone.

Nothing here waits for a GPU. All T*K rows are kept, sorted by expert, those of no expert at the end;
`torch._grouped_mm` is told where each expert's rows end. It leaves the rows after the last end undefined (NaN,
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
    """[T*K] rows sorted by expert, or a run of them: row i of S is flat row `order[i]`, of token `tokens[i]`."""

    order: Tensor
    tokens: Tensor
    ends: Tensor  # [E] int32, row after each expert's last
    valid: Tensor  # [S, 1] bool, whether the row is of an expert
    weights: Tensor  # [S, 1] fp32
    idle: Tensor  # [E, 1, 1] bool, experts without rows
    T: int
    K: int

    @classmethod
    def by_expert(cls, ids: Tensor, weights: Tensor, numbers: Tensor) -> Rows:
        """Those of ids and routing weights [T, K]; numbers is 0 .. E-1, on their device."""
        T, K = ids.shape
        flat, E = ids.reshape(-1), len(numbers)
        key, order = flat.masked_fill(flat < 0, E).sort(stable=True)  # torch.where would wait for its scalar's copy
        ends = torch.searchsorted(key, numbers, right=True, out_int32=True)
        idle = torch.diff(ends, prepend=ends.new_zeros(1)) == 0
        by_row = weights.reshape(-1).index_select(0, order).unsqueeze(1)
        tokens = order.div(K, rounding_mode="floor")
        return cls(order, tokens, ends, (key < E).unsqueeze(1), by_row, idle[:, None, None], T, K)

    def part(self, experts: slice, rows: slice) -> Rows:
        """Rows `rows`, which are exactly those of `experts`."""
        return Rows(
            self.order[rows], self.tokens[rows], self.ends[experts] - rows.start, self.valid[rows],
            self.weights[rows], self.idle[experts], self.T, self.K,
        )  # fmt: skip

    def sum_by_token(self, spread: Tensor) -> Tensor:
        """Sum over each token's experts, in fp32 and in a fixed order: [T*K, H], unsorted -> [T, H] in bf16."""
        return spread.view(self.T, self.K, spread.shape[1]).sum(1, dtype=torch.float32).to(DTYPE)


class Lora(NamedTuple):
    """LoRA tensors as they are multiplied, of padded rank p; or gradients of these."""

    a: Tensor  # [E, 2p, H]
    b: Tensor  # [E, 2I, 2p]
    down_a: Tensor  # [E, p, I]
    down_b: Tensor  # [E, H, p]
    rank: int

    @classmethod
    def of(cls, tensors: tuple[Tensor, ...], shape: ExpertShape, device: torch.device) -> Lora:
        """New tensors on `device` from the six a backend is given."""
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
        return self.a, self.b, self.down_a, self.down_b

    def part(self, experts: slice) -> Lora:
        return Lora(self.a[experts], self.b[experts], self.down_a[experts], self.down_b[experts], self.rank)

    def zeros(self) -> Lora:
        a, b, down_a, down_b = (torch.zeros_like(t) for t in self.tensors)
        return Lora(a, b, down_a, down_b, self.rank)

    def six(self) -> tuple[Tensor, ...]:
        """The six tensors, of the rank they had: views."""
        a, b, down_a, down_b, r = self
        I, p = down_a.shape[2], down_a.shape[1]  # noqa: E741
        gate, up = slice(0, r), slice(p, p + r)
        return a[:, gate], b[:, :I, gate], a[:, up], b[:, I:, up], down_a[:, :r], down_b[:, :, :r]


class RowGradients(NamedTuple):
    """What `gradients` gives."""

    x: Tensor  # [S, H] bf16
    weights: Tensor  # [S] fp32
    lora: Lora | None


def outputs(x: Tensor, gate_up: Tensor, down: Tensor, lora: Lora | None, rows: Rows) -> Tensor:
    """Each row's x [S, H] through its expert, weighted: [S, H]."""
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
    """Gradients of each row's x, of its weight and of the LoRA, for the gradient d [S, H] of the weighted output.

    Nothing of the forward is kept but its inputs: a product more (0.3 ms a DeepSeek-V2-Lite layer on an H200) is
    cheaper than 6I + 2H bytes of GPU memory for each row of every layer.
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
    found = None
    if lora:
        assert grad_down_a is not None
        assert grad_down_b is not None
        da = _product(dgu, lora.b, rows)
        dx.add_(_product(da, lora.a, rows))
        found = Lora(_outer(da, x, rows), _outer(dgu, xa, rows), grad_down_a, grad_down_b, lora.rank)
    return RowGradients(dx, by_row, found)


def _up(x: Tensor, gate_up: Tensor, lora: Lora | None, rows: Rows) -> tuple[Tensor, Tensor]:
    """gate and up before the activation, [S, 2I], and x through both A, [S, 2p]."""
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
    """What backends that compute by grouped products have in common: their numbers, and LoRA on their device.

    Args:
        shape: Sizes; H and I multiples of 8.
        device: Where experts are computed.

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
        return self._lora.rank if self._lora else 0

    def set_lora(self, tensors: tuple[Tensor, ...]) -> None:
        # New tensors, never the old ones changed: saved forwards keep reading theirs.
        self._lora = None
        if tensors:
            self._lora = Lora.of(tensors, self.shape, self.device)

    def lora_copy(self) -> tuple[Tensor, ...]:
        return self._lora.six() if self._lora else ()

    def careful_backward(self, x: Tensor, ids: Tensor, weights: Tensor, grad_output: Tensor, bad: Tensor) -> None:
        return None  # what is not finite here is not finite


def aligned(shape: ExpertShape) -> bool:
    """Whether grouped products can compute experts of these sizes."""
    return shape.hidden_size % ALIGN == 0 and shape.intermediate_size % ALIGN == 0
