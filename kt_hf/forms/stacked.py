"""What a model's stacked experts are like, read from the module: sizes, gate, how the matrices lie, how it is called.

Whatever the form, experts are computed from one layout: gate_up [E, 2I, H] with gate's rows before up's, and down
[E, H, I]. `Form.taken` brings a module's parameters to it.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from ..gates import ACTIVATIONS, Gate
from ..gates.probe import gate_of

# How a model calls its experts module.
#   routed:    hidden states [T, H], ids [T, K] and routing weights [T, K] give the weighted sum [T, H];
#   identity:  the same, where an id from E on means the token itself;
#   normed:    the same, where each expert's output goes through the module `post_expert_norm` before it is weighted;
#   batched:   the same with hidden states [B, S, H];
#   sliced:    every expert gets T rows, those of tokens that are not its own zero: [E*T, H] give [E*T, H].
#   listed:    it is a list of MLPs, of which each is called with rows of its own (`listed_mlps.py` beside this).
Call = Literal["routed", "identity", "normed", "batched", "sliced", "listed"]

_FLAT = {"w1", "v1", "w2"}


class TakenWeights(NamedTuple):
    """The parameters of a layer's experts in the one layout that is computed.

    Attributes:
        gate_up: [E, 2I, H], or [E, I, H] without a gate.
        down: [E, H, I].
        gate_up_bias: [E, 2I] in the order of gate_up's rows; None without.
        down_bias: [E, H]; None without.
    """

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None


@dataclass(frozen=True)
class Form:
    """What a module of stacked experts is like.

    Attributes:
        num_experts: Experts that have weights, E.
        hidden_size: H.
        intermediate_size: I.
        gate: How gate and up become the input of the down projection.
        call: How the model calls the module.
        transposed: Whether matrices are stored [in, out].
        interleaved: Whether gate and up take turns along gate_up's outputs, instead of gate coming first.
        biased: Whether both projections have biases.
        flat: Whether the matrices are w1, v1 and w2 of the child `mlp`, experts below each other in two dimensions.
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    gate: Gate
    call: Call = "routed"
    transposed: bool = False
    interleaved: bool = False
    biased: bool = False
    flat: bool = False

    @property
    def stored_otherwise(self) -> bool:
        """Whether the module's parameters must be laid out anew, or have biases."""
        return self.transposed or self.interleaved or self.biased or self.flat

    def taken(self, experts: Any) -> TakenWeights:
        """The module's parameters in the layout that is computed, detached.

        What is laid out so already is not copied. Else the layer's weights are in memory twice until the module's are
        released; beside them no more than one expert is.

        Args:
            experts: The module that this form was read from.
        """
        if self.flat:
            return self._taken_flat(experts.mlp)
        first = (experts.gate_up_proj if self.gate.gated else experts.up_proj).detach()
        down, E = experts.down_proj.detach(), self.num_experts
        first = first[:E]  # identity experts have rows there that nobody reads
        if self.transposed or self.interleaved:
            first = self._first(first)
        if self.transposed:
            down = _each(down, (self.hidden_size, self.intermediate_size), lambda matrix: matrix.t())
        if not self.biased:
            return TakenWeights(first, down, None, None)
        name = "gate_up_proj_bias" if self.gate.gated else "up_proj_bias"
        bias = getattr(experts, name).detach()
        return TakenWeights(first, down, self.apart(bias, 1), experts.down_proj_bias.detach())

    def _first(self, first: Tensor) -> Tensor:
        size = self.gate.halves * self.intermediate_size, self.hidden_size

        def turned(matrix: Tensor) -> Tensor:
            return self.apart(matrix.t().contiguous() if self.transposed else matrix, 0)

        return _each(first, size, turned)

    def apart(self, rows: Tensor, axis: int) -> Tensor:
        """Gate's rows before up's, where they take turns; others as they are.

        Args:
            rows: Any tensor that has gate_up's outputs along an axis.
            axis: That axis.
        """
        if not self.interleaved:
            return rows
        every = [rows.movedim(axis, 0)[first::2] for first in (0, 1)]
        return torch.cat(every).movedim(0, axis).contiguous()

    def _taken_flat(self, mlp: Any) -> TakenWeights:
        E, H, I = self.num_experts, self.hidden_size, self.intermediate_size  # noqa: E741
        gate, up, down = (getattr(mlp, name).detach().view(E, I, H) for name in ("w1", "v1", "w2"))
        gate_up = torch.cat([gate, up], 1)
        return TakenWeights(gate_up, _each(down, (H, I), lambda matrix: matrix.t()), None, None)


def holds_experts(module: nn.Module) -> bool:
    """Whether a module holds stacked matrices of experts, one of which a router would choose.

    Args:
        module: Any; its children do not count, but for `mlp` of `Form.flat`.
    """
    stacked = {name for name, p in module.named_parameters(recurse=False) if p.dim() == 3}
    return bool(stacked & {"gate_up_proj", "down_proj", "up_proj"}) or _is_flat(module)


