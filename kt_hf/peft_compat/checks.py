"""What PEFT's verbs do with the experts of a patched model: checked before a module is touched, right or refused.

PEFT wraps the layers of a model one after the other. An adapter that the experts cannot take would be noticed in the
middle, with attention adapted already; here it is noticed before.

The functions that take `original` are replacements of the table `patches.PATCHES`: `original` is the function they
stand for, and the other arguments are that function's. A model that is not patched gets what `original` does.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftType
from torch import nn

from ..adapters.config_file import as_saved, check_config
from ..errors import KTAMXConfigError, KTAMXError
from ..experts.holders import owned_lora
from ..experts.layer import KTExperts, kt_layers, update_lora
from ..experts.projections import NO_MERGE, ExpertProjection, refuse_variants
from ..shapes import ALIASES
from ..system.json_fields import Field
from .internals import of_pattern

logger = logging.getLogger(__name__)


def check_adapter(tuner: Any, model: nn.Module, adapter_name: str) -> None:
    """Refuse an adapter that experts cannot have, and translate old names of theirs, before PEFT touches a module.

    Args:
        tuner: PEFT's tuner, with the adapter's config in `peft_config`.
        model: The model to adapt; nothing is done unless it is patched.
        adapter_name: The adapter to come.

    Raises:
        KTAMXConfigError: Naming the layer, the setting, and what to do.
    """
    if not kt_layers(model):
        return
    config = tuner.peft_config[adapter_name]
    if config.peft_type == PeftType.LORA:
        check_values(config)
    _check_copies(model, config)
    if config.peft_type == PeftType.LORA:
        _translate_targets(model, config)
    targeted = _with_targets(tuner, model, config)
    if _is_all_linear(config):
        if config.peft_type != PeftType.LORA:
            return  # linear layers alone, as of the unpatched model, whose experts are none
        targeted.target_modules = set(_projections(model))
    check = getattr(tuner, "_check_target_module_exists", None)
    if check is None or getattr(targeted, "target_modules", None) is None:
        return
    for name, module in model.named_modules():
        if isinstance(module, (KTExperts, ExpertProjection)) and check(targeted, name):
            _check_target(name, module, config)


def check_values(config: LoraConfig) -> None:
    """Types and bounds of the settings, as they are checked when the adapter is read again.

    Raises:
        KTAMXConfigError: Naming setting and value.
    """
    try:
        check_config(Field(Path(type(config).__name__), "", as_saved(config)))
    except KTAMXError as error:
        raise KTAMXConfigError(str(error)) from None
    except (TypeError, ValueError, AttributeError) as error:
        raise KTAMXConfigError(f"{type(config).__name__} has a value that cannot be saved: {error}.") from None


def _with_targets(tuner: Any, model: nn.Module, config: Any) -> Any:
    """A copy of an adapter's config; one that names no targets gets those that PEFT has for the model's type.

    Raises:
        KTAMXConfigError: PEFT has none, or none that it could match (target_modules and target_parameters are None).
    """
    targeted = copy.copy(config)
    if getattr(config, "target_modules", ()) is not None or getattr(config, "target_parameters", None):
        return targeted
    with contextlib.suppress(ValueError):  # PEFT knows no targets for the model's type
        targeted = tuner._prepare_adapter_config(targeted, tuner.get_model_config(model))
    if targeted.target_modules is None:
        raise KTAMXConfigError(
            f"{type(config).__name__} has target_modules=None, and PEFT has no default for the model type "
            f"{getattr(getattr(model, 'config', None), 'model_type', None)!r}. Name the layers, or take "
            "kt_lora_config(model), which names those of the model and its experts."
        )
    return targeted


def _check_target(name: str, module: nn.Module, config: Any) -> None:
    if isinstance(module, KTExperts):
        raise KTAMXConfigError(
            f"target_modules={config.target_modules!r} names {name} as a whole: name its projections, gate_proj, "
            "up_proj and down_proj."
        )
    assert isinstance(module, ExpertProjection)
    if config.peft_type != PeftType.LORA:
        or_exclude = ", or set exclude_modules=r'.*\\.experts\\..*'" if hasattr(config, "exclude_modules") else ""
        raise KTAMXConfigError(
            f"{name}: {type(config).__name__} cannot adapt experts, only LoraConfig can. To adapt the other layers "
            f"alone, take gate_proj, up_proj and down_proj out of target_modules{or_exclude}."
        )
    refuse_variants(config, name)
    module.check_rank(of_pattern(config.rank_pattern, name, config.r), name)
    if config.fan_in_fan_out:
        logger.warning("fan_in_fan_out=True is meant for Conv1D: it has no meaning for linear layers and experts.")
        config.fan_in_fan_out = False


def _check_copies(model: nn.Module, config: Any) -> None:
    """What PEFT does by copying modules."""
    if getattr(config, "layer_replication", None):
        raise KTAMXConfigError(
            f"layer_replication={config.layer_replication!r} copies decoder layers, and packed experts cannot be "
            "copied: leave it out."
        )
    names = tuple(getattr(config, "modules_to_save", None) or ())
    for name, module in model.named_modules():
        # PEFT's own rule: any module whose name ends so.
        inside = any(isinstance(m, (KTExperts, ExpertProjection)) for m in module.modules())
        if names and name.endswith(names) and inside:
            raise KTAMXConfigError(
                f"modules_to_save={list(names)!r} would copy {name} to train it in full, and packed experts cannot be: "
                "put gate_proj, up_proj and down_proj into target_modules. The router alone is called gate."
            )


def _translate_targets(model: nn.Module, config: LoraConfig) -> None:
    """Names of transformers 4 (w1, w2, w3, and gate for a router that is no Linear any more), as stock PEFT does."""
    targets = config.target_modules
    modules = dict(model.named_modules())
    if isinstance(targets, str) and not _is_all_linear(config):
        old = [
            n for n, new in ALIASES.items() if any(re.fullmatch(targets, _renamed(p, n)) for p in _projections(model))
        ]
        if old:
            raise KTAMXConfigError(
                f"target_modules={targets!r} names experts as transformers 4 did ({', '.join(old)}). They are called "
                f"{', '.join(ALIASES[n] for n in old)} now."
            )
        return
    if isinstance(targets, str) or targets is None:
        return
    translated, parameters = set(), set(config.target_parameters or ())
    for target in targets:
        last = target.rpartition(".")[2]
        named = [module for name, module in modules.items() if name == target or name.endswith(f".{target}")]
        if not named and last in ALIASES:
            translated.add(ALIASES[last])
        elif last == "gate" and named and not any(isinstance(m, nn.Linear) for m in named):
            parameters.add(f"{target}.weight")
        else:
            translated.add(target)
    config.target_modules = translated
    if parameters:
        config.target_parameters = sorted(parameters)
    for pattern in (config.rank_pattern, config.alpha_pattern):
        for key in [key for key in pattern or {} if key.rpartition(".")[2] in ALIASES]:
            pattern.setdefault(ALIASES[key.rpartition(".")[2]], pattern.pop(key))


def _renamed(projection: str, old: str) -> str:
    head = projection.rpartition(".")[0]
    return f"{head}.{old}" if projection.endswith(f".{ALIASES[old]}") else ""


def _is_all_linear(config: Any) -> bool:
    targets = getattr(config, "target_modules", None)
    return isinstance(targets, str) and targets.lower() == "all-linear"


def _projections(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, ExpertProjection)]


def include_experts(original: Callable[..., Any], peft_config: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Replaces `_maybe_include_all_linear_layers`: `target_modules="all-linear"` reaches the experts too.

    In transformers 4 they were linear layers, and are what it is said for. Routers are left out: in transformers 5 most
    are no linear layers, and LoRA on them is rarely meant.
    """
    everything = _is_all_linear(peft_config)
    result = original(peft_config, model, *args, **kwargs)
    if everything and peft_config.peft_type == PeftType.LORA:
        result.target_modules = set(result.target_modules) | set(_projections(model))
    elif everything and kt_layers(model):
        logger.warning("%s: target_modules='all-linear' does not reach experts.", type(peft_config).__name__)
    return result


