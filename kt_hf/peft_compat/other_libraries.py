"""What optimizers and kernels of other libraries cannot do with patched experts: left out, or refused in words."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from ..errors import KTAMXConfigError
from ..experts import KTExperts

logger = logging.getLogger(__name__)


def keep_forward(original: Callable[..., Any], module: Any, *args: Any, **kwargs: Any) -> Any:
    """Replaces Liger's `_bind_method_to_module`, which puts a forward on a module's instance: not on patched experts.

    Liger's other kernels (fused loss, RMSNorm, RoPE, the MLPs) are bound as ever.
    """
    if isinstance(module, KTExperts):
        logger.info("kt_hf: %s stays as it is, Liger's kernels go to the other layers.", module.label)
        return None
    return original(module, *args, **kwargs)


def refuse_stacked_lora(original: Callable[..., Any], optimizer: Any, *args: Any, **kwargs: Any) -> Any:
    """Replaces `torch.optim.Muon.__init__`, which takes matrices: expert LoRA is one 3-D tensor for a layer's experts.

    Raises:
        KTAMXConfigError: There are 3-D tensors among the parameters.
    """
    try:
        return original(optimizer, *args, **kwargs)
    except ValueError as error:
        groups = getattr(optimizer, "param_groups", [])  # none yet, where another argument is refused
        shapes = [tuple(p.shape) for group in groups for p in group["params"] if p.dim() == 3]
        if not shapes:
            raise
        raise KTAMXConfigError(
            f"{type(optimizer).__name__} takes matrices only. LoRA of experts as kt_hf trains it is 3-D, "
            f"{shapes[0]} for instance: give these parameters (p.dim() == 3) to another optimizer, as AdamW, leave the "
            "experts out of lora_target, or train with optim='adamw_torch'."
        ) from error
