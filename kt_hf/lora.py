"""`kt_lora_config`: a LoraConfig that reaches what the user means."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from .errors import KTAMXConfigError
from .experts.layer import kt_layers
from .shapes import ALIASES, PROJECTIONS

logger = logging.getLogger(__name__)

_NOT_TARGETS = re.compile(r"(^|\.)(gate|router|shared_expert_gate|lm_head|score)$")


def kt_lora_config(
    model: nn.Module,
    lora_rank: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    lora_target: str | Iterable[str] = "all",
    **kwargs: Any,
) -> LoraConfig:
    """A PEFT `LoraConfig` for a patched model.

    Args:
        model: The model, patched by `apply_kt_moe`.
        lora_rank: LoRA rank r.
        lora_alpha: Scaling is lora_alpha / r.
        lora_dropout: Of the linear layers; experts train without dropout.
        lora_target: `all` (every linear layer but router and head, and every expert), `all_attention`, or names, as a
            list or separated by commas: `q_proj,gate_proj,up_proj,down_proj`. w1, w2 and w3 mean the experts'
            projections.
        **kwargs: Passed on to `LoraConfig`.

    Raises:
        KTAMXConfigError: A name that no module has, naming those there are; a rank that is not positive.
    """
    if not isinstance(lora_rank, int) or lora_rank < 1:
        raise KTAMXConfigError(f"lora_rank={lora_rank!r} is not a positive integer.")
    targets = _targets(model, lora_target)
    kwargs.setdefault("task_type", "CAUSAL_LM")
    return LoraConfig(
        r=lora_rank, lora_alpha=lora_alpha, lora_dropout=lora_dropout, target_modules=sorted(targets), **kwargs
    )


def expert_targets(model: nn.Module) -> list[str]:
    """The names that reach the experts, [] for a model without patched layers."""
    return list(PROJECTIONS) if kt_layers(model) else []


def _targets(model: Any, wanted: str | Iterable[str]) -> set[str]:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    adapted = {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    usable = {
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, LoraLayer))
        and module is not head
        and not _NOT_TARGETS.search(name)
        and not any(name.startswith(f"{parent}.") for parent in adapted)  # the inside of an adapted layer
    }
    attention = {name for name in usable if re.search(r"(^|\.)\w*(attn|attention)\w*\.", name)}
    if wanted == "all":
        return {name.rsplit(".", 1)[-1] for name in usable} | set(expert_targets(model))
    if wanted == "all_attention":
        if not attention:
            raise KTAMXConfigError("lora_target=all_attention: the model has no linear layers in attention.")
        return {name.rsplit(".", 1)[-1] for name in attention}
    names = [part.strip() for part in wanted.split(",")] if isinstance(wanted, str) else list(wanted)
    modules = {name for name, _ in model.named_modules()}
    targets = set()
    for name in filter(None, names):
        found = name if _exists(name, modules) else ALIASES.get(name, name)
        if not _exists(found, modules):
            known = sorted({n.rsplit(".", 1)[-1] for n in usable} | set(expert_targets(model)))
            raise KTAMXConfigError(f"lora_target: no module is called {name!r}. There are: {', '.join(known)}.")
        targets.add(found)
    if not targets:
        raise KTAMXConfigError("lora_target is empty: give all, all_attention, or names.")
    return targets


def _exists(name: str, modules: set[str]) -> bool:
    return any(module == name or module.endswith(f".{name}") for module in modules)
