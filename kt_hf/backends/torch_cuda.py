"""Experts by grouped matrix products alone, LoRA's too: nothing waits for the GPU, so the host can go on meanwhile.

The mathematics is that of `torch_grouped`, in bf16. Two things differ.

How many rows an expert gets is known on the GPU only. So all T*K rows are kept, sorted by expert, those of no expert at
the end; `torch._grouped_mm` is told where each expert's rows end. It leaves the rows after the last end undefined (NaN,
perhaps), and never reads them for another row or a weight's gradient: they are zeroed where rows are summed by token.

The LoRA of gate and up is one: A of gate above that of up, [E, 2r, H], B block-diagonal, [E, 2I, 2r]. Ranks are padded
to multiples of 8, for `_grouped_mm` wants strides of 16 bytes.

Nothing of the forward is kept but its inputs: a product more in backward (0.3 ms a DeepSeek-V2-Lite layer on an H200)
is cheaper than 6I + 2H bytes of GPU memory for each row of every layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import silu as _silu

from ..errors import KTAMXConfigError
from .base import ExpertShape, ExpertWeights, Gradients, Saved
from .torch_grouped import TorchBackend
from .transfer import to_device

_ALIGN = 8  # elements of 16 bits in 16 bytes


@dataclass
class _Rows:
    """[T*K] rows sorted by expert: sorted row i is flat row `order[i]`, of token `tokens[i]`."""

    order: Tensor
    tokens: Tensor
    ends: Tensor  # [E] int32, row after each expert's last
    valid: Tensor  # [S, 1] bool, whether the sorted row is of an expert
    weights: Tensor  # [S, 1] fp32
    idle: Tensor  # [E, 1, 1] bool, experts without rows
    T: int
    K: int


class _Lora(NamedTuple):
    """LoRA tensors as they are multiplied, of padded rank p."""

    a: Tensor  # [E, 2p, H]
    b: Tensor  # [E, 2I, 2p]
    down_a: Tensor  # [E, p, I]
    down_b: Tensor  # [E, H, p]
    rank: int


@dataclass
class _GroupedSaved(Saved):
    rows: _Rows
    x: Tensor  # [T, H]
    lora: _Lora | None


class GroupedBackend:
    """Experts in bf16 on the device of their weights, without a wait for it.

    Args:
        weights: bf16, taken over, not copied.
        shape: Sizes; H and I multiples of 8.
    """

    name = "torch"
    own_threads = False
    dtype = torch.bfloat16
    max_rank: int | None = None
    max_len: int | None = None

    def __init__(self, weights: ExpertWeights, shape: ExpertShape) -> None:
        if not fits(weights, shape):
            raise KTAMXConfigError(
                f"Experts of {weights.gate_up.dtype} with hidden size {shape.hidden_size} and intermediate size "
                f"{shape.intermediate_size}: grouped products need bfloat16 and multiples of {_ALIGN}."
            )
        self.shape = shape
        self.weights = weights
        self.device = weights.gate_up.device
        self._ids = torch.arange(shape.num_experts, device=self.device)
        self._lora: _Lora | None = None

    @property
    def rank(self) -> int:
        return self._lora.rank if self._lora else 0

    def set_lora(self, tensors: tuple[Tensor, ...]) -> None:
        # New tensors, never the old ones changed: saved forwards keep reading theirs.
        self._lora = None
        if not tensors:
            return
        E, H, I = self.shape.num_experts, self.shape.hidden_size, self.shape.intermediate_size  # noqa: E741
        gate_a, gate_b, up_a, up_b, down_a, down_b = (to_device(t.detach(), self.device, self.dtype) for t in tensors)
        r = gate_a.shape[1]
        p = -(-r // _ALIGN) * _ALIGN
        a, b = gate_a.new_zeros(E, 2 * p, H), gate_a.new_zeros(E, 2 * I, 2 * p)
        a[:, :r], a[:, p : p + r] = gate_a, up_a
        b[:, :I, :r], b[:, I:, p : p + r] = gate_b, up_b
        wide_a, wide_b = gate_a.new_zeros(E, p, I), gate_a.new_zeros(E, H, p)
        wide_a[:, :r], wide_b[:, :, :r] = down_a, down_b
        self._lora = _Lora(a, b, wide_a, wide_b, r)

    def lora_copy(self) -> tuple[Tensor, ...]:
        return () if self._lora is None else self._parts(*self._lora[:4], self._lora.rank)

    def can_backward(self, saved: Saved) -> bool:
        return isinstance(saved, _GroupedSaved)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, save: bool) -> tuple[Tensor, Saved | None]:
        rows, lora = self._rows(ids, weights), self._lora
        gu, _ = self._up(x.index_select(0, rows.tokens), rows, lora)
        I = self.shape.intermediate_size  # noqa: E741
        h = _silu(gu[:, :I]).mul_(gu[:, I:])
        y = _product(h, self.weights.down.transpose(1, 2), rows)
        if lora:
            y.add_(_product(_product(h, lora.down_a.transpose(1, 2), rows), lora.down_b.transpose(1, 2), rows))
        out = self._sum_by_token(y.mul_(rows.weights), rows)
        return out, _GroupedSaved(rows, x, lora) if save else None

    def careful_backward(self, x: Tensor, ids: Tensor, weights: Tensor, grad_output: Tensor, bad: Tensor) -> None:
        return None  # what is not finite here is not finite

    def backward(self, saved: Saved, grad_output: Tensor) -> Gradients:
        assert isinstance(saved, _GroupedSaved)
        rows, lora, I = saved.rows, saved.lora, self.shape.intermediate_size  # noqa: E741
        x = saved.x.index_select(0, rows.tokens)
        gu, xa = self._up(x, rows, lora)
        g, u = gu[:, :I], gu[:, I:]
        s = torch.sigmoid(g)
        silu = g * s
        h = silu * u
        d = grad_output.index_select(0, rows.tokens)
        q = _product(d, self.weights.down, rows)
        grad_down_a = grad_down_b = None
        if lora:
            through = _product(d, lora.down_b, rows)
            q.add_(_product(through, lora.down_a, rows))
            grad_down_a = _outer(through.mul_(rows.weights), h, rows)
            inner = _product(h, lora.down_a.transpose(1, 2), rows)
            grad_down_b = _outer(d, inner.mul_(rows.weights), rows)
        by_row = (q.float() * h).sum(1).masked_fill_(~rows.valid[:, 0], 0)
        grad_weights = torch.zeros_like(by_row).scatter_(0, rows.order, by_row)

        q.mul_(rows.weights)
        dgu = torch.empty_like(gu)
        # silu'(g) = s (1 + g (1 - s)) = s + silu(g) (1 - s)
        torch.mul(q * u, s + silu * (1 - s), out=dgu[:, :I])
        torch.mul(q, silu, out=dgu[:, I:])
        dx = _product(dgu, self.weights.gate_up, rows)
        grads: tuple[Tensor, ...] = ()
        if lora:
            assert grad_down_a is not None
            assert grad_down_b is not None
            da = _product(dgu, lora.b, rows)
            dx.add_(_product(da, lora.a, rows))
            grads = self._parts(_outer(da, x, rows), _outer(dgu, xa, rows), grad_down_a, grad_down_b, lora.rank)
        return Gradients(self._sum_by_token(dx, rows), grad_weights.view(rows.T, rows.K), grads)

    def _up(self, x: Tensor, rows: _Rows, lora: _Lora | None) -> tuple[Tensor, Tensor]:
        """gate and up before the activation, [S, 2I], and x through both A, [S, 2p]."""
        gu = _product(x, self.weights.gate_up.transpose(1, 2), rows)
        if lora is None:
            return gu, x.new_empty(x.shape[0], 0)
        xa = _product(x, lora.a.transpose(1, 2), rows)
        return gu.add_(_product(xa, lora.b.transpose(1, 2), rows)), xa

    def _parts(self, a: Tensor, b: Tensor, down_a: Tensor, down_b: Tensor, r: int) -> tuple[Tensor, ...]:
        """The six tensors, of the rank they had, in those that are multiplied."""
        I, p = self.shape.intermediate_size, down_a.shape[1]  # noqa: E741
        gate, up = slice(0, r), slice(p, p + r)
        return a[:, gate], b[:, :I, gate], a[:, up], b[:, I:, up], down_a[:, :r], down_b[:, :, :r]

    def _rows(self, ids: Tensor, weights: Tensor) -> _Rows:
        T, K = ids.shape
        flat, E = ids.reshape(-1), self.shape.num_experts
        key, order = flat.masked_fill(flat < 0, E).sort(stable=True)  # torch.where would wait for its scalar's copy
        ends = torch.searchsorted(key, self._ids, right=True, out_int32=True)
        idle = torch.diff(ends, prepend=ends.new_zeros(1)) == 0
        by_row = weights.reshape(-1).index_select(0, order).unsqueeze(1)
        tokens = order.div(K, rounding_mode="floor")
        return _Rows(order, tokens, ends, (key < E).unsqueeze(1), by_row, idle[:, None, None], T, K)

    def _sum_by_token(self, values: Tensor, rows: _Rows) -> Tensor:
        """Sum over each token's experts, in fp32 and in a fixed order: [S, H] -> [T, H] in bf16."""
        values.masked_fill_(~rows.valid, 0)
        spread = torch.empty_like(values).index_copy_(0, rows.order, values)
        return spread.view(rows.T, rows.K, -1).sum(1, dtype=torch.float32).to(self.dtype)


def fits(weights: ExpertWeights, shape: ExpertShape) -> bool:
    """Whether `GroupedBackend` can compute these experts."""
    aligned = shape.hidden_size % _ALIGN == shape.intermediate_size % _ALIGN == 0
    return weights.gate_up.dtype == weights.down.dtype == torch.bfloat16 and aligned


def gpu_backend(weights: ExpertWeights, shape: ExpertShape) -> GroupedBackend | TorchBackend:
    """What computes experts on a GPU: grouped products where they can, else PyTorch expert by expert."""
    return GroupedBackend(weights, shape) if fits(weights, shape) else TorchBackend(weights, shape)


def _product(x: Tensor, w: Tensor, rows: _Rows) -> Tensor:
    """x[rows of e] @ w[e] for every expert: [S, in], [E, in, out] -> [S, out], undefined where `valid` is false."""
    return torch._grouped_mm(x, w, offs=rows.ends)


def _outer(left: Tensor, right: Tensor, rows: _Rows) -> Tensor:
    """left[rows of e].T @ right[rows of e] for every expert, [E, M, N]; zeros for experts without rows."""
    return torch._grouped_mm(left.t(), right, offs=rows.ends).masked_fill_(rows.idle, 0)
