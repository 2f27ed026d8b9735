"""The one package that touches PEFT's internals: tests/peft_compat fails when PEFT changes what it relies on.

transformers 5 fuses experts into 3-D parameters, so PEFT (since 0.19) rewrites the targets `gate_proj`, `up_proj` and
`down_proj` of such models into `target_parameters`, and the keys of adapters on loading, both keyed on the model type.
On a patched model the projections are modules of those very names again: the rewrite would find nothing, and take
shared experts and dense MLPs with it. Both rewrites stand aside for patched models here, and for no other.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import transformers
from packaging.version import Version
from torch import Tensor, nn

from ..errors import KTAMXConfigError, KTAMXError
from ..experts.layer import kt_layers
from ..experts.projections import NO_MERGE
from ..shapes import PROJECTIONS
from . import checks as verbs
from . import weighted
from .stock_lora import unwrap_expert_parameters

__all__ = ["install", "unwrap_expert_parameters"]

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

    from .saving import (
        load_native_verified,
        load_verified,
        resume_default,
        save_verified,
        start_verified,
        weights_verified,
    )

    _wrap(conversion, "convert_peft_config_for_transformers", _keep_config)
    _wrap(conversion, "convert_peft_adapter_state_dict_for_transformers", _keep_state_dict)
    _wrap(BaseTuner, "inject_adapter", _check_and_pack)
    _wrap(tuners_utils, "_maybe_include_all_linear_layers", verbs.include_experts)
    _wrap(LoraModel, "_enable_peft_forward_hooks", verbs.refuse_mixed_batches)
    _wrap(LoraModel, "add_weighted_adapter", weighted.add_weighted_adapter)
    _wrap(LoraModel, "subtract_mutated_init", verbs.refuse_converted_init)
    _wrap(hotswap, "_convert_scalings_to_tensor", verbs.refuse_compiled_hotswap)
    # These take or merge the other layers first and meet the experts in the middle: refused before they begin.
    for name in ("merge_adapter", "merge_and_unload", "unload"):
        _wrap(BaseTuner, name, _refuse_merge)
    _wrap(hotswap, "hotswap_adapter_from_state_dict", _refresh_after)
    # Checkpoints: verified, with their manifest, before a Trainer pushes or deletes; refused when they are not whole.
    _wrap(PeftModel, "save_pretrained", save_verified)
    _wrap(PeftModel, "load_adapter", load_verified)
    _wrap(PeftModel, "from_pretrained", start_verified)
    _wrap(hotswap, "load_peft_weights", weights_verified)
    _wrap(PeftAdapterMixin, "load_adapter", load_native_verified)
    if Version(transformers.__version__) < Version("5.23"):
        _wrap(transformers.Trainer, "_load_from_checkpoint", resume_default)


def _wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    original = getattr(owner, name)
    if getattr(original, "_kt_hf", False):
        return
    of_class = isinstance(owner, type) and isinstance(owner.__dict__.get(name), classmethod)
    if of_class:
        original = original.__func__
    wrapped = functools.wraps(original)(functools.partial(wrapper, original))
    if isinstance(owner, type):
        function = wrapped

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:  # a partial is no descriptor, so it would miss self
            return function(*args, **kwargs)

    wrapped._kt_hf = True  # type: ignore[attr-defined]
    setattr(owner, name, classmethod(wrapped) if of_class else wrapped)


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
    verbs.check_adapter(tuner, model, adapter_name)
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
