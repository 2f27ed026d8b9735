"""The one place that touches PEFT's internals. tests/test_peft_compat.py fails when PEFT changes what it relies on.

transformers 5 fuses experts into 3-D parameters, so PEFT (since 0.19) rewrites the targets `gate_proj`, `up_proj` and
`down_proj` of such models into `target_parameters`, and the keys of adapters on loading, both keyed on the model type.
On a patched model the projections are modules of those very names again: the rewrite would find nothing, and take
shared experts and dense MLPs with it. Both rewrites stand aside for patched models here, and for no other.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import peft_verbs, peft_weighted
from .errors import KTAMXConfigError, KTAMXError
from .experts import KTExperts, kt_layers
from .projections import NO_MERGE, PROJECTIONS

logger = logging.getLogger(__name__)
_EXPERT_KEY = re.compile(rf"\.({'|'.join(PROJECTIONS)})\.lora_[AB]\b")


def install() -> None:
    """Make PEFT's fused-expert conversions stand aside for patched models, and pack after an adapter. Once a
    process."""
    from peft import PeftModel
    from peft.tuners import tuners_utils
    from peft.tuners.lora import LoraModel
    from peft.tuners.tuners_utils import BaseTuner
    from peft.utils import hotswap
    from peft.utils import transformers_weight_conversion as conversion
    from transformers.integrations.peft import PeftAdapterMixin

    from .adapters.save import load_native_verified, load_verified, save_verified, weights_verified

    _wrap(conversion, "convert_peft_config_for_transformers", _keep_config)
    _wrap(conversion, "convert_peft_adapter_state_dict_for_transformers", _keep_state_dict)
    _wrap(BaseTuner, "inject_adapter", _check_and_pack)
    _wrap(tuners_utils, "_maybe_include_all_linear_layers", peft_verbs.include_experts)
    _wrap(LoraModel, "_enable_peft_forward_hooks", peft_verbs.refuse_mixed_batches)
    _wrap(LoraModel, "add_weighted_adapter", peft_weighted.add_weighted_adapter)
    _wrap(LoraModel, "subtract_mutated_init", peft_verbs.refuse_converted_init)
    _wrap(hotswap, "_convert_scalings_to_tensor", peft_verbs.refuse_compiled_hotswap)
    # These take or merge the other layers first and meet the experts in the middle: refused before they begin.
    for name in ("merge_adapter", "merge_and_unload", "unload"):
        _wrap(BaseTuner, name, _refuse_merge)
    _wrap(hotswap, "hotswap_adapter_from_state_dict", _refresh_after)
    # Checkpoints: verified, with their manifest, before a Trainer pushes or deletes; refused when they are not whole.
    _wrap(PeftModel, "save_pretrained", save_verified)
    _wrap(PeftModel, "load_adapter", load_verified)
    _wrap(hotswap, "load_peft_weights", weights_verified)
    _wrap(PeftAdapterMixin, "load_adapter", load_native_verified)


def _wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    original = getattr(owner, name)
    if getattr(original, "_kt_hf", False):
        return
    wrapped = functools.wraps(original)(functools.partial(wrapper, original))
    if isinstance(owner, type):
        function = wrapped

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:  # a partial is no descriptor, so it would miss self
            return function(*args, **kwargs)

    wrapped._kt_hf = True  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)


def _keep_config(original: Callable[..., Any], peft_config: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if not kt_layers(model):
        return original(peft_config, model, *args, **kwargs)
    parameters = [
        name for name in getattr(peft_config, "target_parameters", None) or [] if "gate_up" in name or "down_" in name
    ]
    if parameters:
        raise KTAMXConfigError(
            f"target_parameters={parameters} name fused experts, which a patched model has no more. Put gate_proj, "
            "up_proj and down_proj into target_modules (kt_lora_config does)."
        )
    return None


def _keep_state_dict(
    original: Callable[..., Any],
    model: nn.Module,
    peft_config: Any,
    adapter_state_dict: dict[str, Tensor],
    *args: Any,
    **kwargs: Any,
) -> Any:
    if kt_layers(model):
        return adapter_state_dict
    ours = [key for key, value in adapter_state_dict.items() if _EXPERT_KEY.search(key) and value.dim() == 3]
    if ours:
        raise KTAMXConfigError(
            f"The adapter holds LoRA of experts as kt_hf trains it ({ours[0]}), for which this model has no place: "
            "PEFT would drop it. Patch the model first (apply_kt_moe), then load the adapter."
        )
    return original(model, peft_config, adapter_state_dict, *args, **kwargs)


def _check_and_pack(
    original: Callable[..., Any], tuner: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
) -> Any:
    peft_verbs.check_adapter(tuner, model, adapter_name)
    result = original(tuner, model, adapter_name, *args, **kwargs)
    for layer in kt_layers(model):
        layer.pack()
    return result


def _refuse_merge(original: Callable[..., Any], tuner: Any, *args: Any, **kwargs: Any) -> Any:
    if kt_layers(tuner.model):
        raise KTAMXError(NO_MERGE)
    return original(tuner, *args, **kwargs)


def _refresh_after(original: Callable[..., Any], model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    result = original(model, *args, **kwargs)  # writes to `.data`, which nothing else would notice
    for layer in kt_layers(model):
        layer.update_lora_pointers()
    return result


@dataclass
class Unwrapped:
    """LoRA that stock PEFT had put on fused experts (`target_parameters`), to be put on the patched ones.

    `layers[i]` is the i-th expert layer's adapters: adapter name -> parameter name -> (A [E, r, in], B [E, out, r],
    alpha).
    """

    model: Any
    layers: list[dict[str, dict[str, tuple[Tensor, Tensor, float]]]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return any(self.layers)

    def restore(self, experts: list[KTExperts]) -> None:
        """Give each projection the LoRA it had in the fused layer.

        A fused gate_up adapter shares its A between gate and up: both get a copy, so the function is the same, and they
        train apart from then on. An adapter that is still at its start (B zero) starts anew with the config's rank.
        """
        if not self:
            return
        configs = self.model.peft_config
        names = sorted({adapter for layer in self.layers for adapter in layer})
        for adapter in names:
            config = configs[adapter]
            taken = {"gate_up_proj", "down_proj"}
            parameters = [p for p in config.target_parameters or [] if p.rsplit(".", 1)[-1] not in taken]
            config.target_parameters = parameters or None
            for patterns in (config.rank_pattern, config.alpha_pattern):
                for key in [k for k in patterns if "gate_up_proj" in k]:
                    del patterns[key]
            targets = set()
            for layer, saved in zip(experts, self.layers, strict=True):
                targets |= _restore_layer(layer, adapter, saved.get(adapter, {}), config)
            config.target_modules = set(config.target_modules or ()) | targets
            active = self.model.active_adapters
            for layer in experts:
                for projection in layer.projections:
                    projection.set_adapter(list(active), inference_mode=config.inference_mode)
        logger.info("kt_hf: the adapter's LoRA on fused experts was put on gate_proj, up_proj and down_proj.")


def _restore_layer(
    layer: KTExperts, adapter: str, saved: dict[str, tuple[Tensor, Tensor, float]], config: Any
) -> set[str]:
    targets = set()
    inner = layer.shape.intermediate_size
    for name, (a, b, alpha) in saved.items():
        fresh = not bool(b.any())
        halves = {"down_proj": b} if name == "down_proj" else {"gate_proj": b[:, :inner], "up_proj": b[:, inner:]}
        for projection_name, half in halves.items():
            projection = getattr(layer, projection_name)
            rank, weight = (config.r, config.lora_alpha) if fresh else (a.shape[1], alpha)
            projection.update_layer(adapter, rank, weight, config=config, target_name=f"experts.{projection_name}")
            for parameter in projection.tensors(adapter):
                parameter.data = parameter.data.to(a.dtype)
            if not fresh:
                with torch.no_grad():
                    for parameter, value in zip(projection.tensors(adapter), (a, half), strict=True):
                        parameter.copy_(value)
                config.rank_pattern[rf".*experts\.{projection_name}"] = rank
                config.alpha_pattern[rf".*experts\.{projection_name}"] = alpha
            targets.add(f"experts.{projection_name}")
    assert targets <= {f"experts.{name}" for name in PROJECTIONS}
    return targets


def unwrap_expert_parameters(model: nn.Module) -> Unwrapped:
    """Take stock PEFT's `ParamWrapper`s off fused experts, keeping their LoRA tensors."""
    from peft.tuners.lora.layer import ParamWrapper

    result = Unwrapped(model)
    modules = dict(model.named_modules())
    for name, module in modules.items():
        parent_name, _, attribute = name.rpartition(".")
        parent = modules.get(parent_name)
        inside = module.get_base_layer() if isinstance(module, ParamWrapper) else module
        is_experts = hasattr(inside, "gate_up_proj") and hasattr(inside, "down_proj")
        if not is_experts or isinstance(parent, ParamWrapper) or parent is None:
            continue
        saved: dict[str, dict[str, tuple[Tensor, Tensor, float]]] = {}
        wrapper = module
        while isinstance(wrapper, ParamWrapper):
            for adapter, rank in wrapper.r.items():
                a, b = wrapper.lora_A[adapter].weight.detach(), wrapper.lora_B[adapter].weight.detach()
                experts = a.shape[0] // rank
                # PEFT's layout: A's rows count experts first, then rank; B's columns rank first, then experts.
                saved.setdefault(adapter, {})[wrapper.parameter_name] = (
                    a.view(experts, rank, -1),
                    b.view(b.shape[0], rank, experts).permute(2, 0, 1),
                    float(wrapper.lora_alpha[adapter]),
                )
            wrapper = wrapper.base_layer
        if module is not inside:
            setattr(parent, attribute, inside)
        result.layers.append(saved)
    return result
