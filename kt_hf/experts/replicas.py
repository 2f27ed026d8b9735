"""Where several hosts hold the same experts: the mean over hosts of the gradients of their LoRA.

A rank's gradients of the LoRA it owns are of the tokens of its host. They are averaged with those of its replicas on
other hosts once a step, before anything is done with them: before the norm is taken, else before the optimizer's step.
So nothing crosses the network for a micro-batch, and however gradients were accumulated the mean is right.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..ranks import Kind, PendingMean, Place, Ranks
from .exchange import DIVIDED

_AHEAD = 2  # layers on their way, each with a copy of its gradients
_hooks: list[Any] = []


def watch_steps() -> None:
    """Have gradients averaged before any optimizer's step that takes LoRA of several hosts, once a process."""
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_before_step))


def _before_step(optimizer: Any, *_: Any) -> None:
    if any(layer.exchange.unaveraged for layer in DIVIDED):
        average_over_hosts(p for group in optimizer.param_groups for p in group["params"])


def average_over_hosts(parameters: Iterable[Tensor]) -> None:
    """Average the gradients of owned LoRA with those of the same experts on other hosts, if that is still to be done.

    All ranks call it together, after the backward that ends a step; `clip_grad_norm_` and optimizers do it themselves.

    Args:
        parameters: Of the model, or of the optimizer that will use the gradients.

    Raises:
        KTAMXError: Another rank is not here, has failed or has ended.
    """
    fresh = [layer for layer in DIVIDED if layer.exchange.unaveraged]
    if not fresh:
        return
    ids = {id(parameter) for parameter in parameters}
    by_ranks: dict[int, tuple[Ranks, list[Any]]] = {}
    for layer in fresh:
        if any(id(parameter) in ids for parameter in layer.parameters()):
            by_ranks.setdefault(layer.exchange.ranks.serial, (layer.exchange.ranks, []))[1].append(layer)
    for _, (ranks, layers) in sorted(by_ranks.items()):
        _average(ranks, sorted(layers, key=lambda layer: int(layer.layer_idx)))


def _average(ranks: Ranks, layers: list[Any]) -> None:
    ranks.agree(Place(Kind.REPLICAS, layers[0].layer_idx, columns=len(layers)))
    under_way: deque[tuple[list[nn.Parameter], PendingMean]] = deque()
    for layer in layers:
        parameters = [p for p in layer.parameters() if p.grad is not None]
        layer.exchange.unaveraged = False
        if parameters:
            flat = torch.cat([p.grad.detach().flatten().float() for p in parameters])
            place = Place(Kind.REPLICAS, layer.layer_idx, label=layer.label)
            under_way.append((parameters, ranks.mean_of_replicas(flat, place)))
        if len(under_way) > _AHEAD:
            _take(*under_way.popleft())
    while under_way:
        _take(*under_way.popleft())


def _take(parameters: list[nn.Parameter], pending: PendingMean) -> None:
    parts = pending.wait().split([p.numel() for p in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        assert parameter.grad is not None
        parameter.grad.copy_(part.view_as(parameter.grad))
