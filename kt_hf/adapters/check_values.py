"""The values of an exported adapter beside those of the training: what a reader multiplies is s·B·A of each module.

How a reader finds A, B and s of an expert is written out here once more; of the code that wrote the file nothing is
asked. In memory are the tensors of one layer's experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import KTAMXError
from ..shapes import PROJECTIONS
from .adapter import Adapter, Projection, rank_alpha, scale
from .check_shapes import is_mixtral, sglang_stem, single_stem, stacks
from .other_tensors import EMBEDDING, LINEAR
from .stock_forms import StockForms

Get = Callable[[str], Tensor]
Factor = Callable[[str], float]  # of a module's full name, the factor that the export's reader takes
_SIDES = dict((LINEAR, EMBEDDING))


@dataclass(frozen=True)
class Pair:
    """A [r, in] and B [out, r] of one module, and the factor before B·A."""

    a: Tensor
    b: Tensor
    scaling: float


@dataclass(frozen=True)
class Values:
    """Compares an export with the adapter that it was made from.

    Attributes:
        file: The export, for messages.
        source: The adapter of the training.
        get: Gives a tensor of the export by its name.
        factor: The factor that its reader takes.

    Each method raises KTAMXError for a tensor of other values.
    """

    file: Path
    source: Adapter
    get: Get
    factor: Factor

    def compare_others(self) -> None:
        """All but the experts: LoRA by its product, anything else to the bit."""
        names = {id(tensor): name for name, tensor in self.source.others.items()}
        pairs: set[str] = set()
        for module, parts in self.source.modules().items():
            scaling = scale(self.source.config, *rank_alpha(self.source.config, module))
            for side_a, side_b in _SIDES.items():
                if side_a in parts:
                    name_a, name_b = names[id(parts[side_a])], names[id(parts[side_b])]
                    expected = Pair(parts[side_a].load(), parts[side_b].load(), scaling)
                    found = Pair(self.get(name_a), self.get(name_b), self.factor(module))
                    self._same((name_a, name_b), found, expected)
                    pairs |= {name_a, name_b}
            bias = parts.get("lora_B.bias")
            if bias is not None:
                self._scaled(names[id(bias)], self.get(names[id(bias)]), bias.load(), scaling / self.factor(module))
                pairs.add(names[id(bias)])
        for name, tensor in self.source.others.items():
            if name not in pairs:
                self._equal(name, self.get(name), tensor.load())

    def compare_stacks(self, stem: Callable[[Projection], str], a: str, b: str) -> None:
        """Experts as [E, r, in] and [E, out, r], named by `stem` and what is after it."""
        for one in self.source.experts.values():
            names = f"{stem(one)}{a}", f"{stem(one)}{b}"
            stack_a, stack_b = self.get(names[0]), self.get(names[1])
            for expert, expected in enumerate(_experts(one)):
                self._same(names, Pair(stack_a[expert], stack_b[expert], self.factor(one.module)), expected, expert)

    def compare_single_experts(self, names: Mapping[str, Any]) -> None:
        """A module for each expert."""
        mixtral = is_mixtral(names)
        for one in self.source.experts.values():
            for expert, expected in enumerate(_experts(one)):
                stem = single_stem(one, expert, mixtral)
                pair = f"{stem}A.weight", f"{stem}B.weight"
                self._same(pair, Pair(self.get(pair[0]), self.get(pair[1]), self.factor(one.module)), expected)

    def compare_stock(self, forms: StockForms) -> None:
        """Stock PEFT's stacks: rows of A count experts first, columns of B the rank first."""
        for experts, stem, loras in stacks(self.source):
            form = forms.of(experts)
            parameter = "down_proj" if loras[0].name == "down_proj" else form.first
            rank, scaling = sum(one.rank for one in loras), self.factor(f"{experts}.{parameter}")
            names = f"{stem}A.weight", f"{stem}B.weight"
            rows, columns = self.get(names[0]), self.get(names[1])
            count, known = len(rows) // rank, {one.name: _experts(one) for one in loras}
            for expert in range(count):
                a, b = rows[expert * rank : (expert + 1) * rank], columns[:, expert::count]
                if form.exchanged:
                    a, b = b.T, a.T
                if expert >= loras[0].a.shape[0]:  # one that computes nothing
                    self._zero(names[1], b, expert)
                elif parameter != "gate_up_proj":
                    self._same(names, Pair(a, b, scaling), known[loras[0].name][expert], expert)
                else:
                    halves = (b[0::2], b[1::2]) if form.interleaved else b.chunk(2)
                    self._blocks(
                        names, a, halves, scaling, {name: pairs[expert] for name, pairs in known.items()}, expert
                    )

    def compare_untrained(self) -> None:
        """In SGLang's file projections without LoRA are zeros."""
        for projections in self.source.layers().values():
            layer = next(iter(projections.values())).layer
            for name in PROJECTIONS:
                if name not in projections:
                    label = f"{sglang_stem(layer, name)}b"
                    self._zero(label, self.get(label))

    def _blocks(
        self,
        names: tuple[str, str],
        a: Tensor,
        halves: tuple[Tensor, ...],
        scaling: float,
        pairs: Mapping[str, Pair],
        expert: int,
    ) -> None:
        """Gate and up in one: of each its own rows of A and columns of B, zeros in the other's columns."""
        begin = 0
        for half, name in zip(halves, PROJECTIONS[:2], strict=True):
            rank = len(pairs[name].a) if name in pairs else 0
            own = slice(begin, begin + rank)
            if name in pairs:
                self._same(names, Pair(a[own], half[:, own], scaling), pairs[name], expert)
            self._zero(names[1], half[:, :begin], expert)
            self._zero(names[1], half[:, begin + rank :], expert)
            begin += rank

    def _same(self, names: tuple[str, str], found: Pair, expected: Pair, expert: int | None = None) -> None:
        """A and B are the expected ones, and zeros where their rank is larger."""
        rank = len(expected.a)
        self._equal(names[0], found.a[:rank], expected.a, expert)
        self._zero(names[0], found.a[rank:], expert)
        self._zero(names[1], found.b[:, rank:], expert)
        self._scaled(names[1], found.b[:, :rank], expected.b, expected.scaling / found.scaling, expert)

    def _scaled(self, name: str, found: Tensor, expected: Tensor, ratio: float, expert: int | None = None) -> None:
        """A tensor times a ratio, rounded once; to the bit where that is one."""
        if math.isclose(ratio, 1, rel_tol=1e-9):
            self._equal(name, found, expected, expert)
            return
        exact, kind = expected.double() * ratio, torch.finfo(expected.dtype)
        near = (found.double() - exact).abs() <= exact.abs() * kind.eps + kind.smallest_normal * kind.eps
        if found.dtype != expected.dtype or found.shape != expected.shape or not bool(near.all()):
            self._refuse(name, expert)

    def _equal(self, name: str, found: Tensor, expected: Tensor, expert: int | None = None) -> None:
        if found.dtype != expected.dtype or not torch.equal(found, expected):
            self._refuse(name, expert)

    def _zero(self, name: str, found: Tensor, expert: int | None = None) -> None:
        if bool(found.any()):
            self._refuse(name, expert)

    def _refuse(self, name: str, expert: int | None) -> None:
        raise KTAMXError(other_values(self.file, name, self.source, expert))


def other_values(file: Path, name: str, source: Adapter, expert: int | None = None) -> str:
    """The message for a tensor of an export with other values than it should have."""
    which = "" if expert is None else f", expert {expert},"
    return f"{file}: {name}{which} is of other values than {source.where} gives. Export it again."


def _experts(one: Projection) -> list[Pair]:
    """LoRA of each expert, as it was trained."""
    a, b = one.a.load(), one.b.load()
    return [Pair(a[expert], b[expert], one.scaling) for expert in range(len(a))]


def by_pattern(config: Mapping[str, Any]) -> Factor:
    """As PEFT decides."""
    return lambda module: scale(config, *rank_alpha(config, module))


def by_two_numbers(alpha: float, rank: int) -> Factor:
    """lora_alpha / r for all."""
    return lambda module: alpha / rank
