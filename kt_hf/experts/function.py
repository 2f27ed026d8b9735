"""The autograd function of an expert layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends import CALL_LOCK, Gradients
from ..backends.transfer import to_device
from ..errors import KTAMXBackwardError
from .runner import ExpertsRunner


class ExpertsFunction(torch.autograd.Function):
    """Experts as one differentiable function: hidden states, routing weights and the LoRA parameters have gradients.

    Args of `apply`:
        x: [T, H], any floating dtype and device.
        ids: [T, K] integers.
        weights: [T, K], floating.
        runner: The layer's `ExpertsRunner`, which holds the LoRA values already.
        to_parameters: Turns the backend's six LoRA gradients into those of `lora`.
        *lora: The LoRA parameters that the values were made of.

    Returns [T, H] in x's dtype and on its device.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        runner: ExpertsRunner,
        to_parameters: Callable[[Gradients], list[Tensor]],
        *lora: Tensor,
    ) -> Tensor:
        out, ticket = runner.forward(x, ids, weights, save=True)
        assert ticket is not None
        ctx.runner, ctx.ticket, ctx.to_parameters = runner, ticket, to_parameters
        # The number travels as a saved tensor: under non-reentrant checkpointing the one that arrives in backward is
        # the recompute's, and touching the saved tensors is what sets the recompute off.
        ctx.save_for_backward(x, ids, weights, torch.tensor(ticket.number, device="cpu"))
        ctx.like = [(p.shape, p.dtype, p.device) for p in lora]
        return out.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise KTAMXBackwardError(
                f"{ctx.runner.label}: create_graph=True is not supported, experts have no second derivatives."
            )
        x, ids, weights, number = ctx.saved_tensors
        wanted, runner = ctx.needs_input_grad, ctx.runner
        lora: list[Tensor | None] = [None] * len(ctx.like)
        with CALL_LOCK, torch.no_grad(), runner.quiet():
            gradients = runner.backward(ctx.ticket, int(number), x, ids, weights, grad_outputs[0], any(wanted[5:]))
            if any(wanted[5:]):
                if gradients.lora:
                    made = runner.parameter_gradients(gradients, ctx.to_parameters, ctx.like[0][2])
                else:
                    made = _like(gradients, ctx.like)
                for i, (grad, (_, dtype, device)) in enumerate(zip(made, ctx.like, strict=True)):
                    if wanted[5 + i]:
                        lora[i] = grad.to(device, dtype)
        grad_x = to_device(gradients.hidden_states, x.device).to(x.dtype) if wanted[0] else None
        grad_weights = None
        if wanted[2]:
            grad_weights = to_device(gradients.top_k_weights, weights.device)[:, : weights.shape[1]].to(weights.dtype)
        return grad_x, None, grad_weights, None, None, *lora


def _like(gradients: Gradients, like: list[tuple[torch.Size, torch.dtype, torch.device]]) -> list[Tensor]:
    """LoRA gradients of a backward that computed nothing: zero for no tokens, else NaN as the gradient that came in."""
    value = float("nan") if len(gradients.hidden_states) else 0.0
    return [torch.full(shape, value, device=device) for shape, _, device in like]