def form_of(experts: Any, hidden_act: str | None = None) -> Form | str:
    """What a module of stacked experts is like, or why it cannot be computed, in words.

    Args:
        experts: A module that `holds_experts`; its parameters on any device, the meta device too.
        hidden_act: The activation that the model's configuration names, for the message.
    """
    if getattr(experts, "_is_expert_parallel", False):
        return "_is_expert_parallel=True: its experts are spread over processes"
    names = dict(experts.named_parameters(recurse=False))
    flat = _is_flat(experts)
    kind = _kind(set(names)) if not flat else (True, False)
    if kind is None:
        return f"parameters {sorted(names)} instead of gate_up_proj and down_proj (or up_proj and down_proj), with or without biases"  # fmt: skip # noqa: E501
    gated, biased = kind
    for flag, value in {"has_gate": gated, "has_bias": biased}.items():
        if getattr(experts, flag, value) != value:
            return f"{flag}={getattr(experts, flag)}, and its parameters are {sorted(names)}"
    gate = gate_of(experts.mlp if flat else experts)
    if gate is None:
        function = "_apply_gate" if hasattr(experts, "_apply_gate") else "act_fn"
        return (
            f"its gate ({function}, hidden_act={hidden_act!r}) is none of those known: {', '.join(ACTIVATIONS)}, with "
            "a limit, alpha, offset or soft cap"
        )
    in_turn = not getattr(experts, "is_concatenated", not gate[1])
    if in_turn != gate[1]:
        return f"is_concatenated={not in_turn}, and its _apply_gate takes gate and up otherwise"
    call = _call(experts, gate[0], biased)
    return _sized(experts, *gate, call, biased, flat)


def _kind(names: set[str]) -> tuple[bool, bool] | None:
    """(gated, biased) by the names of the parameters; None for names that are not known."""
    for gated, first in ((True, "gate_up_proj"), (False, "up_proj")):
        weights = {first, "down_proj"}
        for biased in (False, True):
            if names == weights | ({f"{name}_bias" for name in weights} if biased else set()):
                return gated, biased
    return None


def _call(experts: Any, gate: Gate, biased: bool) -> Call | str:
    """How the model calls the module; what is no `Call` says why that is not known."""
    forward = inspect.signature(type(experts).forward).parameters.values()
    taken = [p for p in forward if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(taken) == 2:  # itself and rows
        zero = torch.zeros(1, 2)
        if biased or not gate.gated or float(gate.with_derivatives(zero)[1].abs().max()):
            return "it takes a slice of rows for each expert, and its gate is not flat at zero"
        return "sliced"
    if getattr(experts, "has_post_expert_norm", False):
        norm = getattr(experts, "post_expert_norm", None)
        return "normed" if isinstance(norm, nn.Module) else "has_post_expert_norm=True without a post_expert_norm"
    return "identity" if isinstance(getattr(experts, "identity_expert", None), nn.Identity) else "routed"


def _sized(experts: Any, gate: Gate, interleaved: bool, call: Call | str, biased: bool, flat: bool) -> Form | str:
    if call not in get_args(Call):
        return call
    if flat:
        E, (rows, H) = experts.num_experts, experts.mlp.w1.shape
        if rows % E:
            return f"{rows} rows are not those of {E} experts"
        return Form(E, H, rows // E, gate, "batched", flat=True)
    first, down = experts.gate_up_proj if gate.gated else experts.up_proj, experts.down_proj
    (E, *outer), halves = down.shape, gate.halves
    if first.shape[0] != E and not (call == "identity" and first.shape[0] > E):
        return _misfit(experts, gate)
    for transposed in (False, True):
        H, I = reversed(outer) if transposed else outer  # noqa: E741
        wanted = (H, halves * I) if transposed else (halves * I, H)
        flag = getattr(experts, "is_transposed", None)
        if tuple(first.shape[1:]) == wanted and flag in (None, transposed):
            return Form(E, H, I, gate, call, transposed, interleaved, biased)  # type: ignore[arg-type]
    return _misfit(experts, gate)


def _misfit(experts: Any, gate: Gate) -> str:
    name = "gate_up_proj" if gate.gated else "up_proj"
    first, down = (tuple(getattr(experts, part).shape) for part in (name, "down_proj"))
    flag = f" (is_transposed={experts.is_transposed})" if hasattr(experts, "is_transposed") else ""
    return f"{name} {first} does not go with down_proj {down}{flag}"


def _is_flat(module: Any) -> bool:
    mlp = getattr(module, "mlp", None)
    parameters = dict(mlp.named_parameters()) if isinstance(mlp, nn.Module) else {}
    sizes = {tuple(p.shape) for p in parameters.values()}
    alike = set(parameters) == _FLAT and len(sizes) == 1 and len(next(iter(sizes))) == 2
    return alike and isinstance(getattr(module, "num_experts", None), int)


def _each(stack: Tensor, size: tuple[int, int], change: Any) -> Tensor:
    """A new stack of matrices of this size, each the change of one of `stack`."""
    changed = stack.new_empty(len(stack), *size)
    for target, matrix in zip(changed, stack, strict=True):
        target.copy_(change(matrix))
    return changed
