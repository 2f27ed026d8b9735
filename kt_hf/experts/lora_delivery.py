"""Gradients of LoRA on their way from the GPU that computed them to parameters in host memory.

A layer's backward only begins the copies. A node of autograd between the layer and its parameters waits for them: what
it passes on is on the CPU, so autograd runs it on the thread that called `backward`, while the GPU's thread goes on
with the next layers. Everything that reads a parameter's gradient comes after that node: accumulation, hooks, the sum
where a parameter is used twice, `torch.autograd.grad`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.transfer import Arriving


class Delivery:
    """Gradients of one forward's LoRA parameters that are being copied to the CPU, one entry a backward."""

    def __init__(self) -> None:
        self._under_way: list[tuple[Arriving, Callable[[], Exception]]] = []

    def begin(self, arriving: Arriving, error: Callable[[], Exception]) -> list[Tensor]:
        """Take note of a backward's copies.

        Args:
            arriving: The gradients, and last a bool tensor [] that says whether they are finite.
            error: Makes the exception that `wait` raises if they are not.

        Returns:
            The gradients, which may be handed to autograd, but not be read before `wait`.
        """
        self._under_way.append((arriving, error))
        if torch.is_anomaly_enabled():  # autograd itself looks at what a backward returns then
            self.wait()
        return list(arriving.coming[:-1])

    def wait(self) -> None:
        """Wait until all gradients have arrived; raise the error of those that are not finite."""
        for entry in tuple(self._under_way):
            arriving, error = entry
            passed = arriving.wait()[-1]
            # Only now: another thread's backward through the same graph may ask meanwhile.
            if entry in self._under_way:
                self._under_way.remove(entry)
            if not passed:
                raise error()


def delivered(parameters: Sequence[nn.Parameter], delivery: Delivery) -> list[Tensor]:
    """The parameters as inputs of a layer whose backward uses `delivery`: views, behind the node that waits.

    Args:
        parameters: On the CPU. Those that need no gradient are returned as they are.
        delivery: Of the layer's forward.
    """
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    views = iter(_Arrive.apply(delivery, *wanted) if wanted else ())
    return [next(views) if parameter.requires_grad else parameter for parameter in parameters]


class _Arrive(torch.autograd.Function):
    """The identity, whose backward waits for the gradients that it passes on."""

    @staticmethod
    def forward(ctx: Any, delivery: Delivery, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.delivery = delivery
        ctx.set_materialize_grads(False)
        return tuple(parameter.view_as(parameter) for parameter in parameters)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.delivery.wait()
        return None, *gradients
