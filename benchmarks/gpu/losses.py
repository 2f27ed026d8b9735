"""Part `losses`: 30 steps from the same LoRA with experts everywhere, with and without checkpointing, SFT and DPO.

`auto` moves its layers in the run. Its losses and parameters must be those of everything streamed and of everything
resident to the bit; the CPU's losses within 0.02.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from card import Card, Rows
from models import experts_of, make_config, make_model, same_lora
from routing import Spread
from sft import Preferences, Tokens, losses_of, trainer_for
from torch import Tensor

from kt_hf import KTConfig, apply_kt_moe

FAMILY, STEPS, MOST = "qwen3_30b", 30, 0.02
# Of DPO: so small that the loss takes all steps to fall. At a small rate the CPU's would fall later, for operators add
# LoRA to a product that is rounded to bf16 already.
BETA = 1e-3


def cases(experts: int, layers: int) -> dict[str, dict[str, Any]]:
    return {
        "auto": {},
        "streamed": {"kt_expert_placement": {"streamed": experts}},
        "resident": {"kt_expert_placement": {"resident_layers": layers}},
        "CPU": {"kt_num_gpu_experts": 0},
    }


def one(
    given: argparse.Namespace, card: Card, layers: int, where: dict[str, Any], checkpointing: bool, preferences: bool
) -> Any:
    """(losses, trained parameters in host memory, layers held by step) of a run."""
    config = make_config(FAMILY, given.shape, layers)
    length = min(given.sequence, 1024) // (1 + preferences)
    model = apply_kt_moe(make_model(config, card.device, stock=False), KTConfig(**where), tokens_per_step=length)
    Spread(model)
    tokens = (Preferences if preferences else Tokens)(config.vocab_size, length, different=2)
    trainer = trainer_for(
        card, model, 1, tokens, given.steps or STEPS, gradient_checkpointing=checkpointing, learning_rate=1e-3,
        **({"beta": BETA} if preferences else {}),
    )  # fmt: skip
    same_lora(trainer.model)
    trainer.train()
    parameters = {n: p.detach().cpu().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    return losses_of(trainer), parameters, [step.held for step in trainer.timer.steps]


def run(given: argparse.Namespace, card: Card, rows: Rows) -> None:
    layers = 4 if given.layers == 12 else given.layers
    card.limit((given.caps or [24.0])[0])
    for loss in given.loss:
        losses: dict[str, list[float]] = {}
        for checkpointing in (True, False) if loss == "SFT" else (True,):
            first: dict[str, Tensor] | None = None
            for name, where in cases(experts_of(make_config(FAMILY, given.shape, layers)), layers).items():
                card.clear()
                found, parameters, held = one(given, card, layers, where, checkpointing, loss == "DPO")
                key = f"{name}, checkpointing {'on' if checkpointing else 'off'}"
                first, losses[key] = first or parameters, found
                equal = all(torch.equal(value, first[n]) for n, value in parameters.items())
                rows.add(
                    case=key, loss=loss, layers=layers, first_loss=found[0], last_loss=found[-1], held=held,
                    losses=found, equals_auto=equal, same_losses=found == losses[f"auto, {key.split(', ')[1]}"],
                )  # fmt: skip
                del parameters
        apart = max(max(step) - min(step) for step in zip(*losses.values(), strict=True))
        rows.add(case="verdict", loss=loss, largest_difference=apart, allowed=MOST)
