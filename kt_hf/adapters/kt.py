"""kt: what training saves. PEFT's own layout, with each projection of the experts one module.

    base_model.model.model.layers.{L}.mlp.experts.{gate,up,down}_proj.lora_A.weight   A [E, r, in]
    base_model.model.model.layers.{L}.mlp.experts.{gate,up,down}_proj.lora_B.weight   B [E, out, r]

Ranks and alphas are those of adapter_config.json for these module names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ..errors import KTAMXError
from ..shapes import ALIASES, PROJECTIONS
from ..system.files import Lazy, Part, part
from .adapter import PREFIX, Adapter, patterns, rank_alpha

KEY = re.compile(r"(.*\.\d+\.(?:.*\.)?experts)\.(gate_proj|up_proj|down_proj)\.lora_([AB])\.weight$")


def matches(key: str, tensor: Lazy) -> bool:
    """Whether a tensor is LoRA of a whole stack of experts under kt's name: [E, R, in] or [E, out, R]."""
    return bool(KEY.match(key)) and len(tensor.shape) == 3


def read(adapter: Adapter, tensors: dict[str, Lazy]) -> None:
    """Fill an adapter from the tensors of a kt file."""
    pairs: dict[tuple[str, str], dict[str, Lazy]] = {}
    for key, tensor in tensors.items():
        match = KEY.match(key)
        if match and len(tensor.shape) == 3:
            pairs.setdefault((match[1].removeprefix(PREFIX), match[2]), {})[match[3]] = tensor
        else:
            adapter.others[key] = tensor
    for (experts, name), pair in pairs.items():
        add_pair(adapter, experts, name, pair)


def add_pair(adapter: Adapter, experts: str, name: str, pair: dict[str, Lazy]) -> None:
    """Add a projection of the rank and alpha that the config gives its module.

    Raises:
        KTAMXError: A or B is missing.
    """
    for side in "AB":
        if side not in pair:
            raise KTAMXError(f"{adapter.where}: {experts}.{name} has no lora_{side}.")
    adapter.add(experts, name, pair["A"], pair["B"], *rank_alpha(adapter.config, f"{experts}.{name}"))


def parts(adapter: Adapter) -> Iterator[Part]:
    """The tensors of a kt file."""
    for key, tensor in adapter.tensors():
        yield part(key, tensor)


def config(adapter: Adapter) -> dict[str, Any]:
    """adapter_config.json of the same adapter as kt."""
    if adapter.format == "kt":
        return dict(adapter.config)
    # kt-kernel's trainer excludes the experts from PEFT, for it keeps their LoRA elsewhere.
    result = {**adapter.config, "exclude_modules": None}
    targets = result.get("target_modules")
    # Of stock PEFT's parameters, the router stays one; linear layers and experts are modules.
    taken = {*PROJECTIONS, "gate_up_proj"}
    kept = [p for p in result.get("target_parameters") or [] if p.endswith(".weight") and p.split(".")[-2] not in taken]
    result["target_parameters"] = kept or None
    if adapter.format == "peft" or not isinstance(targets, list):
        modules = {m for m in adapter.modules() if not any(f".{m}.weight".endswith(f".{p}") for p in kept)}
        result["target_modules"] = sorted({*modules, *adapter.experts})
    else:
        # w1, w2 and w3 are Mixtral's experts and nothing else.
        names = {ALIASES.get(name.rsplit(".", 1)[-1], name) for name in targets}
        experts = {one.name for one in adapter.experts.values()}
        result["target_modules"] = sorted(names | {f"experts.{name}" for name in experts - names})
    for key in ("rank_pattern", "alpha_pattern"):
        old = result.get(key) or {}
        result[key] = {k: v for k, v in old.items() if "gate_up_proj" not in k and not k.endswith(".weight")}
    patterns(result, {module: (one.rank, one.alpha) for module, one in adapter.experts.items()})
    return result
