"""Parts `full` and `resident`: the whole model on a small card, and a part of it on a large one, against stock.

`full` draws 48 layers' weights in memory. A step is held against the larger of two bounds: the bytes that cross the
bus, twice, at the rate measured; and stock's step, by the time that 12 and 6 layers take with everything on the GPU.
`resident` has both in one process, in turn: kt_hf with every layer on the GPU, and transformers with PEFT.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

from card import GB, Card, Rows
from checkpoints import make_checkpoint
from models import make_config, make_model
from routing import Spread
from sft import Step, Tokens, promotion_of, summary, trainer_for

from kt_hf import KTConfig, apply_kt_moe, load_kt_model
from kt_hf.placement import calibration, packer_of

FAMILY, STEPS, LEARN = "qwen3_30b", 4, 5


def stock_model(given: argparse.Namespace, card: Card, layers: int) -> Any:
    model = make_model(make_config(FAMILY, given.shape, layers), card.device, stock=True)
    model.spread = Spread(model)
    return model


def steps_of(card: Card, model: Any, batch: int, given: argparse.Namespace, steps: int, **how: bool) -> Any:
    """A trainer that has run."""
    tokens = Tokens(model.config.vocab_size, given.sequence)
    trainer = trainer_for(card, model, batch, tokens, steps, **how)
    trainer.train()
    return trainer


def stock_steps(given: argparse.Namespace, card: Card, rows: Rows, batches: list[int], layers: int) -> dict[int, float]:
    """Stock's seconds a step of so many layers, by batch, as their number has it that a quarter and an eighth take."""
    taken: dict[tuple[int, int], float] = {}
    parts = (max(1, layers // 4), max(1, layers // 8))
    card.limit(card.total_gb)
    for part in parts:
        model, adapt = stock_model(given, card, part), True
        for batch in batches:
            trainer = steps_of(card, model, batch, given, STEPS, patched=False, adapt=adapt)
            model, adapt = trainer.model, False
            found = summary(trainer.timer.steps[1:], batch * given.sequence)
            rows.add(case="stock", layers=part, batch=batch, **found)
            taken[part, batch] = found["step"]
            del trainer
        del model
        card.clear()
    more, fewer = parts
    return {
        batch: taken[more, batch] + (taken[more, batch] - taken[fewer, batch]) * (layers - more) / max(1, more - fewer)
        for batch in batches
    }


def run(given: argparse.Namespace, card: Card, rows: Rows) -> None:
    layers, batches = (8 if card.tiny else 48) if given.layers == 12 else given.layers, given.batch or [4, 8]
    rate = calibration.copy_rate(card.device)
    stock = stock_steps(given, card, rows, batches, layers)
    card.limit((given.caps or [24.0])[0])
    for batch in batches:
        card.clear()
        tokens = batch * given.sequence
        made = make_model(make_config(FAMILY, given.shape, layers), card.device, stock=False, own_memory=True)
        experts = sum(p.nbytes for name, p in made.named_parameters() if ".experts." in name)
        model = apply_kt_moe(made, KTConfig(), tokens_per_step=tokens)
        spread = Spread(model)
        del made
        row: dict[str, Any] = {"case": "auto", "layers": layers, "batch": batch, "cap_gb": card.cap}
        row |= {"experts_gb": experts / GB, "bus_gb_per_s": rate / GB, "stock_step": stock[batch]}
        try:
            trainer = steps_of(card, model, batch, given, LEARN + STEPS)
        except RuntimeError as error:
            rows.add(**row, error=str(error).splitlines()[0][:160])
            del model
            continue
        found = summary(trainer.timer.steps[LEARN:], tokens)
        promotion = promotion_of(trainer.model)
        held = sum(layer.weights.nbytes for layer in promotion._ordered()[: found["held"]]) if promotion else 0
        bus = 2 * (experts - held) / rate
        on_host = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad and p.device.type == "cpu")
        host = card.host_peak_gb()
        allowed = (experts + 18 * on_host) / GB + 6
        row |= found | {"bus_step": bus, "ratio": found["step"] / max(bus, stock[batch]), "host_gb": host}
        row |= {"host_allowed_gb": allowed, "lora_on_host": on_host, "tiers": str(packer_of(trainer.model).tiers)}
        rows.add(**row, touched=spread.describe())
        del trainer, model, promotion


def run_resident(given: argparse.Namespace, card: Card, rows: Rows) -> None:
    config, rounds = make_config(FAMILY, given.shape, given.layers), 2
    folder = given.checkpoint / f"{FAMILY}-{given.shape}-{given.layers}"
    make_checkpoint(config, folder, card.device)
    card.limit((given.caps or [80.0])[0])
    settings = KTConfig(
        kt_lora_rank=16, kt_expert_placement={"resident_layers": given.layers}, kt_moe_lora_device="gpu"
    )
    patched = load_kt_model(folder, settings, tokens_per_step=8 * given.sequence)
    patched.config.use_cache = False
    patched.spread = Spread(patched)
    models, adapt = {"resident": patched, "stock": stock_model(given, card, given.layers)}, True
    spread = patched.spread.describe
    for batch in given.batch or [1, 8]:
        taken: dict[str, list[Step]] = {"resident": [], "stock": []}
        for _ in range(rounds):
            for name, model in models.items():
                card.reset()
                how = {"patched": name == "resident", "adapt": adapt}
                trainer = steps_of(card, model, batch, given, STEPS, **how)
                taken[name] += trainer.timer.steps[1:]
                models[name] = trainer.model
                del trainer, model
                card.clear()
            adapt = False
        for name, steps in taken.items():
            found = summary(steps, batch * given.sequence)
            rows.add(case=name, layers=given.layers, batch=batch, cap_gb=card.cap, **found, touched=spread())
        medians = {name: statistics.median(s.seconds for s in steps) for name, steps in taken.items()}
        rows.add(case="verdict", batch=batch, ratio=medians["resident"] / medians["stock"])
