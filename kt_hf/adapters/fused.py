"""fused: kt-kernel's own names (`fused_expert_lora.safetensors`, of ktransformers), and SGLang's `.pt` for kt experts.

    layers.{L}.experts.{gate,up,down}_lora_a     A [E, r, in]        of fused_expert_lora.safetensors
    layers.{L}.experts.{gate,up,down}_lora_b     B [E, out, r]

The tensors are those of kt under other names. In an adapter's folder the file lies beside adapter_model.safetensors,
which then holds the LoRA of everything but the experts; r and lora_alpha are those of adapter_config.json, which
ktransformers' converter takes for all.

The `.pt` is a pickled dict of the experts alone, as SGLang's kt experts load it (format of kt-kernel's
convert_moe_lora.py). It has one rank and one alpha for all:

    {"metadata": {lora_rank, lora_alpha, num_layers (with experts), num_experts, hidden_size, intermediate_size},
     "layer_{L}": {gate_lora_a, gate_lora_b, up_lora_a, up_lora_b, down_lora_a, down_lora_b}}

A projection that was not trained is all zeros. In both r and lora_alpha are one for all (`uniform`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..errors import KTAMXError
from ..shapes import PROJECTIONS
from ..system.files import Lazy, Part, part, replacing
from .adapter import PREFIX, Adapter, Projection
from .kt import add_pair
from .uniform import uniform

FILE = "fused_expert_lora.safetensors"
KEY = re.compile(r"layers\.(\d+)\.experts\.(gate|up|down)_lora_([ab])$")


def read(adapter: Adapter, fused: dict[str, Lazy], others: dict[str, Lazy]) -> None:
    """Fill an adapter from the tensors of a fused file, and of adapter_model.safetensors beside it.

    Raises:
        KTAMXError: A key of another form; A or B is missing.
    """
    adapter.others.update(others)
    # What stands before "layers." is not in the keys: that of the other tensors, or what most models have.
    roots = {match[1] for key in others if (match := re.match(rf"{re.escape(PREFIX)}(.*?)layers\.\d+\.", key))}
    root = roots.pop() if len(roots) == 1 else "model."
    pairs: dict[tuple[str, str], dict[str, Lazy]] = {}
    for key, tensor in fused.items():
        match = KEY.match(key)
        if match is None or len(tensor.shape) != 3:
            raise KTAMXError(
                f"{adapter.where}: {key} {tensor.shape} is not layers.<L>.experts.<gate|up|down>_lora_<a|b> of 3 dims."
            )
        place = f"{root}layers.{match[1]}.mlp.experts", f"{match[2]}_proj"
        pairs.setdefault(place, {})[match[3].upper()] = tensor
    for (experts, name), pair in pairs.items():
        add_pair(adapter, experts, name, pair)


def parts(adapter: Adapter) -> Iterator[Part]:
    """The tensors of fused_expert_lora.safetensors."""
    for one in adapter.experts.values():
        stem = f"layers.{one.layer}.experts.{one.name.removesuffix('_proj')}_lora"
        yield part(f"{stem}_a", one.a)
        yield part(f"{stem}_b", one.b)


def other_parts(adapter: Adapter) -> Iterator[Part]:
    """The tensors of adapter_model.safetensors beside it."""
    for key, tensor in adapter.others.items():
        yield part(key, tensor)


def config(adapter: Adapter) -> dict[str, Any]:
    """adapter_config.json, the experts named as kt names them."""
    from . import kt

    return kt.config(adapter)


def write_sglang(adapter: Adapter, path: Path) -> None:
    """Write SGLang's `.pt`. A pickle is made in one go, so the experts' LoRA is in memory as a whole.

    Raises:
        KTAMXError: There is no expert LoRA, or two towers of the model have layers of the same number.
    """
    layers = adapter.layers()
    if not layers:
        raise KTAMXError(f"{adapter.where} holds no LoRA of experts.")
    alone = uniform(replace(adapter, others={}))
    loras, layers = list(alone.experts.values()), alone.layers()
    rank = loras[0].rank
    experts, hidden, inner = _sizes(loras)
    content: dict[str, Any] = {
        "metadata": {
            "lora_rank": rank,
            "lora_alpha": alone.config["lora_alpha"],
            "num_layers": len(layers),
            "num_experts": experts,
            "hidden_size": hidden,
            "intermediate_size": inner,
        }
    }
    dtype = loras[0].a.dtype
    for name, projections in layers.items():
        key = f"layer_{next(iter(projections.values())).layer}"
        if key in content:
            raise KTAMXError(f"{adapter.where}: two modules would be {key}, the second is {name}.")
        content[key] = {}
        for projection in PROJECTIONS:
            into, out = (inner, hidden) if projection == "down_proj" else (hidden, inner)
            one = projections.get(projection)
            if one is None:
                a, b = torch.zeros(experts, rank, into, dtype=dtype), torch.zeros(experts, out, rank, dtype=dtype)
            else:
                a, b = one.a.load(), one.b.load()
            stem = projection.removesuffix("_proj")
            content[key] |= {f"{stem}_lora_a": a, f"{stem}_lora_b": b}
    with replacing(path) as temporary:
        torch.save(content, temporary)


def _sizes(loras: list[Projection]) -> tuple[int, int, int]:
    """Experts, hidden size, intermediate size."""
    one = loras[0]
    into, out = one.a.shape[2], one.b.shape[1]
    return (one.a.shape[0], out, into) if one.name == "down_proj" else (one.a.shape[0], into, out)
