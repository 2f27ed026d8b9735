"""What all adapter formats have in common: the experts' LoRA stacked by projection, everything else as it is.

In every format W' = W + s·B·A of each expert, with A [r, in], B [out, r] and s = lora_alpha / r (lora_alpha / sqrt(r)
with rsLoRA). Formats differ in how A and B of all experts are laid out and named, and in where r and alpha are written.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import KTAMXError
from ..peft_compat.internals import PREFIX, of_pattern, targets
from ..shapes import PROJECTIONS
from ..system.files import Lazy
from .other_tensors import EMBEDDING, LINEAR, OtherModule, sort_tensors

ADAPTER = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
FLOATING = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# What changes the mathematics of a LoRA layer, and experts do not have.
_VARIANTS = ("use_dora", "lora_bias", "use_qalora", "use_bdlora", "fan_in_fan_out")


@dataclass(frozen=True)
class Projection:
    """LoRA of one projection of all experts of a layer.

    Attributes:
        experts: Full module name of the layer's experts, "model.layers.3.mlp.experts".
        name: gate_proj, up_proj or down_proj.
        rank, alpha, scaling: r, lora_alpha, and the factor before B·A.
        a, b: [E, r, in] and [E, out, r].
    """

    experts: str
    name: str
    rank: int
    alpha: float
    scaling: float
    a: Lazy
    b: Lazy

    @property
    def module(self) -> str:
        """Full name of the projection, as `model.layers.0.mlp.experts.gate_proj`."""
        return f"{self.experts}.{self.name}"

    @property
    def layer(self) -> int:
        """The number of the decoder layer that the experts are in."""
        return layer_of(self.experts)


@dataclass
class Adapter:
    """An adapter of any format, unread.

    Attributes:
        where: File or folder it comes from, for messages.
        format: kt, peft, per-expert or fused.
        config: Contents of adapter_config.json.
        experts: Full module name, "model.layers.3.mlp.experts.gate_proj" -> LoRA.
        others: Every other tensor by its key, "base_model.model.….self_attn.q_proj.lora_A.weight".
    """

    where: Path
    format: str
    config: dict[str, Any]
    experts: dict[str, Projection] = field(default_factory=dict)
    others: dict[str, Lazy] = field(default_factory=dict)

    def layers(self) -> dict[str, dict[str, Projection]]:
        """Full name of a layer's experts -> projection name -> LoRA, in layer order."""
        layers: dict[str, dict[str, Projection]] = {}
        for one in sorted(self.experts.values(), key=lambda p: (p.layer, PROJECTIONS.index(p.name))):
            layers.setdefault(one.experts, {})[one.name] = one
        return layers

    def add(self, experts: str, name: str, a: Lazy, b: Lazy, rank: int, alpha: float) -> None:
        """Take a projection's tensors; their shapes are checked by `check`."""
        scaling = scale(self.config, rank, alpha)
        self.experts[f"{experts}.{name}"] = Projection(experts, name, rank, alpha, scaling, a, b)

    def other_modules(self) -> dict[str, OtherModule]:
        """What there is for modules other than experts, by full name.

        Raises:
            KTAMXError: A tensor that the config does not account for.
        """
        return sort_tensors(self.others, PREFIX, self.config, self.where)

    def modules(self) -> dict[str, dict[str, Lazy]]:
        """Adapted modules other than experts: full name -> what PEFT calls the tensor ("lora_A.weight") -> tensor."""
        return {name: module.lora for name, module in self.other_modules().items() if module.lora}

    def check(self, finite: bool = False) -> None:
        """Everything that can be checked by the adapter alone: what loading, exporting and saving refuse.

        Args:
            finite: Also read every tensor, and refuse one that is not finite.

        Raises:
            KTAMXError: A half of a pair is missing, shapes or ranks do not go together, layers differ, NaN.
        """
        variants = [name for name in _VARIANTS if self.config.get(name)]
        if self.experts and variants:
            name = variants[0]
            raise KTAMXError(f"{self.where}: {name}={self.config[name]!r} is not supported with experts.")
        layers = self.layers()
        self._check_complete(layers)
        sizes: dict[str, tuple[int, ...]] = {}
        for module, one in self.experts.items():
            experts, _, inside = one.a.shape if len(one.a.shape) == 3 else (0, 0, 0)
            outside = one.b.shape[1] if len(one.b.shape) == 3 else 0
            expected = (experts, one.rank, inside), (experts, outside, one.rank)
            if (one.a.shape, one.b.shape) != expected or not experts * inside * outside:
                raise KTAMXError(
                    f"{self.where}: {module} has lora_A {one.a.shape} and lora_B {one.b.shape}; of rank {one.rank} (by "
                    f"{CONFIG}) they would be [experts, {one.rank}, in] and [experts, out, {one.rank}]."
                )
            self._check_dtype(module, one.a, one.b)
            # hidden and intermediate size, seen from either side
            size = (experts, inside, outside) if one.name != "down_proj" else (experts, outside, inside)
            if sizes.setdefault("experts", size) != size:
                raise KTAMXError(
                    f"{self.where}: {module} is of another size (experts, hidden, intermediate) = {size} than the "
                    f"projections before it, {sizes['experts']}: tensors of two models are mixed."
                )
        for name, module_tensors in self.other_modules().items():
            self._check_other(name, module_tensors)
        if finite:
            for key, tensor in self.tensors():
                if tensor.dtype.is_floating_point and not bool(torch.isfinite(_wide(tensor.load())).all()):
                    raise KTAMXError(f"{self.where}: {key} holds values that are not finite.")

    def _check_complete(self, layers: Mapping[str, Mapping[str, Projection]]) -> None:
        """Every projection that the config names, in each layer of which something is there, and no other."""
        if self.format == "kt":
            expected = {experts: self.targeted(experts) for experts in layers}
        else:
            names = {name for projections in layers.values() for name in projections}
            expected = dict.fromkeys(layers, names)
        for experts, projections in layers.items():
            missing, more = sorted(expected[experts] - set(projections)), sorted(set(projections) - expected[experts])
            if missing:
                raise KTAMXError(f"{self.where}: {experts} has no LoRA of {', '.join(missing)}, which it should have.")
            if more:
                raise KTAMXError(
                    f"{self.where}: {experts} has LoRA of {', '.join(more)}, for which there is no target_modules in "
                    f"{CONFIG}: loading would drop it."
                )

    def targeted(self, experts: str) -> set[str]:
        """The projections of a layer's experts that an adapter of format kt has by its config.

        Raises:
            KTAMXError: Settings that do not go together.
        """
        from peft import LoraConfig

        target_modules = self.config.get("target_modules")
        if not target_modules:
            return set()
        if isinstance(target_modules, str) and target_modules.lower() == "all-linear":
            return set(PROJECTIONS)
        keys = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
        try:
            config = LoraConfig(**{key: self.config[key] for key in keys if self.config.get(key) is not None})
        except (ValueError, TypeError) as error:
            raise KTAMXError(f"{self.where}: {CONFIG}: {error}") from error
        return {name for name in PROJECTIONS if targets(config, f"{experts}.{name}")}

    def _check_other(self, name: str, module: OtherModule) -> None:
        rank = rank_alpha(self.config, name)[0]
        for side_a, side_b in (LINEAR, EMBEDDING):
            a, b = module.lora.get(side_a), module.lora.get(side_b)
            if (a is None) != (b is None):
                side = "A" if b is None else "B"
                raise KTAMXError(f"{self.where}: {name} has lora_{side} and not the other of the pair.")
            if a is None or b is None:
                continue
            self._check_dtype(name, a, b)
            if (
                min(len(a.shape), len(b.shape)) < 2
                or (a.shape[0], b.shape[1]) != (rank, rank)
                or 0 in a.shape + b.shape
            ):
                raise KTAMXError(
                    f"{self.where}: {name} has lora_A {a.shape} and lora_B {b.shape}, but rank {rank} by {CONFIG}."
                )
        if module.tokens is not None:
            self._check_dtype(name, module.tokens)
            rows = token_rows(self.config, name)
            if len(module.tokens.shape) != 2 or (rows is not None and len(rows) != module.tokens.shape[0]):
                raise KTAMXError(
                    f"{self.where}: {name} has {module.tokens.shape} for its retrained tokens, of which there are "
                    f"{len(rows or ())} by trainable_token_indices in {CONFIG}."
                )

    def _check_dtype(self, name: str, *tensors: Lazy) -> None:
        for tensor in tensors:
            if tensor.dtype not in FLOATING:
                raise KTAMXError(f"{self.where}: {name} is of {tensor.dtype}; an adapter is of bf16, fp16 or fp32.")

    def tensors(self) -> Iterator[tuple[str, Lazy]]:
        """Every tensor of the adapter, unread, by its key in a file of format kt."""
        for module, one in self.experts.items():
            yield f"{PREFIX}{module}.lora_A.weight", one.a
            yield f"{PREFIX}{module}.lora_B.weight", one.b
        yield from self.others.items()


