"""`ExpertMlps`: a list of MLPs taken for what it computes, and its weights stacked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..gates import ACTIVATIONS, Gate
from ..gates.probe import gate_of

# Gate, up and down: as most code calls them, and as Mixtral's of transformers 4. Without a gate there are two.
_NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ("up_proj", "down_proj"))
_ROWS = 8


@dataclass(frozen=True)
class ExpertMlps:
    """The experts of a block, one module each.

    Attributes:
        modules: The experts, in the order of their ids; all have the same sizes.
        names: The names of their `Linear` layers: gate, up and down, or up and down without a gate.
        gate: What an expert computes between its products.
    """

    modules: Sequence[nn.Module]
    names: tuple[str, ...]
    gate: Gate

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Experts E, hidden size H, intermediate size I."""
        down = self._linear(0, self.names[-1])
        return len(self.modules), down.out_features, down.in_features

    @property
    def dtypes(self) -> set[torch.dtype]:
        """The dtypes of the weights."""
        return {self._linear(e, name).weight.dtype for e in range(len(self.modules)) for name in self.names}

    def stacked(self) -> tuple[Tensor, Tensor]:
        """The weights as fused experts have them; the modules are left with empty ones.

        Memory holds an expert twice at a time, not a layer.

        Returns:
            The gates' rows above the up-projections', [E, 2I, H] ([E, I, H] without a gate); and down, [E, H, I].
        """
        E, H, I = self.sizes  # noqa: E741
        like = self._linear(0, self.names[0]).weight
        above = torch.empty(E, I * (len(self.names) - 1), H, dtype=like.dtype, device=like.device)
        down = torch.empty(E, H, I, dtype=like.dtype, device=like.device)
        for e in range(E):
            *first, last = (self._linear(e, name) for name in self.names)
            for rows, layer in zip(above[e].split(I), first, strict=True):
                rows.copy_(layer.weight.detach())
            down[e].copy_(last.weight.detach())
            for layer in (*first, last):
                layer.weight = nn.Parameter(like.new_empty(0), requires_grad=False)
        return above, down

    def _linear(self, e: int, name: str) -> nn.Linear:
        layer = getattr(self.modules[e], name)
        assert isinstance(layer, nn.Linear)
        return layer


def expert_mlps(experts: nn.Module) -> ExpertMlps | None:
    """A list of MLPs that can be computed together.

    Told by its structure: each has the same `Linear` layers and no other parameters, and computes what its gate says,
    which is tried out on random rows unless the weights are on the meta device.

    Args:
        experts: Any module.

    Returns:
        The experts; None for what is no such list.
    """
    if not isinstance(experts, nn.ModuleList) or len(experts) < 2:
        return None
    names = _names(experts[0])
    if names is None or any(_names(module) != names for module in experts):
        return None
    if len({tuple(getattr(module, name).weight.shape for name in names) for module in experts}) != 1:
        return None
    gate = _gate(experts[0], names)
    return None if gate is None else ExpertMlps(list(experts), names, gate)


def _names(mlp: nn.Module) -> tuple[str, ...] | None:
    """The names of an MLP's layers, in order, if it is made of nothing else that has weights."""
    held = {name for name, _ in mlp.named_parameters()} | {name for name, _ in mlp.named_buffers()}
    for names in _NAMES:
        layers = [getattr(mlp, name, None) for name in names]
        if held == {f"{name}.weight" for name in names} and all(type(layer) is nn.Linear for layer in layers):
            *first, down = (layer.weight.shape for layer in layers if isinstance(layer, nn.Linear))
            if {tuple(shape) for shape in first} == {(down[1], down[0])}:
                return names
    return None


def _gate(mlp: nn.Module, names: tuple[str, ...]) -> Gate | None:
    """What an MLP computes between its products, None if it is none of those known."""
    gated = len(names) == 3
    named = gate_of(_Named(mlp)) if gated else None
    first = getattr(mlp, names[0]).weight
    if first.is_meta:
        return named[0] if named else None
    candidates = ([named[0]] if named else []) + [Gate(name, gated=gated) for name in ACTIVATIONS]
    generator = torch.Generator(first.device).manual_seed(0)
    x = torch.randn(_ROWS, first.shape[1], generator=generator, device=first.device).to(first.dtype)
    with torch.no_grad():
        try:
            wanted = mlp(x)
        except Exception:  # the model's code, which may want anything
            return None
        gu = torch.cat([linear(x, getattr(mlp, name).weight) for name in names[:-1]], -1)
        for gate in candidates:
            if same(linear(gate.applied(gu), getattr(mlp, names[-1]).weight), wanted):
                return gate
    return None


class _Named(nn.Module):
    """An MLP's activation by the name that the probe asks for, whatever the MLP calls it."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        functions = [value for value in vars(mlp).values() if callable(value)]
        modules = [child for child in mlp.children() if not list(child.parameters())]
        self.act_fn = next(iter([*modules, *functions]), None)


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of a floating dtype differ by its rounding alone."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    limit = max(4 * torch.finfo(one.dtype).eps, 1e-5)
    return bool((one - other).abs().max() <= limit * other.abs().max())
