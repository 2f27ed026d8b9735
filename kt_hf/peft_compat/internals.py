"""PEFT's internals, read: how it decides by a module's name, and where it keeps things in a model.

Stands below the rest of this package, and imports nothing of kt_hf: `adapters/`, which the replaced functions use,
reads an adapter and a model by it too. PEFT is imported at the first call.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

PREFIX = "base_model.model."  # of every key in a file that PEFT saves
# Children of a module that PEFT has wrapped: the module as it was, from the outside in.
_WRAPPED = ("original_module", "token_adapter", "base_layer")
_INSIDE = re.compile(r"\.(original_module|modules_to_save|token_adapter|base_layer|lora_\w+)(\.|$)")


def of_pattern(pattern: Mapping[str, Any] | None, name: str, otherwise: Any) -> Any:
    """A module's value in `rank_pattern` or `alpha_pattern`, or the config's own value."""
    from peft.utils.other import get_pattern_key

    pattern = pattern or {}
    return pattern.get(get_pattern_key(pattern.keys(), name), otherwise)


def targets(config: Any, name: str) -> bool:
    """Whether a `LoraConfig` adapts the module of this name."""
    from peft.tuners.tuners_utils import check_target_module_exists

    return bool(check_target_module_exists(config, name))


def refuses(model: Any, name: str) -> bool:
    """Whether PEFT refuses LoRA on a module of this name in such a model: projections that Mamba's kernels read."""
    from peft import LoraConfig
    from peft.tuners import tuners_utils

    check = getattr(tuners_utils, "_check_lora_target_modules_mamba", None)
    try:
        if check is not None:
            check(LoraConfig(), model, name.rpartition(".")[2])
    except ValueError:
        return True
    return False


def base_model(model: Any) -> Any:
    """The model that a PeftModel is around, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def plain_module_name(name: str) -> str:
    """A module's name in the base model, of the name it has inside what PEFT has wrapped around it."""
    inside = _INSIDE.search(name)
    return name[: inside.start()] if inside else name


def base_parameter(model: Any, module: str, parameter: str) -> Any:
    """A parameter or buffer of the base model by its name there, whatever PEFT has wrapped around the module."""
    inside = _unwrapped(model, module)
    return None if inside is None else inside.state_dict().get(parameter)


def _unwrapped(model: Any, module: str) -> Any:
    try:
        inside = base_model(model).get_submodule(module)
    except AttributeError:
        return None
    while True:
        children = dict(inside.named_children())
        wrapped = [children[name] for name in _WRAPPED if name in children]
        if not wrapped:
            return inside
        inside = wrapped[0]


def whole_modules(model: Any, names: tuple[str, ...]) -> dict[str, set[str]]:
    """Modules that PEFT saves as a whole -> their parameters and buffers; of one in another, the outer one.

    Args:
        model: Any model, with or without adapters.
        names: `modules_to_save`: PEFT takes every module whose name ends with one of them.
    """
    if not names:
        return {}
    modules: dict[str, set[str]] = {}
    for name, _ in base_model(model).named_modules(remove_duplicate=False):
        inner = any(name.startswith(f"{outer}.") for outer in modules)
        if name.endswith(names) and not inner and not _INSIDE.search(name):
            modules[name] = set(_unwrapped(model, name).state_dict())
    return modules


def whole_with_retrained_tokens(model: Any) -> Iterator[str]:
    """Modules of which PEFT would train a copy and retrain single tokens at a time, which it cannot compute."""
    for name, module in base_model(model).named_modules():
        if name.endswith("token_adapter.base_layer") and "original_module" in dict(module.named_children()):
            yield plain_module_name(name)


def saved_names(model: Any, adapter: str) -> dict[str, Any]:
    """The LoRA parameters of one of a model's adapters, by the keys PEFT saves them under."""
    parameters = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if ".lora_" in name and f".{adapter}." in f"{name}.":
            head, _, tail = f"{name}.".rpartition(f".{adapter}.")
            key = f"{_prefix(head)}{head}.{tail}".rstrip(".")
            parameters[key.removesuffix(".weight") if "lora_magnitude" in head else key] = parameter
    return parameters


def saved_whole_names(model: Any, adapter: str) -> dict[str, Any]:
    """What one of a model's adapters trains as a whole, and its retrained tokens, by the keys PEFT saves them under."""
    from peft.utils import AuxiliaryTrainingWrapper

    values = model.state_dict(keep_vars=True)
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            for saved, attribute in module.adapter_state_dict_load_map(adapter).items():
                tensors[f"{_prefix(name)}{name}.{saved}"] = values[f"{name}.{attribute}"]
    return tensors


def _prefix(name: str) -> str:
    """What a saved key has before the module's name: transformers' own add_adapter has no PeftModel around a model."""
    return "" if name.startswith("base_model.") else PREFIX
