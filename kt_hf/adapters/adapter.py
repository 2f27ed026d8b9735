"""What all adapter formats have in common: the experts' LoRA stacked by projection, everything else as it is.

In every format W' = W + s·B·A of each expert, with A [r, in], B [out, r] and s = lora_alpha / r (lora_alpha / sqrt(r)
with rsLoRA). Formats differ in how A and B of all experts are laid out and named, and in where r and alpha are written.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import KTAMXError
from ..shapes import PROJECTIONS
from ..system.files import Lazy

ADAPTER = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."


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
        return f"{self.experts}.{self.name}"

    @property
    def layer(self) -> int:
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
        found: dict[str, dict[str, Projection]] = {}
        for one in sorted(self.experts.values(), key=lambda p: (p.layer, PROJECTIONS.index(p.name))):
            found.setdefault(one.experts, {})[one.name] = one
        return found

    def add(self, experts: str, name: str, a: Lazy, b: Lazy, rank: int, alpha: float) -> None:
        """Take a projection's tensors; their shapes are checked by `check`."""
        scaling = scale(self.config, rank, alpha)
        self.experts[f"{experts}.{name}"] = Projection(experts, name, rank, alpha, scaling, a, b)

    def modules(self) -> dict[str, dict[str, Lazy]]:
        """Adapted modules other than experts: full name -> what PEFT calls the tensor ("lora_A.weight") -> tensor."""
        found: dict[str, dict[str, Lazy]] = {}
        for key, tensor in self.others.items():
            match = re.match(r"(.*)\.(lora_\w+?(?:\.weight)?)$", key.removeprefix(PREFIX))
            if match:
                found.setdefault(match[1], {})[match[2]] = tensor
        return found

    def check(self, finite: bool = False) -> None:
        """Everything that can be told from the adapter alone.

        Args:
            finite: Also read every tensor, and refuse one that is not finite.

        Raises:
            KTAMXError: A half of a pair is missing, shapes or ranks do not go together, layers differ, NaN.
        """
        layers = self.layers()
        self._check_complete(layers)
        sizes: dict[str, tuple[int, ...]] = {}
        for module, one in self.experts.items():
            experts, _, inside = one.a.shape if len(one.a.shape) == 3 else (0, 0, 0)
            outside = one.b.shape[1] if len(one.b.shape) == 3 else 0
            if one.a.shape != (experts, one.rank, inside) or one.b.shape != (experts, outside, one.rank):
                raise KTAMXError(
                    f"{self.where}: {module} has lora_A {one.a.shape} and lora_B {one.b.shape}; of rank {one.rank} (by "
                    f"{CONFIG}) they would be [experts, {one.rank}, in] and [experts, out, {one.rank}]."
                )
            # hidden and intermediate size, seen from either side
            size = (experts, inside, outside) if one.name != "down_proj" else (experts, outside, inside)
            if sizes.setdefault("experts", size) != size:
                raise KTAMXError(
                    f"{self.where}: {module} is of another size (experts, hidden, intermediate) = {size} than the "
                    f"projections before it, {sizes['experts']}: tensors of two models are mixed."
                )
        for name, tensors in self.modules().items():
            self._check_linear(name, tensors)
        self._check_known()
        if finite:
            for key, tensor in self.tensors():
                if tensor.dtype.is_floating_point and not bool(torch.isfinite(tensor.load()).all()):
                    raise KTAMXError(f"{self.where}: {key} holds values that are not finite.")

    def _check_complete(self, layers: Mapping[str, Mapping[str, Projection]]) -> None:
        """Every projection that the config names, in each layer of which something is there."""
        if self.format == "kt":
            wanted = {experts: self.targeted(experts) for experts in layers}
        else:
            names = {name for found in layers.values() for name in found}
            wanted = dict.fromkeys(layers, names)
        for experts, found in layers.items():
            missing = sorted(wanted[experts] - set(found))
            if missing:
                raise KTAMXError(f"{self.where}: {experts} has no LoRA of {', '.join(missing)}, which it should have.")

    def targeted(self, experts: str) -> set[str]:
        """The projections of a layer's experts that an adapter of format kt has by its config."""
        from peft import LoraConfig

        from .peft_names import targets

        keys = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
        config = LoraConfig(**{key: self.config[key] for key in keys if self.config.get(key)})
        return {name for name in PROJECTIONS if targets(config, f"{experts}.{name}")}

    def _check_known(self) -> None:
        """No whole weights but those the config names: PEFT would load any over the base model's."""
        adapted = {f"{module}.{tensor}" for module, found in self.modules().items() for tensor in found}
        saved = [*(self.config.get("modules_to_save") or []), "embed_tokens", "lm_head", "token_adapter"]
        for key in self.others:
            name = key.removeprefix(PREFIX)
            bias = name.endswith(".bias") and self.config.get("bias", "none") != "none"
            if name not in adapted and not bias and not any(f".{part}." in f".{name}." for part in saved):
                raise KTAMXError(f"{self.where}: {key} is no LoRA tensor, and not of modules_to_save.")

    def _check_linear(self, name: str, tensors: Mapping[str, Lazy]) -> None:
        a, b = tensors.get("lora_A.weight"), tensors.get("lora_B.weight")
        if (a is None) != (b is None):
            there = "A" if b is None else "B"
            raise KTAMXError(f"{self.where}: {name} has lora_{there} and not the other of the pair.")
        rank = rank_alpha(self.config, name)[0]
        if a is not None and b is not None and (a.shape[0], b.shape[1]) != (rank, rank):
            raise KTAMXError(
                f"{self.where}: {name} has lora_A {a.shape} and lora_B {b.shape}, but rank {rank} by {CONFIG}."
            )

    def tensors(self) -> Iterator[tuple[str, Lazy]]:
        for module, one in self.experts.items():
            yield f"{PREFIX}{module}.lora_A.weight", one.a
            yield f"{PREFIX}{module}.lora_B.weight", one.b
        yield from self.others.items()


def layer_of(name: str) -> int:
    match = re.search(r"\.(\d+)\.", f".{name}.")
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
    from .peft_names import of_pattern

    rank = of_pattern(config.get("rank_pattern"), module, config["r"])
    return int(rank), of_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])


def patterns(config: dict[str, Any], wanted: Mapping[str, tuple[int, float]]) -> None:
    """Write rank_pattern and alpha_pattern so that each of these modules has its (r, alpha), and others theirs.

    `wanted` holds every adapted module of a kind: one pattern then serves all layers where they agree.
    """
    kinds: dict[str, dict[str, tuple[int, float]]] = {}
    for module, value in wanted.items():
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


def read_config(path: Path) -> dict[str, Any]:
    """adapter_config.json.

    Raises:
        KTAMXError: It is missing, no JSON, or not that of a LoRA adapter which the formats can express.
    """
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise KTAMXError(f"{path} is missing.") from None
    except (ValueError, OSError) as error:
        raise KTAMXError(f"{path} cannot be read: {error}.") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise KTAMXError(f"{path}: peft_type={kind!r}, not LORA.")
    for key, kind in (("r", int), ("lora_alpha", (int, float))):
        value = config.get(key)
        if not isinstance(value, kind) or isinstance(value, bool) or value <= 0:
            raise KTAMXError(f"{path}: {key}={value!r} is not a positive number.")
    for key in ("use_dora", "lora_bias", "use_qalora", "fan_in_fan_out"):
        if config.get(key):
            raise KTAMXError(f"{path}: {key}={config[key]!r} is not supported with experts.")
    return config


@contextmanager
def nothing() -> Iterator[dict[str, Lazy]]:
    """In place of a file that need not be there."""
    yield {}
