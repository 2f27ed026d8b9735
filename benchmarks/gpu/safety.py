"""Part `safety`: what comes between the steps of a run, at caps where there is little room.

A run of everything streamed has it first: evaluation every two steps with a batch twice as large, generation, rows
longer than any before, and a second adapter. Where that runs out of no memory, `auto` must not either. Its memory is
watched over 24 steps, at the last cap over 60.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from card import Card, Rows
from cells import Cell, load
from checkpoints import make_checkpoint
from models import make_config
from sft import Tokens, promotion_of, trainer_for
from transformers import TrainerCallback

FAMILY, STEPS, FEWER, SECOND = "qwen3_30b", 60, 24, 5
ROWS = {12: 1, 16: 2, 24: 4, 40: 8}  # of a training batch, by the cap in GB
EVENTS = 8  # steps in which everything has come once


class Generates(TrainerCallback):
    """Answers a prompt behind every fifth step."""

    def __init__(self, vocabulary: int) -> None:
        self._tokens = Tokens(vocabulary, 32)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % 5:
            return
        model = kwargs["model"].eval()
        made = {k: v.to(model.device) for k, v in self._tokens.batch(2, 32, 0).items() if k != "labels"}
        with torch.no_grad():
            model.generate(**made, max_new_tokens=3, do_sample=False, use_cache=True, pad_token_id=0)
        model.train()


class Fixed(TrainerCallback):
    """Keeps every layer in host memory, or lets `auto` move them."""

    def __init__(self, model: Any, streamed: bool) -> None:
        self._promotion, self._streamed = promotion_of(model), streamed

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        if self._promotion:
            self._promotion.fixed = self._streamed
            if self._streamed:
                self._promotion.hold(0)


def train(
    given: argparse.Namespace, card: Card, model: Any, streamed: bool, steps: int, batch: int, adapt: bool
) -> Any:
    """A trainer over rows that become longer at its seventh step; it may have run out of memory: (trainer, error)."""
    short, vocabulary = 3 * given.sequence // 4, model.config.vocab_size
    tokens = Tokens(vocabulary, lambda step: given.sequence if step > 6 and step % 6 == 1 else short, short)
    trainer = trainer_for(
        card, model, batch, tokens, steps, [Generates(vocabulary), Fixed(model, streamed)], adapt=adapt,
        eval_strategy="steps", eval_steps=2,
    )  # fmt: skip
    try:
        trainer.train()
    except torch.OutOfMemoryError as error:
        return trainer, f"step {trainer.state.global_step + 1}: {str(error).splitlines()[0][:120]}"
    return trainer, None


def describe(card: Card, trainer: Any, error: str | None) -> dict[str, Any]:
    steps = trainer.timer.steps
    half = len(steps) // 2
    peaks = [max((s.reserved_gb for s in part), default=0.0) for part in (steps[:half], steps[half:])]
    return {
        "error": error, "steps": len(steps), "held": [s.held for s in steps],
        "reserved_gb": [round(s.reserved_gb, 2) for s in steps],
        "allocated_gb": [round(s.allocated_gb, 2) for s in steps],
        "reserved_first_half": peaks[0], "reserved_second_half": peaks[1], "host_gb": card.host_peak_gb(),
    }  # fmt: skip


def run(given: argparse.Namespace, card: Card, rows: Rows) -> None:
    config = make_config(FAMILY, given.shape, given.layers)
    folder = given.checkpoint / f"{FAMILY}-{given.shape}-{given.layers}"
    make_checkpoint(config, folder, card.device)
    caps = given.caps or [12.0, 16.0, 24.0]
    card.limit(caps[0])
    card.clear()
    model, adapt = load(folder, Cell(caps[0], 1), given.sequence, streamed=True), True
    spread = model.spread
    for cap in caps:
        card.limit(cap)
        batch = given.batch[0] if given.batch else ROWS.get(int(cap), 1)
        many = given.steps or (STEPS if cap == caps[-1] else FEWER)
        errors: dict[bool, list[str]] = {True: [], False: []}
        for streamed in (True, False):
            for adapter, steps in (("default", min(EVENTS, many) if streamed else many), ("second", SECOND)):
                card.clear()
                if adapter == "second" and "second" not in model.peft_config:
                    model.add_adapter("second", model.peft_config["default"])
                if not adapt:
                    model.set_adapter(adapter)
                trainer, error = train(given, card, model, streamed, steps, batch, adapt)
                model, adapt = trainer.model, False
                case = f"{'streamed' if streamed else 'auto'}, {adapter} adapter"
                rows.add(case=case, cap_gb=cap, batch=batch, layers=given.layers, **describe(card, trainer, error))
                errors[streamed] += [error] if error else []
                model.zero_grad(set_to_none=True)
                del trainer
        rows.add(case="verdict", cap_gb=cap, lost=bool(errors[False] and not errors[True]), touched=spread.describe())
