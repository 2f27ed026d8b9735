"""Device functions of Triton's for the gates of `kt_hf.gates.Gate`, with their derivatives, in fp32.

What a gate does not have is not compiled: the plain one is silu(g) * u and no more.
"""
# mypy: allow-untyped-defs
# ruff: noqa: SIM108
# (the kernels: their arguments are pointers and numbers of the GPU)

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ...gates import Gate


def constants(gate: Gate) -> tuple[Any, ...]:
    """What the kernels are compiled for, GATE below: activation, alpha, limit, clamps_after, up_offset and the caps."""
    return (
        gate.activation, gate.alpha, gate.limit, gate.clamps_after, gate.up_offset, gate.gate_cap, gate.up_cap,
    )  # fmt: skip


@triton.jit
def _tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def _silu(g, ALPHA: tl.constexpr, CAP: tl.constexpr):
    """The product of g (softly capped with CAP) and sigmoid(ALPHA g), and its derivative."""
    if ALPHA == 1.0:
        s = tl.sigmoid(g)
    else:
        s = tl.sigmoid(ALPHA * g)
    if CAP is None:
        a = g * s
        by_g = s
    else:
        t = _tanh(g / CAP)
        a = t * CAP * s
        by_g = s * (1 - t * t)
    if ALPHA == 1.0:
        by_g = by_g + a * (1 - s)  # silu'(g) = s (1 + g (1 - s))
    else:
        by_g = by_g + ALPHA * a * (1 - s)
    return a, by_g


@triton.jit
def _activation(g, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, CAP: tl.constexpr):
    """The activated g, and its derivative."""
    if ACTIVATION == "silu":
        a, by_g = _silu(g, ALPHA, CAP)
    elif ACTIVATION == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))  # (1 + tanh(z)) / 2 = sigmoid(2 z)
        a = g * s
        by_g = s + a * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * g * g)
    elif ACTIVATION == "gelu":
        below = 0.5 * (1 + tl.erf(g * 0.7071067811865476))
        a = g * below
        by_g = below + g * tl.exp(-0.5 * g * g) * 0.3989422804014327
    elif ACTIVATION == "relu2":
        positive = tl.maximum(g, 0.0)
        a = positive * positive
        by_g = 2 * positive
    else:
        tl.static_assert(ACTIVATION == "relu", "no such activation")
        a = tl.maximum(g, 0.0)
        by_g = tl.where(g > 0, 1.0, 0.0)
    return a, by_g


@triton.jit
def activated(g, GATE: tl.constexpr):
    """The activated gate, clamped if it is to be, and its derivative."""
    ACTIVATION: tl.constexpr = GATE[0]
    ALPHA: tl.constexpr = GATE[1]
    LIMIT: tl.constexpr = GATE[2]
    AFTER: tl.constexpr = GATE[3]
    CAP: tl.constexpr = GATE[5]
    if LIMIT is None:
        a, by_g = _activation(g, ACTIVATION, ALPHA, CAP)
    elif AFTER:
        free, slope = _activation(g, ACTIVATION, ALPHA, CAP)
        a = tl.minimum(free, LIMIT)
        by_g = tl.where(free < LIMIT, slope, 0.0)
    else:
        a, slope = _activation(tl.minimum(g, LIMIT), ACTIVATION, ALPHA, CAP)
        by_g = tl.where(g < LIMIT, slope, 0.0)
    return a, by_g


@triton.jit
def times_up(a, by_g, u, GATE: tl.constexpr):
    """The activated gate times its factor made of up, its derivative by g, and that by u."""
    LIMIT: tl.constexpr = GATE[2]
    OFFSET: tl.constexpr = GATE[4]
    CAP: tl.constexpr = GATE[6]
    if CAP is not None:
        t = _tanh(u / CAP)
        factor = t * CAP
        by_u = a * (1 - t * t)
    elif LIMIT is not None:
        factor = tl.minimum(tl.maximum(u, -LIMIT), LIMIT)
        by_u = tl.where(tl.abs(u) < LIMIT, a, 0.0)
    else:
        factor = u
        by_u = a
    if OFFSET != 0.0:
        factor = factor + OFFSET
    return a * factor, by_g * factor, by_u
