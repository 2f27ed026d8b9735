"""Experts one after another by matrix products of PyTorch, LoRA not merged: any device, any floating dtype.

The mathematics, for a token x sent to expert e with routing weight w (LoRA scalings are folded into the B tensors):

    g = Wg x + Bg Ag x        u = Wu x + Bu Au x        h = silu(g) * u        y = w (Wd h + Bd Ad h)

and in backward, with d = dL/dy before the weighting and q = Wd^T d + Ad^T Bd^T d:

    dL/dw = <q, h>            dg = w q * u * silu'(g)   du = w q * silu(g)
    dx = Wg^T dg + Ag^T Bg^T dg + (the same of up)      dBg = dg (Ag x)^T      dAg = (Bg^T dg) x^T

Rows are sorted by expert once, in forward; backward uses the same permutation.

In forward LoRA's part comes first and the product with the weight on top of it, rounded once: beside a product in 16
bits that is rounded already the small values of a LoRA that has just begun to learn would be lost, all those below a
500th of it. Beside a bias too, which so comes last where there is LoRA, and with the product where there is none.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import silu as _silu

from ..errors import KTAMXBackwardError
from ..shapes import ExpertShape
from .base import ExpertWeights, Gradients, SavedForward
from .buffer_pool import empty, empty_rows
from .one_token import all_different, one_token
from .torch_lora import TorchLora
from .transfer import split_lora

# Where the CPU has no 16-bit matrix products, one in fp32 pays for widening the weights from this many rows on in
# forward (in backward, where the weight's rows are the sum's, always).
_WIDEN_FROM_ROWS = 4
# On a CPU, 16-bit products are compiled for each number of rows: 0.5 ms the first time, and oneDNN keeps 1,024 of them,
# which the experts of a few layers exceed (a quarter of a SmolLM2 step). So an expert's rows are filled to a multiple
# of this, or below it to a power of two.
_ROW_STEP = 16


@dataclass
class _Groups:
    """Rows of [T*K] sorted by expert: the i-th is flat row `order[i]`; rows of no expert are left out.

    Row i of them is row `place[i]` of S rows, where rows of zeros may follow those of an expert; `place` is None if
    there are no such rows.
    """

    order: Tensor
    tokens: Tensor
    spans: list[tuple[int, int, int]]  # expert, first row, row after the last
    place: Tensor | None
    S: int
    T: int
    K: int

    def __iter__(self) -> Iterator[tuple[int, slice]]:
        return ((e, slice(i, j)) for e, i, j in self.spans)

    def spread(self, values: Tensor) -> Tensor:
        """[len(order), C] -> [S, C]."""
        if self.place is None:
            return values
        return empty_rows(self.S, values).zero_().index_copy_(0, self.place, values)

    def taken(self, values: Tensor) -> Tensor:
        """[T, C] -> [S, C]: for each row the values of its token."""
        rows = empty_rows(len(self.tokens), values)
        return self.spread(torch.index_select(values, 0, self.tokens, out=rows))

    def gathered(self, rows: Tensor) -> Tensor:
        """[S, C] -> [len(order), C]."""
        if self.place is None:
            return rows
        return torch.index_select(rows, 0, self.place, out=empty_rows(len(self.place), rows))


@dataclass
class _TorchForward(SavedForward):
    groups: _Groups
    weights: Tensor  # [S, 1] fp32, sorted: in 16 bits each would be off by up to 0.2 %
    x: Tensor  # [S, H], sorted
    gu: Tensor  # [S, 2I], before the activation
    xa: Tensor  # [S, 2r], x through the A of gate and of up
    lora: TorchLora | None


class TorchBackend:
    """Experts computed by PyTorch on the device of their weights, in their dtype.

    On a CPU without 16-bit matrix products, 16-bit weights are converted to fp32, one expert at a time, and multiplied
    in fp32.

    Args:
        weights: gate_up [E, 2I, H] and down [E, H, I], floating, on any device, and biases of gate_up if any; taken
            over, not copied.
        shape: The layer's sizes, and its gate.
    """

    name = "torch"
    torch_threads: int | None = None
    max_rank: int | None = None
    max_len: int | None = None

    def __init__(self, weights: ExpertWeights, shape: ExpertShape) -> None:
        self.shape = shape
        self.weights = weights
        self.dtype = weights.gate_up.dtype
        self.device = weights.gate_up.device
        narrow = self.dtype in (torch.bfloat16, torch.float16)
        self._widen = self.device.type == "cpu" and narrow and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
        self._fill = self.device.type == "cpu" and narrow and not self._widen
        self._math = torch.float32 if self._widen else self.dtype
        self._bias = None if weights.gate_up_bias is None else weights.gate_up_bias.to(self.device, self._math)
        self._lora: TorchLora | None = None

    @property
    def rank(self) -> int:
        """The LoRA rank held, 0 without LoRA."""
        return self._lora.rank if self._lora else 0

    def set_lora(self, tensors: tuple[Tensor, ...]) -> None:
        """Copy the LoRA tensors, of one rank, to the device; () switches LoRA off. Saved forwards stay good."""
        # New tensors, never the old ones changed: saved forwards keep reading theirs.
        self._lora = None
        if tensors:
            self._lora = TorchLora.of(tuple(t.detach().to(self.device, self._math) for t in tensors))

    def lora_copy(self) -> tuple[Tensor, ...]:
        """The LoRA tensors: views of tensors that are never written to again; () without LoRA."""
        return self._lora.projections() if self._lora else ()

    def can_backward(self, saved: SavedForward) -> bool:
        """Whether `saved` is of this backend: a saved forward stays good."""
        return isinstance(saved, _TorchForward)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, save: bool) -> tuple[Tensor, SavedForward | None]:
        """Compute expert by expert; the output [T, H] is of `dtype`, and with `save` activations are kept."""
        if x.shape[0] == 1 and not save and all_different(experts := ids[0].tolist()):
            y = one_token(self.weights, self._bias, self._lora, self._math, self._gated, x, experts, weights)
            return y, None
        groups = self._group(ids)
        width, r, lora = self.shape.up_rows, self.shape.gate.halves * self.rank, self._lora
        xs = groups.taken(x.to(self._math))
        ws = groups.spread(weights.reshape(-1).index_select(0, groups.order).unsqueeze(1))
        scratch = self._scratch()
        gu, xa = empty_rows(xs.shape[0] if save else 0, xs, width), xs.new_empty(xs.shape[0], r)
        y = empty_rows(xs.shape[0], xs)
        # Expert by expert to the end: what is between the products stays in the cache.
        for e, rows in groups:
            inner, out = gu[rows] if save else xs.new_empty(rows.stop - rows.start, width), y[rows]
            bias = None if self._bias is None else self._bias[e]
            if lora:
                torch.mm(xs[rows], lora.a[e].t(), out=xa[rows])
                lora.through_b(e, xa[rows], inner)
                self._product(xs[rows], self.weights.gate_up[e], True, inner, scratch, inner)
                if bias is not None:
                    inner.add_(bias)
            else:
                self._product(xs[rows], self.weights.gate_up[e], True, inner, scratch, bias)
            h = self._gated(inner)
            of_lora = torch.mm(h @ lora.down_a[e].t(), lora.down_b[e].t(), out=out) if lora else None
            self._product(h, self.weights.down[e], True, out, scratch, of_lora)
            out.mul_(ws[rows])
        return self._sum_by_token(y, groups), _TorchForward(groups, ws, xs, gu, xa, lora) if save else None

    def careful_backward(self, x: Tensor, ids: Tensor, weights: Tensor, grad_output: Tensor, bad: Tensor) -> None:
        """None: a gradient that is not finite is none of the arithmetic's making, there is no other way."""
        return None

    def backward(self, saved: SavedForward, grad_output: Tensor) -> Gradients:
        """Gradients of a saved forward; those of LoRA are fp32 and freshly allocated.

        Raises:
            KTAMXBackwardError: The weights were packed for another backend after the forward.
        """
        assert isinstance(saved, _TorchForward)
        if self.weights.down.numel() == 0:
            raise KTAMXBackwardError("The experts were packed between this forward and its backward: forward again.")
        groups, ws, xs, lora = saved.groups, saved.weights, saved.x, saved.lora
        grad = groups.taken(grad_output.to(self._math))
        grads = self._new_gradients(lora.rank, groups) if lora else ()
        scratch = self._scratch()
        dx, dw = (
            empty_rows(grad.shape[0], grad),
            torch.zeros(grad.shape[0], dtype=torch.float32, device=self.device),
        )
        for e, rows in groups:
            d, w, out = grad[rows], ws[rows], dx[rows]
            h, slopes = self._gated_with_slopes(saved.gu[rows])
            q = torch.empty_like(h)
            self._product(d, self.weights.down[e], False, q, scratch)
            if lora:
                db = d @ lora.down_b[e]
                q.addmm_(db, lora.down_a[e])
                grads[-2][e] = db.mul_(w).t() @ h
                grads[-1][e] = d.t() @ (h @ lora.down_a[e].t()).mul_(w)
            torch.sum(q.float() * h, 1, out=dw[rows])
            dgu = slopes(q.mul_(w))
            self._product(dgu, self.weights.gate_up[e], False, out, scratch)
            if lora:
                da = lora.back_through_b(e, dgu)
                out.addmm_(da, lora.a[e])
                for grad_a, part in zip(grads[:-2:2], (da.t() @ xs[rows]).split(lora.rank), strict=True):
                    grad_a[e] = part
                for grad_b, part in zip(grads[1:-2:2], lora.b_gradients(dgu, saved.xa[rows]), strict=True):
                    grad_b[e] = part
        grad_weights = torch.zeros(groups.T * groups.K, dtype=torch.float32, device=self.device)
        grad_weights.index_copy_(0, groups.order, groups.gathered(dw.unsqueeze(1)).squeeze(1))
        return Gradients(
            self._sum_by_token(dx, groups), grad_weights.view(groups.T, groups.K), grads, lora_is_free=True
        )

    def _gated(self, gu: Tensor) -> Tensor:
        """The gated product of rows, [S, 2I] -> [S, I]."""
        gate, inner = self.shape.gate, self.shape.intermediate_size
        return _silu(gu[:, :inner]).mul_(gu[:, inner:]) if gate.plain else gate.applied(gu)

    def _gated_with_slopes(self, gu: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """`_gated`, and what brings its gradient [S, I] back to gu's, [S, 2I]."""
        gate, inner = self.shape.gate, self.shape.intermediate_size
        if not gate.plain:
            h, by_gu = gate.with_derivatives(gu)
            parts = by_gu.view(len(gu), gate.halves, inner)
            return h.to(gu.dtype), lambda q: parts.mul_(q.unsqueeze(1)).view(gu.shape).to(gu.dtype)
        g, u = gu[:, :inner], gu[:, inner:]
        s = torch.sigmoid(g)
        silu = g * s

        def back(q: Tensor) -> Tensor:
            dgu = torch.empty_like(gu)
            # silu'(g) = s (1 + g (1 - s)) = s + silu(g) (1 - s)
            torch.mul(q * u, s + silu * (1 - s), out=dgu[:, :inner])
            torch.mul(q, silu, out=dgu[:, inner:])
            return dgu

        return silu * u, back

    def _new_gradients(self, rank: int, groups: _Groups) -> tuple[Tensor, ...]:
        """Memory for the LoRA gradients: views of one fp32 tensor, zero if any expert has no rows."""
        sizes = self.shape.lora_shapes(rank)
        flat = empty((sum(map(math.prod, sizes)),), torch.float32, self.device)
        return split_lora(flat if len(groups.spans) == self.shape.num_experts else flat.zero_(), sizes)

    def _group(self, ids: Tensor) -> _Groups:
        T, K = ids.shape
        flat = ids.reshape(-1)
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat + 1, minlength=self.shape.num_experts + 1)  # [0] counts the rows of no expert
        ends = counts.cumsum(0).tolist()
        order = order[ends[0] :]
        held = [end - begin for begin, end in itertools.pairwise(ends)]
        filled = [_filled(count) if self._fill else count for count in held]
        starts = [0, *itertools.accumulate(filled)]
        spans = [(e, starts[e], starts[e + 1]) for e, count in enumerate(held) if count]
        tokens = order.div(K, rounding_mode="floor")
        place, S = None, len(order)
        if filled != held:
            shift = [start - end + ends[0] for start, end in zip(starts[:-1], ends[:-1], strict=True)]
            moved, counted = (torch.tensor(values, device="cpu") for values in (shift, held))
            place = torch.arange(S, device="cpu") + moved.repeat_interleave(counted)
            S = starts[-1]
        return _Groups(order, tokens, spans, place, S, T, K)

    def _scratch(self) -> Tensor | None:
        """Memory for one weight converted to fp32; None where weights are not converted."""
        shape = self.shape
        size = shape.up_rows * shape.hidden_size
        return torch.empty(size, dtype=torch.float32, device=self.device) if self._widen else None

    def _product(
        self, x: Tensor, weight: Tensor, transpose: bool, out: Tensor, scratch: Tensor | None,
        add: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Write x @ weight to `out`, or x times the transpose of `weight`.

        With `add`, a row or as many as x has (which may be `out`), the sum is rounded once.
        """
        if scratch is not None and transpose and x.shape[0] < _WIDEN_FROM_ROWS:
            product = x.to(weight.dtype) @ weight.t()
            out.copy_(product) if add is None else torch.add(product, add, out=out)
            return
        wide = weight if scratch is None else scratch[: weight.numel()].view(weight.shape).copy_(weight)
        columns = wide.t() if transpose else wide
        if add is None:
            torch.mm(x, columns, out=out)
        else:
            torch.addmm(add, x, columns, out=out)

    def _sum_by_token(self, rows: Tensor, groups: _Groups) -> Tensor:
        """Sum over each token's experts, in fp32 and in a fixed order: [S, H] -> [T, H] in the backend's dtype."""
        spread = empty_rows(groups.T * groups.K, rows).zero_()
        spread.index_copy_(0, groups.order, groups.gathered(rows))
        return (
            spread.view(groups.T, groups.K, -1)
            .sum(1, dtype=torch.promote_types(rows.dtype, torch.float32))
            .to(self.dtype)
        )


def _filled(count: int) -> int:
    """The number of rows that `count` rows are filled up to."""
    if count <= _ROW_STEP:
        return 1 << (count - 1).bit_length() if count else 0
    return -(-count // _ROW_STEP) * _ROW_STEP
