"""`lora_target` as people write it, for the model they have: patched or not, with the attention it has."""

from __future__ import annotations

import re
from typing import Any

from ..errors import KTAMXConfigError
from ..shapes import ALIASES
from .config.settings import RunKeys

# Multi-head latent attention (DeepSeek-V2 and V3) has no projections of these names. What computes the same in it:
_LATENT = {
    "q_proj": ("q_a_proj", "q_b_proj"),
    "k_proj": ("kv_a_proj_with_mqa", "kv_b_proj"),
    "v_proj": ("kv_a_proj_with_mqa", "kv_b_proj"),
}
_EXPERTS = {"gate_proj", "up_proj", "down_proj"}


def lora_targets(asked: str | list[str], modules: set[str]) -> tuple[str | list[str], list[str]]:
    """(the targets in this model's names, what to tell the user).

    Args:
        asked: `all`, `all_attention`, or names, as a list or separated by commas.
        modules: Last parts of the names of the model's modules.
    """
    names = [part.strip() for part in asked.split(",")] if isinstance(asked, str) else list(asked)
    if len(names) == 1 and names[0] in ("all", "all_attention"):
        return names[0], []
    targets: dict[str, None] = {}
    notes = []
    for name in filter(None, names):
        replaced = [other for other in _LATENT.get(name, ()) if other in modules] if name not in modules else []
        if replaced:
            notes.append(f"lora_target {name}: this model's attention has {' and '.join(replaced)} in its place.")
        targets.update(dict.fromkeys(replaced or [name]))
    return list(targets), notes


def check_targets(outline: Any, keys: RunKeys) -> None:
    """Refuse names in lora_target and additional_target that the model does not have, before it is loaded.

    Args:
        outline: The model on the meta device, or any.
        keys: The run's keys that are not TRL's.

    Raises:
        KTAMXConfigError: Naming one.
    """
    modules = {name for name, _ in outline.named_modules()}
    endings = {".".join(name.split(".")[-parts:]) for name in modules for parts in range(1, name.count(".") + 2)}
    targets, _ = lora_targets(keys.lora_target, {name.rsplit(".", 1)[-1] for name in modules})
    if not targets:
        raise KTAMXConfigError(f"lora_target={keys.lora_target!r} is empty: give all, all_attention, or names.")
    for name in targets if isinstance(targets, list) else ():
        if name not in endings | _EXPERTS | set(ALIASES):
            known = sorted({n.rsplit(".", 1)[-1] for n in _linears(outline)} | _EXPERTS)
            raise KTAMXConfigError(f"lora_target: no module is called {name!r}. There are: {', '.join(known)}.")
    for name in keys.additional_target:
        reached = [module for module in modules if module == name or module.endswith(f".{name}")]
        if not reached:
            raise KTAMXConfigError(f"additional_target: no module is called {name!r}; embed_tokens or lm_head, say.")
        routed = [module for module in reached if re.search(r"(^|\.)experts(\.|$)", module)]
        if routed:
            raise KTAMXConfigError(
                f"additional_target: {name!r} reaches {routed[0]}, and routed experts are trained by LoRA only: "
                "lora_target reaches them."
            )


def lora_config(model: Any, keys: RunKeys) -> tuple[Any, list[str]]:
    """(the `LoraConfig`, what to tell the user) for a patched model, or for a stock one with fused experts.

    Raises:
        KTAMXConfigError: A target that the model does not have.
    """
    from .. import kt_lora_config
    from ..experts.layer import kt_layers

    last_parts = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    targets, notes = lora_targets(keys.lora_target, last_parts)
    options: dict[str, Any] = {"use_rslora": True} if keys.use_rslora else {}
    if keys.additional_target:
        options["modules_to_save"] = list(keys.additional_target)
    if kt_layers(model):
        return kt_lora_config(model, keys.lora_rank, keys.lora_alpha, keys.lora_dropout, targets, **options), notes
    return _stock(model, keys, targets, options, notes)


def _stock(model: Any, keys: RunKeys, targets: Any, options: dict[str, Any], notes: list[str]) -> tuple[Any, list[str]]:
    """Stock PEFT reaches fused experts as parameters. Where it rewrites targets for a family, it takes gate_proj,
    up_proj and down_proj for the experts' alone, and dense layers and shared experts go without, which a note says.
    """
    from peft import LoraConfig

    from .. import kt_lora_config
    from ..lora import task_of

    fused = _fused_experts(model)
    on_experts = bool(fused) and (targets == "all" or bool(_EXPERTS & set(targets)))
    if isinstance(targets, list):
        linear = {name.rsplit(".", 1)[-1] for name in _linears(model)}
        names = [name for name in targets if name in linear or not (on_experts and name in _EXPERTS)]
    else:
        names = targets
    chosen = set(kt_lora_config(model, keys.lora_rank, lora_target=names).target_modules) if names else set()
    dropout = keys.lora_dropout
    if on_experts:
        if targets == "all" or {"gate_proj", "up_proj"} & set(targets):
            options["target_parameters"] = ["experts.gate_up_proj"]
        if targets == "all" or "down_proj" in targets:
            options["target_parameters"] = [*options.get("target_parameters", []), "experts.down_proj"]
        if dropout:
            dropout = 0.0
            notes.append("lora_dropout: stock PEFT has none for fused experts, so 0 is used.")
    if not chosen and not on_experts:
        raise KTAMXConfigError(f"lora_target={keys.lora_target!r} reaches nothing in {type(model).__name__}.")
    if on_experts and _EXPERTS & chosen:
        notes.append(
            "Stock PEFT may leave dense layers and shared experts without LoRA: it takes their names for experts'."
        )
    config = LoraConfig(
        r=keys.lora_rank, lora_alpha=keys.lora_alpha, lora_dropout=dropout, target_modules=sorted(chosen),
        task_type=task_of(model), **options,
    )  # fmt: skip
    return config, notes


def _fused_experts(model: Any) -> list[str]:
    return [
        name
        for name, parameter in model.named_parameters()
        if re.search(r"\.experts\.gate_up_proj$", name) and parameter.dim() == 3
    ]


def _linears(model: Any) -> list[str]:
    from torch import nn

    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