def layer_of(name: str) -> int:
    """The first number that is a part of a module's name: its decoder layer. Without one it is a KTAMXError."""
    match = re.search(r"\.(\d{1,9})\.", f".{name}.")
    if match is None:
        raise KTAMXError(f"{name}: no layer number in the name.")
    return int(match[1])


def scale(config: Mapping[str, Any], rank: int, alpha: float) -> float:
    """The factor before B·A."""
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def alpha_for(config: Mapping[str, Any], rank: int, scaling: float) -> float:
    """The lora_alpha that gives the factor at this rank; whole where it is whole."""
    alpha = scaling * (math.sqrt(rank) if config.get("use_rslora") else rank)
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha


def rank_alpha(config: Mapping[str, Any], module: str) -> tuple[int, float]:
    """r and lora_alpha of a module, by the config's patterns, as PEFT decides."""
    rank = of_pattern(config.get("rank_pattern"), module, config["r"])
    return int(rank), of_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])


def patterns(config: dict[str, Any], ranks_alphas: Mapping[str, tuple[int, float]]) -> None:
    """Write rank_pattern and alpha_pattern so that each of these modules has its (r, alpha), and others theirs.

    `ranks_alphas` holds every adapted module of a kind: one pattern then serves all layers where they agree.
    """
    kinds: dict[str, dict[str, tuple[int, float]]] = {}
    for module, value in ranks_alphas.items():
        kind = re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(module))
        kinds.setdefault(kind, {})[module] = value
    new: tuple[dict[str, int], dict[str, float]] = {}, {}
    for kind, modules in kinds.items():
        for index in (0, 1):
            values = {module: value[index] for module, value in modules.items()}
            if all(rank_alpha(config, module)[index] == value for module, value in values.items()):
                continue
            if len(set(values.values())) == 1:
                new[index][kind] = next(iter(values.values()))  # type: ignore[assignment]
            else:
                new[index].update({re.escape(module): value for module, value in values.items()})  # type: ignore[misc]
    # PEFT takes the first that matches.
    config["rank_pattern"] = new[0] | (config.get("rank_pattern") or {})
    config["alpha_pattern"] = new[1] | (config.get("alpha_pattern") or {})


def token_rows(config: Mapping[str, Any], module: str) -> list[int] | None:
    """The rows of an embedding that `trainable_token_indices` retrains; None where it does not name the module."""
    indices = config.get("trainable_token_indices")
    if isinstance(indices, dict):
        return next((rows for name, rows in indices.items() if f".{module}".endswith(f".{name}")), None)
    return indices


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """For what PyTorch does not compute with 8 bits."""
    return tensor.float() if tensor.dtype.itemsize == 1 else tensor
