"""LoRA+: B of each LoRA pair learns faster than A (Hayou et al., 2024)."""

from __future__ import annotations

from typing import Any


def use_loraplus(trainer: Any, ratio: float) -> None:
    """Give a trainer PEFT's LoRA+ groups of the optimizer that its arguments name.

    Args:
        trainer: TRL's, around a PeftModel, before it trains.
        ratio: Learning rate of B by that of A, which is `learning_rate`.
    """
    from peft.optimizers import create_loraplus_optimizer

    kind, options = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
    options = dict(options)
    learning_rate = options.pop("lr", trainer.args.learning_rate)
    trainer.optimizer = create_loraplus_optimizer(
        model=trainer.model,
        optimizer_cls=kind,
        lr=learning_rate,
        loraplus_lr_ratio=ratio,
        loraplus_weight_decay=trainer.args.weight_decay,
        **options,
    )
