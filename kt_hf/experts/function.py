"""The autograd function of an expert layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.transfer import to_device
from ..errors import KTAMXBackwardError
from .lora_tensors import LoraTensors
from .runner import ExpertsRunner


class ExpertsFunction(torch.autograd.Function):
    """Experts as one differentiable function: hidden states, routing weights and the LoRA parameters have gradients.

    `apply` takes
    x: [T, H], any floating dtype and device;
    ids: [T, K] integers;
    weights: [T, K], floating;
    runner: the layer's `ExpertsRunner`, whose backend holds the LoRA values already;
    lora: the `LoraTensors` that those values were made of;
    *parameters: `lora.parameters`, for autograd to see,
    and returns [T, H] in x's dtype and on its device.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, ids: Tensor, weights: Tensor, runner: ExpertsRunner, lora: LoraTensors, *parameters: Tensor
    ) -> Tensor:
        """Compute the layer, and keep the inputs and the ticket for the backward. Arguments are those of `apply`."""
        out, ticket = runner.forward(x, ids, weights, save=True)
        assert ticket is not None
        ctx.runner, ctx.ticket, ctx.lora = runner, ticket, lora
        # The number travels as a saved tensor: under non-reentrant checkpointing the one that arrives in backward is
        # the recompute's, and touching the saved tensors is what sets the recompute off.
        ctx.save_for_backward(x, ids, weights, torch.tensor(ticket.number, device="cpu"))
        ctx.like = [(parameter.device, parameter.dtype) for parameter in parameters]
        return out.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, the routing weights and the LoRA parameters; None for every other argument.

        Raises:
            KTAMXBackwardError: create_graph=True, a second backward without retain_graph, or a gradient that is not
                finite though `grad_outputs` is.
        """
        if torch.is_grad_enabled():
            raise KTAMXBackwardError(
                f"{ctx.runner.label}: create_graph=True is not supported, experts have no second derivatives."
            )
        x, ids, weights, number = ctx.saved_tensors
        needed = ctx.needs_input_grad
        lora = ctx.lora if any(needed[5:]) else None
        grad_x, grad_weights, grad_lora = ctx.runner.backward(
            ctx.ticket, int(number), x, ids, weights, grad_outputs[0], lora
        )
        gradients: list[Tensor | None] = [None] * len(ctx.like)
        for i, (grad, like) in enumerate(zip(grad_lora, ctx.like, strict=bool(grad_lora))):
            if needed[5 + i]:
                gradients[i] = grad.to(*like)
        grad_x = to_device(grad_x, x.device).to(x.dtype) if needed[0] else None
        if needed[2]:
            grad_weights = to_device(grad_weights, weights.device)[:, : weights.shape[1]].to(weights.dtype)
        return grad_x, None, grad_weights if needed[2] else None, None, None, *gradients
