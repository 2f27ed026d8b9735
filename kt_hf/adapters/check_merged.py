"""A merged checkpoint beside its base and the adapter: names, shapes and every value, W + s·B·A in double precision.

Which of the model's weights a tensor of the base holds is asked of the same table as when merging; the arithmetic is
written out here once more. In memory are one tensor of the base and the one written, and LoRA of a layer's experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint.model_names import ModelTensor
from ..checkpoint.tensor_files import SINGLE, read_index, stored_tensors
from ..errors import KTAMXError
from ..system.files import Lazy
from .adapter import Adapter, Projection
from .base_names import BaseNames
from .check_values import other_values
from .embeddings import plan_embeddings
from .low_bit_base import widened
from .merge import Merger

Shapes = Mapping[str, tuple[int, ...]]


class MergedCheck:
    """What a merged checkpoint must hold.

    Args:
        source: The adapter.
        base: Folder of the base model.

    Attributes:
        tensors: Of the base by name, widened if they are of low bits.
        more: Tensors that the base does not have, by name.
    """

    def __init__(self, source: Adapter, base: Path) -> None:
        self.source = source
        shards = list(dict.fromkeys(read_index(base).values())) or [SINGLE]
        stored = {shard: stored_tensors(base / shard) for shard in sorted(shards)}
        content = widened(base, stored) or stored
        self._names = BaseNames(base)
        self._plan = plan_embeddings(source, self._names, content, base)
        self._merger = Merger(source, self._names, self._plan)
        self.tensors: dict[str, Lazy] = {name: one for shard in content.values() for name, one in shard.items()}
        added = [part for parts in self._plan.added.values() for part in parts]
        self.more = {name: part for part in added for name in part.specs}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all tensors."""
        parts = {**self.more, **self._plan.parts}
        planned = {name: shape for part in parts.values() for name, (_, shape) in part.specs.items()}
        return {name: tensor.shape for name, tensor in self.tensors.items()} | planned

    def compare(self, file: Path, written: Mapping[str, Lazy]) -> None:
        """Compare the tensors of one file.

        Args:
            file: For messages.
            written: Its tensors.

        Raises:
            KTAMXError: One is not what base and adapter give.
        """
        for name, tensor in written.items():
            for found, expected, weight in self._pieces(name, tensor):
                if not _near(found, expected, weight):
                    raise KTAMXError(other_values(file, name, self.source))

    def _pieces(self, name: str, tensor: Lazy) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """(what is written, what it should be, the base's weight where that was computed) of all of a tensor."""
        part = self._plan.parts.get(name) or self.more.get(name)
        if part is not None:
            yield tensor.load(), next(iter(part.make())), None
            return
        base = self.tensors[name]
        target = self._names.find(name, base.shape)
        loras = [self._lora(target, projection) for projection in target.projections]
        if any(loras):
            yield from self._of_experts(target, loras, tensor.load(), base.load())
            return
        change, weight = self._merger.change(name, base), base.load()
        yield tensor.load(), weight if change is None else change(weight.clone()), None if change is None else weight

    def _lora(self, target: ModelTensor, projection: str) -> Projection | None:
        names = (target.module, f"model.{target.module}", target.module.removeprefix("model."))
        loras = [self.source.experts.get(f"{name}.{projection}") for name in names]
        return next((one for one in loras if one), None)

    def _of_experts(
        self, target: ModelTensor, loras: list[Projection | None], found: Tensor, weight: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Each expert's projections by themselves."""
        sides = [None if one is None else (one.a.load(), one.b.load(), one.scaling) for one in loras]
        first = next(side for side in sides if side)
        if target.expert is not None:
            found, weight = found[None], weight[None]
        elif target.flat:
            count = len(first[0])
            found, weight = (one.view(count, -1, one.shape[-1]) for one in (found, weight))
        for index, (new, old) in enumerate(zip(found, weight, strict=True)):
            expert = index if target.expert is None else target.expert
            if target.transposed:
                new, old = new.T, old.T
            for place, side in enumerate(sides):
                step = slice(place, None, len(sides))
                rows = slice(place * len(old) // len(sides), (place + 1) * len(old) // len(sides))
                of_new, of_old = (one[step if target.interleaved else rows] for one in (new, old))
                expected = of_old.double()
                if side is not None:
                    expected = expected + side[2] * (side[1][expert].double() @ side[0][expert].double())
                yield of_new, expected, of_old


def _near(found: Tensor, expected: Tensor, weight: Tensor | None) -> bool:
    """Equal to the bit, or where something was added as near as rounding once gives it."""
    if found.shape != expected.shape or not found.is_floating_point() or weight is None:
        return found.dtype == expected.dtype and torch.equal(found, expected)
    kind, exact = torch.finfo(found.dtype), expected.double()
    # Half a step of the dtype, and fp32's rounding of products and sum, which may cancel.
    slack = 1e-6 * float(exact.abs().max() + weight.double().abs().max()) + kind.smallest_normal * kind.eps
    return bool(((found.double() - exact).abs() <= exact.abs() * kind.eps / 2 + slack).all())
