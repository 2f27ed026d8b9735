"""Part `cells`: `auto` against the same live model with its layers moved by hand, in cells of (cap, batch, bus).

In each cell one stock SFTTrainer trains. It begins as a user's does; after some steps, which `auto` has to learn in,
its steps are timed. Then the promotion code holds other numbers of layers on the GPU, from none to as many as fit by
the memory measured, three steps each. The last numbers leave no reserve, so they may run out of memory, which is a
result too.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from card import GB, Card, Rows
from checkpoints import make_checkpoint
from models import experts_of, make_config
from parts import slower_bus
from routing import Spread
from sft import Step, Timer, Tokens, promotion_of, summary, trainer_for
from transformers import TrainerCallback

from kt_hf import KTConfig, load_kt_model
from kt_hf.discovery import by_layer, find_experts, skeleton
from kt_hf.placement import choice, packer_of
from kt_hf.placement.assembly import make_packer, memory_budget
from kt_hf.placement.tiers import Tiers

LEARN, TIMED, MOVED = 5, 3, 3  # steps: before auto is timed, timed, and of each number of layers, the first not timed


@dataclass(frozen=True)
class Cell:
    """GB that PyTorch may have, rows of a batch, and how many times each copy is made: `24/1/4`."""

    cap: float
    batch: int
    bus: int = 1

    @classmethod
    def parse(cls, text: str) -> Cell:
        cap, batch, *bus = text.split("/")
        return cls(float(cap), int(batch), int(bus[0]) if bus else 1)

    def __str__(self) -> str:
        return f"{self.cap:g}/{self.batch}" + (f"/{self.bus}" if self.bus > 1 else "")


CELLS = {
    "qwen3_30b": ["12/1", "24/1", "24/1/2", "24/1/4", "12/4", "16/4", "24/4", "24/8", "24/8/2", "24/8/4", "40/16"],
    "deepseek_v2": ["24/1", "24/8"],
}


class Mover(TrainerCallback):
    """Has `auto` learn and run, then other numbers of layers, and reports each once it has run.

    Args:
        card: Of the run.
        model: That is trained.
        report: Called with (name, steps, layers asked for or -1, error) of what has run.
        lean: Whether steps are long: fewer of them, and fewer numbers of layers.

    Attributes:
        timer: Of the same trainer, which comes behind this.
    """

    def __init__(self, card: Card, model: Any, report: Any, lean: bool) -> None:
        self.timer: Timer
        self._card, self._report, self._promotion, self._lean = card, report, promotion_of(model), lean
        self._phases: list[tuple[str, int, int]] = [("learning", LEARN, -1), ("auto", TIMED, -1)]
        self._left, self._from = LEARN, 0
        self.found = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._left:
            self._left -= 1
            return
        self.finish(None)
        _, self._left, held = self._phases[0]
        self._left -= 1
        if held >= 0 and self._promotion:
            self._promotion.fixed = True
            self._promotion.hold(held)
            self._card.synchronize()
            self._card.reset()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._left or len(self._phases) > 1:
            return
        if not self.found:
            steps = MOVED - self._lean
            self._phases += [(f"{n} layers", steps, n) for n in self._numbers()]
            self.found = True
        control.should_training_stop = len(self._phases) == 1

    def finish(self, error: str | None) -> None:
        """Report the phase that ran, or that could not."""
        if self._phases:
            name, _, held = self._phases.pop(0)
            self._report(name, self.timer.steps[self._from :], held, error)
            self._from = len(self.timer.steps)

    def _numbers(self) -> list[int]:
        """Nothing, quarters of what `auto` holds, that, and as many as fit without its reserve, ascending."""
        if self._promotion is None:
            return []
        layers = [layer.weights.nbytes for layer in self._promotion._ordered()]
        # The step that is ending is not in the timer's list yet.
        allocated = max(s.allocated_gb for s in self.timer.steps[-TIMED:]) if not self._card.tiny else 0.0
        held, room = len(self._promotion.held), (self._card.cap - allocated) * GB - 0.01 * self._card.cap * GB
        most = held
        while most < len(layers) and layers[most] <= room:
            room -= layers[most]
            most += 1
        base = held if held >= 4 else min(4, most)
        between = {base // 2} if self._lean else {base * q // 4 for q in (1, 2, 3)} | {(held + most + 1) // 2}
        return sorted({0, held, most} | between)


def load(folder: Path, cell: Cell, sequence: int, streamed: bool = False) -> Any:
    """The model with nothing set; with `streamed` the CPU is not considered."""
    kept = choice.cpu_may_be_faster
    if streamed:
        choice.cpu_may_be_faster = lambda *_: False
    try:
        model = load_kt_model(folder, KTConfig(kt_lora_rank=16), tokens_per_step=cell.batch * sequence)
    finally:
        choice.cpu_may_be_faster = kept
    model.config.use_cache = False
    model.spread = Spread(model)
    return model


def planned(config: Any, cell: Cell, sequence: int) -> Tiers:
    """Where `auto` would begin in this cell, by measuring but without a model."""
    outline = skeleton(config)
    shapes = {site.name: site.shape for site in find_experts(outline, weightless=True)}
    made = make_packer(KTConfig(kt_lora_rank=16), shapes, torch.bfloat16)
    made.place(by_layer(shapes), None, memory_budget(outline, config, cell.batch * sequence, torch.bfloat16))
    assert made.tiers is not None
    return made.tiers


def run_cell(
    model: Any, cell: Cell, given: argparse.Namespace, card: Card, rows: Rows, adapt: bool, family: str,
    times: dict[str, float],
) -> Any:  # fmt: skip
    """All placements of a cell; the model, with its adapter. `times` may have the one that `auto` chose already."""
    tokens, common, begun = cell.batch * given.sequence, {"family": family, "cell": str(cell)}, "auto" in times
    common |= {"cap_gb": cell.cap, "batch": cell.batch, "bus": f"1/{cell.bus}", "layers": given.layers}
    tiers = packer_of(model).tiers

    def report(name: str, steps: list[Step], held: int, error: str | None) -> None:
        if name == "learning" and not error:
            return
        name = f"{name}, streamed" if begun and name == "auto" else name
        row: dict[str, Any] = {"case": name, "asked": held, "error": error}
        if steps and not error:
            row |= summary(steps[1:] if held >= 0 else steps, tokens)
            times[name] = row["step"]
        rows.add(**common | row | {"touched": spread.describe(), "tiers": str(tiers), "host_gb": card.host_peak_gb()})

    spread, mover = model.spread, Mover(card, model, report, cell.bus > 1)
    made = Tokens(model.config.vocab_size, given.sequence)
    trainer = trainer_for(card, model, cell.batch, made, LEARN + TIMED + 7 * MOVED, [mover], adapt=adapt)
    mover.timer = trainer.timer
    try:
        trainer.train()
        mover.finish(None)
    except torch.OutOfMemoryError as error:
        mover.finish(f"out of memory: {str(error).splitlines()[0][:120]}")
    if "auto" in times and (begun or promotion_of(trainer.model)):
        best = min(times, key=lambda name: times[name])
        rows.add(**common, case="verdict", ratio=times["auto"] / times[best], best=best, auto=times["auto"])
    wrapped = trainer.model
    wrapped.spread = spread
    wrapped.zero_grad(set_to_none=True)
    if promotion := promotion_of(wrapped):
        promotion.fixed = False
        promotion.release()
    return wrapped


def by_batch(cells: list[Cell]) -> Iterator[tuple[int, list[Cell]]]:
    """Cells of a batch share a load."""
    for batch in dict.fromkeys(cell.batch for cell in cells):
        yield batch, [cell for cell in cells if cell.batch == batch]


def run(given: argparse.Namespace, card: Card, rows: Rows) -> None:
    for family in given.family or ["qwen3_30b", "deepseek_v2"]:
        layers = given.layers
        config = make_config(family, given.shape, layers)
        folder = given.checkpoint / f"{family}-{given.shape}-{layers}"
        make_checkpoint(config, folder, card.device)
        for _, cells in by_batch([Cell.parse(text) for text in given.cells or CELLS[family]]):
            model, adapt = None, True
            for cell in cells:
                card.limit(cell.cap)
                times: dict[str, float] = {}
                with slower_bus(cell.bus):
                    tiers = planned(config, cell, given.sequence)
                    if tiers.on_gpu < experts_of(config):
                        # A part on the CPU: by a model that cannot be moved, beside one that is streamed.
                        model = None
                        card.clear()
                        other = load(folder, cell, given.sequence)
                        run_cell(other, cell, given, card, rows, True, family, times)
                        del other
                    if model is None or (not times and tiers != packer_of(model).tiers):
                        model, adapt = None, True
                        card.clear()
                        model = load(folder, cell, given.sequence, streamed=True)
                    model, adapt = run_cell(model, cell, given, card, rows, adapt, family, times), False
                card.clear()
            model = None
            card.clear()
