"""Which gate an experts module has, by what its code computes: neither its name nor its family's is asked.

The module's own function is called on a grid of gate and up values, and so is each gate that its numbers (limits,
alphas, caps) allow. The one that gives the same everywhere is the module's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .gate import ACTIVATIONS, PLAIN, Gate

_QUICK_GELU = 1.702  # gpt-oss' alpha, which code may have without naming it
# Of gate and of up: small, at the activations' bends, and far out, where an unknown clamp would show.
_VALUES = (0.0, 1e-3, 0.03, 0.1, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 5.5, 8.0, 12.0, 20.0, 50.0, 200.0, 1e3, 1e4)
_ROUNDING = 4e-6
_OneGate = Callable[[Tensor], Tensor]


def gate_of(experts: nn.Module) -> tuple[Gate, bool] | None:
    """The gate of an experts module.

    Args:
        experts: Fused experts, their parameters on any device, the meta device too. What is called is its `_apply_gate`
            if it has a gate and such a method, else its activation `act_fn` (or `activation_fn`); SiLU where it names
            none and is a class of Liger's, which knows no other.

    Returns:
        The gate, and whether gate and up lie interleaved in the rows of gate_up_proj; None if no known gate computes
        the same.
    """
    has_gate = getattr(experts, "has_gate", True)
    limits, alphas, caps = _numbers(experts)
    g, u = _grid([*limits, *caps])
    candidates = list(_candidates(limits, alphas, caps)) if has_gate else [
        Gate(name, gated=False) for name in ACTIVATIONS
    ]  # fmt: skip
    for interleaved in (False, True) if has_gate else (False,):
        rows = _rows(g, u, interleaved) if has_gate else g
        result = _called(_function(experts, has_gate), rows)
        if result is None or result.shape != g.shape:
            continue
        for gate in candidates:
            expected = gate.applied(torch.cat([g, u], -1) if has_gate else g)
            if _same(result, expected, g, u):
                return gate, interleaved
    return None


def _function(experts: Any, has_gate: bool) -> _OneGate | None:
    apply_gate = getattr(experts, "_apply_gate", None)
    if has_gate and callable(apply_gate) and not _is_default_without_activation(experts):
        return apply_gate
    activation = getattr(experts, "act_fn", None) or getattr(experts, "activation_fn", None)
    if activation is None and type(experts).__module__.startswith("liger_kernel."):
        activation = torch.nn.functional.silu
    if not callable(activation):
        return None
    if not has_gate:
        return activation

    def gated(gu: Tensor) -> Tensor:
        gate, up = gu.chunk(2, dim=-1)
        return activation(gate) * up

    return gated


def _is_default_without_activation(experts: Any) -> bool:
    return type(experts).__module__.startswith("liger_kernel.") and not hasattr(experts, "act_fn")


def _called(function: _OneGate | None, rows: Tensor) -> Tensor | None:
    """What the function gives; None if it takes no such rows: it may read weights that are on the meta device."""
    if function is None:
        return None
    try:
        with torch.no_grad():
            result = function(rows.clone())
    except Exception:  # the model's code, which may want anything
        return None
    return result if isinstance(result, Tensor) and not result.is_meta else None


def _numbers(experts: nn.Module) -> tuple[list[float], list[float], list[float]]:
    """Limits, alphas and caps that the module and the modules in it have as numbers, by what their names contain."""
    named: dict[str, list[float]] = {"limit": [], "alpha": [], "cap": []}
    for module in experts.modules():
        for name, value in vars(module).items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf"):
                for word, values in named.items():
                    if word in name and float(value) not in values:
                        values.append(float(value))
    return named["limit"], named["alpha"], named["cap"]


def _candidates(limits: list[float], alphas: list[float], caps: list[float]) -> Iterator[Gate]:
    yield PLAIN
    clamps = [(None, False), *((limit, after) for limit in limits for after in (False, True))]
    for name, (limit, after) in itertools.product(ACTIVATIONS, clamps):
        for alpha in dict.fromkeys((1.0, *alphas, _QUICK_GELU)) if name == "silu" else (1.0,):
            yield Gate(name, alpha, limit, after)
            yield Gate(name, alpha, limit, after, up_offset=1.0)
    for gate_cap, up_cap in itertools.product((None, *caps), (None, *caps)):
        yield Gate(gate_cap=gate_cap, up_cap=up_cap)


def _grid(edges: list[float]) -> tuple[Tensor, Tensor]:
    """Gates down and ups across, fp32 on the CPU: each value with each, also right below and above these edges."""
    positive = [*_VALUES, *(edge * factor for edge in edges for factor in (0.5, 0.9, 0.999, 1.001, 1.1, 2.0))]
    values = torch.tensor([*positive, *(-value for value in positive)], dtype=torch.float32, device="cpu")
    g, u = torch.meshgrid(values, values, indexing="ij")
    return g.contiguous(), u.contiguous()


def _rows(g: Tensor, u: Tensor, interleaved: bool) -> Tensor:
    return torch.stack([g, u], -1).flatten(-2) if interleaved else torch.cat([g, u], -1)


def _same(result: Tensor, expected: Tensor, g: Tensor, u: Tensor) -> bool:
    """Whether two results differ by fp32's rounding alone, be it of what was multiplied."""
    allowed = _ROUNDING * (expected.abs() + (g.abs() + 1) * (u.abs() + 1) * 1e-2 + 1e-2)
    return bool(((result.float() - expected).abs() <= allowed).all())
