"""per-expert: a module for each expert, as transformers 4 has them and vLLM, SGLang and llama.cpp's converter read.

    base_model.model.model.layers.{L}.mlp.experts.{e}.{gate,up,down}_proj.lora_A.weight             A_e [r, in]
    base_model.model.model.layers.{L}.mlp.experts.{e}.{gate,up,down}_proj.lora_B.weight             B_e [out, r]
    base_model.model.model.layers.{L}.block_sparse_moe.experts.{e}.{w1,w3,w2}.lora_{A,B}.weight     the same, Mixtral

A_e is A[e] of kt, B_e is B[e]. The readers take one r and one lora_alpha for all (`uniform`). PEFT on transformers 5
fuses these keys itself on loading an unpatched model (where it leaves shared experts and dense MLPs out, for it takes
their names for the experts').
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch

from ..errors import KTAMXError
from ..shapes import ALIASES
from ..system.files import Lazy, Part, part
from .adapter import PREFIX, Adapter
from .kt import add_pair

_NAMES = {**ALIASES, "gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"}
KEY = re.compile(rf"(.*\.\d+\.(?:.*\.)?experts)\.(\d+)\.({'|'.join(_NAMES)})\.lora_([AB])(?:\.default)?\.weight$")
_HUB = {name: short for short, name in ALIASES.items()}


def matches(key: str, tensor: Lazy) -> bool:
    """Whether a tensor is LoRA of a single expert: [R, in] or [out, R], with the expert's number in its name."""
    return bool(KEY.match(key)) and len(tensor.shape) == 2


def read(adapter: Adapter, tensors: dict[str, Lazy]) -> None:
    """Fill an adapter from the tensors of a per-expert file.

    Raises:
        KTAMXError: An expert lacks a tensor that others have, or has it twice, or of another shape.
    """
    stacks: dict[tuple[str, str], dict[str, dict[int, Lazy]]] = {}
    mixtral = False
    for key, tensor in tensors.items():
        match = KEY.match(key)
        if match is None:
            adapter.others[key] = tensor
            continue
        mixtral |= match[3] in ALIASES
        # Where kt-kernel's trainer had wrapped the layer, its name has one step more.
        experts = match[1].removeprefix(PREFIX).replace("block_sparse_moe", "mlp").replace("original_moe.", "")
        sides = stacks.setdefault((experts, _NAMES[match[3]]), {"A": {}, "B": {}})
        if sides[match[4]].setdefault(int(match[2]), tensor) is not tensor:
            raise KTAMXError(f"{adapter.where}: {key} is there twice, under another spelling of its name.")
    if mixtral:
        _rename_patterns(adapter.config)
    # As many as there are, whatever their numbers: a number may be any.
    count = len({expert for sides in stacks.values() for side in sides.values() for expert in side})
    for (experts, name), sides in stacks.items():
        add_pair(
            adapter, experts, name, {side: _stack(adapter, experts, name, side, sides[side], count) for side in "AB"}
        )


def _stack(adapter: Adapter, experts: str, name: str, side: str, by_expert: dict[int, Lazy], count: int) -> Lazy:
    missing = sorted(set(range(count)) - set(by_expert))
    if missing:
        raise KTAMXError(
            f"{adapter.where}: {experts}.{missing[0]}.{name} has no lora_{side}, which other experts have "
            f"({len(missing)} of {count} experts lack it)."
        )
    shapes = {tensor.shape for tensor in by_expert.values()}
    dtypes = {tensor.dtype for tensor in by_expert.values()}
    if len(shapes) > 1 or len(dtypes) > 1:
        raise KTAMXError(
            f"{adapter.where}: lora_{side} of {experts}.*.{name} are of several shapes or dtypes: {shapes}."
        )
    ordered = [by_expert[expert] for expert in range(count)]
    return Lazy(dtypes.pop(), (count, *shapes.pop()), lambda: torch.stack([tensor.load() for tensor in ordered]))


def _rename_patterns(config: dict[str, Any]) -> None:
    for key in ("rank_pattern", "alpha_pattern"):
        renamed = {}
        for pattern, value in (config.get(key) or {}).items():
            for short, name in ALIASES.items():
                pattern = re.sub(rf"(^|[.\W]){short}$", rf"\g<1>{name}", pattern)
            renamed[pattern.replace("block_sparse_moe", "mlp")] = value
        config[key] = renamed


def _hub_name(experts: str, mixtral: bool) -> str:
    return experts.replace(".mlp.experts", ".block_sparse_moe.experts") if mixtral else experts


def parts(adapter: Adapter, mixtral: bool) -> Iterator[Part]:
    """The tensors of a per-expert file; `mixtral` for Mixtral's names."""
    for one in adapter.experts.values():
        name = _HUB[one.name] if mixtral else one.name
        for side, tensor in (("A", one.a), ("B", one.b)):
            specs = {
                f"{PREFIX}{_hub_name(one.experts, mixtral)}.{expert}.{name}.lora_{side}.weight": (
                    tensor.dtype,
                    tensor.shape[1:],
                )
                for expert in range(tensor.shape[0])
            }
            yield Part(specs, lambda tensor=tensor: tensor.load().unbind(0))  # type: ignore[misc]
    for key, tensor in adapter.others.items():
        yield part(key, tensor)


def config(adapter: Adapter, mixtral: bool) -> dict[str, Any]:
    """adapter_config.json; target_modules are the last parts of names, as servers expect. The adapter is `uniform`."""
    names = {one.name for one in adapter.experts.values()}
    targets = {_HUB[name] if mixtral else name for name in names}
    targets |= {module.rsplit(".", 1)[-1] for module in adapter.modules()}
    return {**adapter.config, "target_modules": sorted(targets), "target_parameters": None}
