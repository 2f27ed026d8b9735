"""Models for which TRL cannot compute the loss of a stage: refused before weights are loaded."""

from __future__ import annotations

from typing import Any

from ..errors import KTAMXConfigError, KTAMXModelNotSupportedError
from .config.settings import TrainSettings
from .config.stages import stage_of


def check_loss(settings: TrainSettings, outline: Any) -> None:
    """Refuse what TRL would stop at in the first step.

    Args:
        settings: The run's.
        outline: The model, on any device.

    Raises:
        KTAMXModelNotSupportedError: TRL takes the loss from hidden states, which the model does not give.
        KTAMXConfigError: The loss of the routers is on, and the configuration does not name what TRL needs for it.
    """
    stage, kind = stage_of(settings.run.stage), type(outline).__name__
    if stage.scores or not stage.chunked:
        return
    if outline.base_model is outline:
        raise KTAMXModelNotSupportedError(
            f"stage: TRL takes the loss of {stage.name} from the hidden states of a model's base_model, and {kind} has "
            "none. Train it by transformers' Trainer, after apply_kt_moe."
        )
    text = outline.config.get_text_config()
    coefficient = settings.trainer.get("router_aux_loss_coef")
    coefficient = getattr(text, "router_aux_loss_coef", 0.0) if coefficient is None else coefficient
    missing = [name for name in ("num_experts", "num_experts_per_tok") if not hasattr(text, name)]
    if stage.tokenized and coefficient and missing and hasattr(text, "output_router_logits"):
        raise KTAMXConfigError(
            f"router_aux_loss_coef: it is {coefficient} for {kind}, and TRL cannot compute the loss of its routers "
            f"(its configuration has no {' and no '.join(missing)}). Set router_aux_loss_coef: 0."
        )
