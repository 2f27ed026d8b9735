"""A least-squares line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LinearCost:
    """y = fixed + slope · x; `worst`, the largest distance of a point from it as a share of that point."""

    fixed: float
    slope: float
    worst: float


def fit(xs: Sequence[float], ys: Sequence[float]) -> LinearCost:
    n, middle, height = len(xs), sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - middle) ** 2 for x in xs)
    slope = sum((x - middle) * (y - height) for x, y in zip(xs, ys, strict=True)) / spread if n > 1 else 0.0
    fixed = height - slope * middle
    return LinearCost(fixed, slope, max(abs(fixed + slope * x - y) / y for x, y in zip(xs, ys, strict=True)))
