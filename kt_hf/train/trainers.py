"""TRL's trainer of a run's stage, around a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .config.settings import TrainSettings
from .config.stages import stage_of
from .optimizer import use_loraplus


def make_trainer(
    settings: TrainSettings,
    options: dict[str, Any],
    model: Any,
    peft_config: Any,
    train_data: Any,
    eval_data: Any,
    tokenizer: Any,
    rewards: Sequence[Any] = (),
    callbacks: Sequence[Any] = (),
) -> Any:
    """The trainer of `settings.run.stage`, ready to train.

    Args:
        settings: The run's.
        options: Keyword arguments of its configuration.
        model: A transformers model, or a PeftModel.
        peft_config: LoRA to make, None for a model that has some.
        train_data: The `Dataset` to train on.
        eval_data: The one to evaluate on; None for none.
        tokenizer: Or the processor of a model that sees.
        rewards: Functions that judge what the model writes (`stage: grpo`).
        callbacks: To call while it trains.
    """
    from transformers import set_seed

    stage = stage_of(settings.run.stage)
    args = stage.config_class()(**options)
    if getattr(args, "router_aux_loss_coef", None) is not None:
        args.router_aux_loss_coef = float(args.router_aux_loss_coef)  # for the model's configuration, which takes no 0
    set_seed(args.seed)  # LoRA's start
    # With a quantized base TRL rounds what is trained to bf16, in which small steps of an optimizer vanish.
    exact = [(p, p.data) for p in model.parameters() if p.requires_grad] if settings.run.quantization_bit else []
    trainer = stage.trainer_class()(
        model,
        args=args,
        train_dataset=train_data,
        eval_dataset=eval_data,
        processing_class=tokenizer,
        peft_config=peft_config,
        callbacks=list(callbacks),
        **({"reward_funcs": list(rewards)} if stage.generates else {}),
    )
    if settings.run.quantization_bit:
        _in_fp32(trainer.model, exact)
    return trainer


def loraplus(settings: TrainSettings, trainer: Any) -> None:
    """Give the trainer LoRA+'s optimizer, where the settings ask for it."""
    if settings.run.loraplus_lr_ratio:
        use_loraplus(trainer, settings.run.loraplus_lr_ratio)


def _in_fp32(model: Any, exact: list[tuple[Any, Any]]) -> None:
    """Give trained parameters fp32 again: the values they had before, those that the trainer made as they are."""
    for parameter, value in exact:
        parameter.data = value.to(parameter.device)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
