"""Part `large`: some layers of the largest models, streamed, against the bus and the same layers held on the GPU.

Qwen3-235B-A22B's shape in bf16, weights drawn in memory; DeepSeek-V3's from a checkpoint in FP8. A stock SFTTrainer
trains each; the promotion code moves the live model: first every layer is streamed, then as many as fit are held.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from card import GB, Card, Rows
from models import make_config, make_fp8_checkpoint, make_model
from routing import Spread
from sft import Tokens, promotion_of, summary, trainer_for
from transformers import TrainerCallback

from kt_hf import KTConfig, apply_kt_moe, load_kt_model
from kt_hf.placement import calibration

LAYERS = {"qwen3_235b": 6, "deepseek_v3": 3}
STEPS = 4  # of each placement, the first not timed


class Mover(TrainerCallback):
    """Streams every layer in the first half of the steps, holds all that fit in the second."""

    def __init__(self, card: Card, model: Any) -> None:
        self._card, self._promotion = card, promotion_of(model)
        assert self._promotion, "nothing that could be moved"

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._promotion and state.global_step in (0, STEPS):
            self._promotion.fixed = True  # not before: a run that begins lets layers move
            self._promotion.hold(0 if state.global_step == 0 else len(self._promotion._ordered()))
            self._card.synchronize()
            self._card.reset()


def load(family: str, layers: int, given: argparse.Namespace, card: Card) -> Any:
    """The patched model, everything streamed."""
    config = make_config(family, given.shape, layers)
    settings = KTConfig(kt_lora_rank=16, kt_moe_lora_device="gpu")
    tokens = (given.batch or [8])[0] * given.sequence
    if family == "deepseek_v3":
        with tempfile.TemporaryDirectory(dir=given.checkpoint) as folder:
            make_fp8_checkpoint(config, Path(folder), card.device)
            print("checkpoint written", flush=True)
            model = load_kt_model(folder, settings, tokens_per_step=tokens)
    else:
        made = make_model(config, card.device, stock=False, own_memory=True)
        model = apply_kt_moe(made, settings, tokens_per_step=tokens)
    model.config.use_cache = False
    return model


def run(given: argparse.Namespace, card: Card, rows: Rows) -> None:
    given.checkpoint.mkdir(parents=True, exist_ok=True)
    card.limit((given.caps or [130.0])[0])
    rate = calibration.copy_rate(card.device)
    for family in given.family or list(LAYERS):
        layers, batch = (2 if card.tiny else LAYERS[family]), (given.batch or [8])[0]
        card.clear()
        model = load(family, layers, given, card)
        print(f"{family}: loaded", flush=True)
        spread, tokens = Spread(model), batch * given.sequence
        mover = Mover(card, model)
        made = Tokens(model.config.vocab_size, given.sequence)
        trainer = trainer_for(card, model, batch, made, 2 * STEPS, [mover])
        common: dict[str, Any] = {"family": family, "layers": layers, "batch": batch, "bus_gb_per_s": rate / GB}
        try:
            trainer.train()
        except torch.OutOfMemoryError as error:
            rows.add(**common, error=str(error).splitlines()[0][:160])
        steps, promotion = trainer.timer.steps, promotion_of(trainer.model)
        weights = sum(layer.weights.nbytes for layer in promotion._ordered()) if promotion else 0
        bus = 2 * weights / rate
        found = {"streamed": steps[1:STEPS], "held": steps[STEPS + 1 :]}
        taken = {name: summary(some, tokens) for name, some in found.items() if some}
        for name, row in taken.items():
            rows.add(**common, case=name, experts_gb=weights / GB, bus_step=bus, **row, host_gb=card.host_peak_gb())
        if len(taken) == 2:
            ratio = taken["streamed"]["step"] / max(bus, taken["held"]["step"])
            rows.add(**common, case="verdict", ratio=ratio, touched=spread.describe())
        del trainer, model, mover, promotion
