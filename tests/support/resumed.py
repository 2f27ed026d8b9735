"""A run that is resumed in a second process's stead, with another optimizer's implementation or LoRA elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from tests.support.trainers import result, trainer_for

# Ways to compute AdamW: their states differ in where the number of steps is.
KINDS: dict[str, Any] = {"plain": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}


class State(TrainerCallback):
    """Looks at the optimizer's state as the first step begins."""

    def __init__(self) -> None:
        self.fused: set[bool] = set()
        self.states: list[dict[str, Tensor]] = []
        self.devices: list[str] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.states:
            return
        optimizer = kwargs["optimizer"]
        for group in optimizer.param_groups:
            self.fused.add(bool(group["fused"]))
            for parameter in group["params"]:
                values = optimizer.state[parameter]
                self.states.append({key: value.detach().cpu().clone() for key, value in values.items()})
                assert {values[key].device for key in ("exp_avg", "exp_avg_sq")} == {parameter.device}
                self.devices.append(parameter.device.type)
                on_gpu = bool(group["fused"]) and parameter.is_cuda
                assert values["step"].device.type == ("cuda" if on_gpu else "cpu")


def resumed_like_uninterrupted(
    before: Callable[[], nn.Module],
    after: Callable[[], nn.Module],
    kinds: tuple[str, str],
    folder: Path,
    callbacks: tuple[TrainerCallback, ...] = (),
    **run: Any,
) -> State:
    """Train six steps; then the last three again from the checkpoint, with another model, optimizer, and callbacks.

    The resumed run begins with the very moments that were saved, on the devices of its parameters, and its losses are
    those of the uninterrupted one.
    """
    seen, losses = State(), []
    for model, kind, checkpoint in ((before(), kinds[0], None), (after(), kinds[1], folder / "checkpoint-3")):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-3, **KINDS[kind])
        overrides = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-3, **run}
        trainer = trainer_for(model, folder, optimizers=(optimizer, None), **overrides)
        for callback in (*callbacks, seen) if checkpoint else ():
            trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        losses.append(result(trainer).losses[-3:])
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 0.02
    saved = torch.load(folder / "checkpoint-3" / "optimizer.pt", map_location="cpu", weights_only=True)["state"]
    assert len(saved) == len(seen.states) > 0
    for number, state in enumerate(seen.states):
        assert state.keys() == saved[number].keys()
        assert all(torch.equal(value, saved[number][key]) for key, value in state.items())
        assert state["step"] == 3
    return seen
