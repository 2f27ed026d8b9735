"""Names and shapes that the readers of an export expect, written out from the tensors of the training.

Those of a stock PEFT adapter are what PEFT itself makes on the base model.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..discovery import skeleton
from ..peft_compat.internals import PREFIX
from ..shapes import ALIASES, PROJECTIONS
from .adapter import Adapter, Projection
from .config_file import read_config
from .other_tensors import EMBEDDING, LINEAR

Shapes = dict[str, tuple[int, ...]]
_SHORT = {name: short for short, name in ALIASES.items()}


def others(source: Adapter, rank: int | None = None) -> Shapes:
    """What is not of experts.

    Args:
        source: The adapter of the training.
        rank: That every LoRA is widened to; None for its own.
    """
    shapes = {name: tensor.shape for name, tensor in source.others.items()}
    names = {id(tensor): name for name, tensor in source.others.items()}
    for module in source.modules().values() if rank else ():
        for side_a, side_b in (LINEAR, EMBEDDING):
            if side_a in module:
                a, b = module[side_a], module[side_b]
                shapes[names[id(a)]] = (rank or 0, *a.shape[1:])
                shapes[names[id(b)]] = (b.shape[0], rank or 0, *b.shape[2:])
    return shapes


def of_kt(source: Adapter) -> Shapes:
    """As training saves it."""
    return {name: tensor.shape for name, tensor in source.tensors()}


def fused_stem(one: Projection) -> str:
    """What the two tensors of a projection begin with in a fused file."""
    return f"layers.{one.layer}.experts.{one.name.split('_')[0]}_lora_"


def of_fused(source: Adapter, rank: int | None = None) -> Shapes:
    """Of a fused file.

    Args:
        source: The adapter of the training.
        rank: That all are widened to; None for their own.
    """
    shapes: Shapes = {}
    for one in source.experts.values():
        (experts, own, into), out = one.a.shape, one.b.shape[1]
        shapes |= {
            f"{fused_stem(one)}a": (experts, rank or own, into),
            f"{fused_stem(one)}b": (experts, out, rank or own),
        }
    return shapes


def of_sglang(source: Adapter) -> Shapes:
    """Of each layer six tensors of one rank, whichever projections were trained."""
    ones = list(source.experts.values())
    rank, experts = max(one.rank for one in ones), ones[0].a.shape[0]
    above = [one for one in ones if one.name != "down_proj"]
    down = [one for one in ones if one.name == "down_proj"]
    hidden, inner = (above[0].a.shape[2], above[0].b.shape[1]) if above else (down[0].b.shape[1], down[0].a.shape[2])
    shapes: Shapes = {}
    for layer in {one.layer for one in ones}:
        for name in PROJECTIONS:
            into, out = (inner, hidden) if name == "down_proj" else (hidden, inner)
            stem = sglang_stem(layer, name)
            shapes |= {f"{stem}a": (experts, rank, into), f"{stem}b": (experts, out, rank)}
    return shapes


def sglang_stem(layer: int, projection: str) -> str:
    """What the two tensors of a projection begin with in SGLang's file."""
    return f"layer_{layer}.{projection.split('_')[0]}_lora_"


def is_mixtral(names: Mapping[str, Any]) -> bool:
    """Whether a file of single experts has Mixtral's names."""
    return any(".block_sparse_moe.experts." in name for name in names)


def single_stem(one: Projection, expert: int, mixtral: bool) -> str:
    """What the two tensors of one expert's projection begin with."""
    experts = one.experts.replace(".mlp.experts", ".block_sparse_moe.experts") if mixtral else one.experts
    return f"{PREFIX}{experts}.{expert}.{_SHORT[one.name] if mixtral else one.name}.lora_"


def of_single_experts(source: Adapter, mixtral: bool, rank: int) -> Shapes:
    """A module for each expert, all of one rank."""
    return {
        f"{single_stem(one, expert, mixtral)}{side}.weight": shape
        for one in source.experts.values()
        for side, shape in (("A", (rank, one.a.shape[2])), ("B", (one.b.shape[1], rank)))
        for expert in range(one.a.shape[0])
    }


def stacks(source: Adapter) -> Iterator[tuple[str, str, list[Projection]]]:
    """Of a stock PEFT file: experts, what the names of their two tensors begin with, and whose LoRA they hold."""
    for experts, projections in source.layers().items():
        above = [projections[name] for name in PROJECTIONS[:2] if name in projections]
        down = [projections["down_proj"]] if "down_proj" in projections else []
        if above:
            yield experts, f"{PREFIX}{experts}.{'base_layer.' if down else ''}lora_", above
        if down:
            yield experts, f"{PREFIX}{experts}.lora_", down


def of_stacks(source: Adapter) -> Shapes:
    """Of a stock PEFT file, where the base model is not at hand: plain experts."""
    shapes: Shapes = {}
    for _, stem, loras in stacks(source):
        first = loras[0]
        rank, out = sum(one.rank for one in loras) * first.a.shape[0], first.b.shape[1]
        out = out if first.name == "down_proj" else 2 * out
        shapes |= {f"{stem}A.weight": (rank, first.a.shape[2]), f"{stem}B.weight": (out, rank)}
    return shapes


def of_peft(source: Adapter, output: Path, base: Any) -> Shapes | None:
    """Names and shapes that PEFT itself gives the adapter's tensors on the base model, without memory for it.

    What is trained as a whole is as large as the training had it: it may have resized the vocabulary.

    Args:
        source: The adapter of the training.
        output: Folder of the export.
        base: Name or folder of the base model.

    Returns:
        None where the base's configuration is not on this machine.
    """
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from transformers import AutoConfig

    read_config(output / "adapter_config.json")
    try:
        config = AutoConfig.from_pretrained(base, local_files_only=True)
    except (OSError, ValueError, TypeError):
        return None
    with warnings.catch_warnings():  # advice to who would train this model, which has no weights
        warnings.simplefilter("ignore")
        model = get_peft_model(skeleton(config), LoraConfig.from_pretrained(output), low_cpu_mem_usage=True)
        state: dict[str, Tensor] = get_peft_model_state_dict(model)
    whole = [f"{PREFIX}{name}." for name, one in source.other_modules().items() if one.whole or one.tokens]
    own = {name: tensor.shape for name, tensor in source.others.items() if name.startswith(tuple(whole))}
    return {name: tuple(tensor.shape) for name, tensor in state.items()} | own
