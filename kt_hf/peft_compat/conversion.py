"""PEFT's rewriting of fused experts stands aside for patched models.

transformers 5 fuses experts into 3-D parameters, so PEFT (since 0.19) rewrites the targets `gate_proj`, `up_proj` and
`down_proj` of such models into `target_parameters`, and the keys of adapters on loading, both keyed on the model type.
On a patched model the projections are modules of those very names again: the rewrite would find nothing, and take
shared experts and dense MLPs with it. Both rewrites stand aside for patched models here, and for no other.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..errors import KTAMXConfigError
from ..experts import kt_layers
from ..shapes import PROJECTIONS

_EXPERT_KEY = re.compile(rf"\.({'|'.join(PROJECTIONS)})\.lora_[AB]\b")


def keep_config(original: Callable[..., Any], peft_config: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Replaces `convert_peft_config_for_transformers`: a patched model's config stays as it is.

    Raises:
        KTAMXConfigError: The config names fused parameters.
    """
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


def keep_state_dict(
    original: Callable[..., Any],
    model: nn.Module,
    peft_config: Any,
    adapter_state_dict: dict[str, Tensor],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Replaces `convert_peft_adapter_state_dict_for_transformers`: a patched model's keys stay as they are.

    Raises:
        KTAMXConfigError: The model is not patched and the adapter has LoRA of experts, which PEFT would drop.
    """
    if kt_layers(model):
        return adapter_state_dict
    expert_keys = [key for key, value in adapter_state_dict.items() if _EXPERT_KEY.search(key) and value.dim() == 3]
    if expert_keys:
        raise KTAMXConfigError(
            f"The adapter holds LoRA of experts as kt_hf trains it ({expert_keys[0]}), for which this model has no "
            "place: PEFT would drop it. Patch the model first (apply_kt_moe), then load the adapter."
        )
    return original(model, peft_config, adapter_state_dict, *args, **kwargs)
