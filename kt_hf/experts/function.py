"""The autograd function of an expert layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends.transfer import to_device
from ..errors import KTAMXBackwardError
from ..ranks import Kind
from .exchange import Gathered, LayerExchange
from .lora_tensors import LoraTensors
from .runner import ExpertsRunner
from .tickets import Retained, Ticket


class ExpertsFunction(torch.autograd.Function):
    """Experts as one differentiable function: hidden states, routing weights and the LoRA parameters have gradients.

    `apply` takes
    x: [T, H], any floating dtype and device;
    ids: [T, K] integers;
    weights: [T, K], floating;
    runner: the layer's `ExpertsRunner`, whose backend holds the LoRA values already;
    lora: the `LoraTensors` that those values were made of;
    exchange: the layer's `LayerExchange` where its experts are divided among ranks, else None;
    *parameters: `lora.parameters`, for autograd to see,
    and returns [T, H] in x's dtype and on its device.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        runner: ExpertsRunner,
        lora: LoraTensors,
        exchange: LayerExchange | None,
        *parameters: Tensor,
    ) -> Tensor:
        """Compute the layer, and keep the inputs and the ticket for the backward. Arguments are those of `apply`."""
        ctx.like_inputs = (x.device, x.dtype), (weights.device, weights.dtype, weights.shape[1])
        out, ticket, ctx.lengths = _forward(runner, exchange, x, ids, weights, save=True)
        assert ticket is not None
        ctx.runner, ctx.ticket, ctx.lora, ctx.exchange = runner, ticket, lora, exchange
        # The number travels as a saved tensor: under non-reentrant checkpointing the one that arrives in backward is
        # the recompute's, and touching the saved tensors is what sets the recompute off.
        ctx.save_for_backward(x, ids, weights, torch.tensor(ticket.number, device="cpu"))
        ctx.like = [(parameter.device, parameter.dtype) for parameter in parameters]
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, the routing weights and the LoRA parameters; None for every other argument.

        Raises:
            KTAMXBackwardError: create_graph=True, a second backward without retain_graph, or a gradient that is not
                finite though `grad_outputs` is; another rank that has failed or is elsewhere.
        """
        if torch.is_grad_enabled():
            raise KTAMXBackwardError(
                f"{ctx.runner.label}: create_graph=True is not supported, experts have no second derivatives."
            )
        x, ids, weights, number = ctx.saved_tensors
        own = ctx.exchange is None or ctx.runner.resumes  # else what is kept is of all ranks
        kept = ctx.ticket.retained if own and int(number) == ctx.ticket.number else None
        if kept is not None:  # the gradients are of that forward, as are the rows of each expert that it counted
            ids, weights = kept.ids, kept.weights
        needed = ctx.needs_input_grad
        lora = ctx.lora if any(needed[6:]) else None

        def compute(x: Tensor, ids: Tensor, weights: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
            return ctx.runner.backward(ctx.ticket, int(number), x, ids, weights, grad, lora)

        grad_x, grad_weights, grad_lora = _backward(ctx, compute, x, ids, weights, grad_outputs[0])
        gradients: list[Tensor | None] = [None] * len(ctx.like)
        for i, (grad, like) in enumerate(zip(grad_lora, ctx.like, strict=bool(grad_lora))):
            if needed[6 + i]:
                gradients[i] = grad.to(*like)
        (device, dtype), (weights_device, weights_dtype, columns) = ctx.like_inputs
        of_x = to_device(grad_x, device).to(dtype) if needed[0] else None
        of_weights = to_device(grad_weights, weights_device)[:, :columns].to(weights_dtype) if needed[2] else None
        return of_x, None, of_weights, None, None, None, *gradients


def forward_only(
    runner: ExpertsRunner, exchange: LayerExchange | None, x: Tensor, ids: Tensor, weights: Tensor
) -> Tensor:
    """A layer's output [T, H], in x's dtype and on its device, where no backward comes.

    Args:
        runner: The layer's, whose backend holds the LoRA values already.
        exchange: Where the layer's experts are divided among ranks, else None.
        x: [T, H], any floating dtype and device.
        ids: [T, K] integers.
        weights: [T, K], floating.
    """
    return _forward(runner, exchange, x, ids, weights, save=False)[0]


def _forward(
    runner: ExpertsRunner, exchange: LayerExchange | None, x: Tensor, ids: Tensor, weights: Tensor, save: bool
) -> tuple[Tensor, Ticket | None, list[int]]:
    """The output; the ticket; and how many tokens each rank has."""
    if exchange is None:
        out, ticket = runner.forward(x, ids, weights, save)
        return out.to(x.dtype), ticket, []
    known, each_keeps = None, save and runner.resumes
    if each_keeps:
        with exchange.telling(Kind.TOKENS):
            known = runner.recognize(x, ids, weights)
    number, sure = (-1, False) if known is None else (known.ticket.gathering, known.sure)
    every = exchange.gather(x, ids, weights, save, number, sure)
    if every is None:
        assert known is not None
        assert known.ticket.retained is not None
        return known.ticket.retained.output.detach(), known.ticket, known.ticket.lengths

    def computed(every: Gathered) -> tuple[Tensor, Ticket | None]:
        with exchange.owed(Kind.OUTPUTS, [x], every.lengths, every.said):
            out, ticket = runner.forward(every.x, every.ids, every.weights, save, of_ranks=each_keeps)
            return out.to(x.dtype), ticket

    out, ticket = computed(every)
    true = exchange.certain(every, x, ids, weights)
    if true is not every:
        del every, out, ticket  # before as much is needed once more
        out, ticket = computed(true)
    (out,) = exchange.summed(Kind.OUTPUTS, [out], true.lengths)
    if each_keeps and ticket is not None and runner.retain:
        kept = x.detach().to(runner.backend.dtype).contiguous(), ids.detach(), weights.detach()
        ticket.retained, ticket.gathering, ticket.lengths = Retained(*kept, out), true.number, true.lengths
    return out, ticket, true.lengths


def _backward(
    ctx: Any,
    compute: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, list[Tensor]]],
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    grad_output: Tensor,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The gradients of x, of the routing weights and of LoRA, where `compute` knows this rank's experts alone."""
    exchange: LayerExchange | None = ctx.exchange
    if exchange is None:
        return compute(x, ids, weights, grad_output)
    grads, every = exchange.gather_gradients(grad_output, x, ids, weights, ctx.lengths)
    with exchange.owed(Kind.INPUT_GRADIENTS, [every.weights[:0], x], ctx.lengths):
        grad_x, grad_weights, of_lora = compute(every.x, every.ids, every.weights, grads)
        parts = [to_device(grad_weights, x.device)[:, : ids.shape[1]].float(), to_device(grad_x, x.device).to(x.dtype)]
    grad_weights, grad_x = exchange.summed(Kind.INPUT_GRADIENTS, parts, ctx.lengths)
    return grad_x, grad_weights, of_lora