def refuse_mixed_batches(original: Callable[..., Any], tuner: Any, *args: Any, **kwargs: Any) -> Any:
    """Replaces `LoraModel._enable_peft_forward_hooks`, which takes `adapter_names`, an adapter for each row of a batch.

    Raises:
        KTAMXConfigError: There are any: experts would compute the active adapter for all rows.
    """
    names = kwargs.get("adapter_names")
    if names is not None and any(p.r for layer in kt_layers(tuner.model) for p in layer.projections):
        raise KTAMXConfigError(
            f"adapter_names={list(names)!r}: experts compute one adapter for the whole batch. Call the model once for "
            "each adapter, with set_adapter before (disable_adapter() for '__base__')."
        )
    return original(tuner, *args, **kwargs)


def refuse_converted_init(original: Callable[..., Any], tuner: Any, *args: Any, **kwargs: Any) -> Any:
    """Replaces `LoraModel.subtract_mutated_init`, of `save_pretrained(path_initial_model_for_weight_conversion=…)`.

    Raises:
        KTAMXError: The model is patched: PEFT would join tensors along the experts' axis.
    """
    if kt_layers(tuner.model):
        raise KTAMXError(
            "path_initial_model_for_weight_conversion is not supported for a patched model: save the adapter without "
            "it."
        )
    return original(tuner, *args, **kwargs)


def refuse_compiled_hotswap(original: Callable[..., Any], model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Replaces `_convert_scalings_to_tensor`, the first step of `prepare_model_for_compiled_hotswap`.

    Raises:
        KTAMXError: The model is patched: PEFT would pad the weights of linear layers alone.
    """
    if kt_layers(model):
        raise KTAMXError(
            "prepare_model_for_compiled_hotswap is not supported for a patched model, nor needed: torch.compile leaves "
            "the experts out. Patch with KTConfig(kt_lora_rank=...) of the largest rank and call hotswap_adapter."
        )
    return original(model, *args, **kwargs)


def check_and_pack(
    original: Callable[..., Any], tuner: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
) -> Any:
    """Replaces `BaseTuner.inject_adapter`: adapters are checked before, and the experts' backends built after.

    Raises:
        KTAMXConfigError: As `check_adapter`.
    """
    check_adapter(tuner, model, adapter_name)
    result = original(tuner, model, adapter_name, *args, **kwargs)
    for layer in kt_layers(model):
        layer.pack()
    return result


def refuse_merge(original: Callable[..., Any], tuner: Any, *args: Any, **kwargs: Any) -> Any:
    """Replaces `merge_adapter`, `merge_and_unload` and `unload` of `BaseTuner`.

    Raises:
        KTAMXError: The model is patched: PEFT would take the other layers first and meet the experts in the middle.
    """
    if kt_layers(tuner.model):
        raise KTAMXError(NO_MERGE)
    return original(tuner, *args, **kwargs)


def refresh_after(original: Callable[..., Any], model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Replaces `hotswap_adapter_from_state_dict`: the new values are copied to the backends."""
    if any(True for _ in owned_lora(model)):
        raise KTAMXError(
            "hotswap_adapter does not know that this process holds a part of the experts (WORLD_SIZE): load "
            "the adapter by model.load_adapter, or in a run of one process."
        )
    result = original(model, *args, **kwargs)  # writes to `.data`, which nothing else would notice
    update_lora(kt_layers(model))
    return result
