"""What a Trainer's run has to do before the state of its optimizer is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..adapters.owned_optimizer import restore_state
from ..placement import packer_of
from .sharded import loading_whole_states


def begin_from(original: Callable[..., Any], trainer: Any, checkpoint: str | None, *args: Any, **kwargs: Any) -> Any:
    """Replaces `Trainer._load_optimizer_and_scheduler`, which every run calls before its callbacks.

    Layers that a run before, interrupted perhaps, has left on the GPU give their memory to the optimizer's state; and
    the folder of the checkpoint is noted, which callbacks are not told. Each rank gets the state of its own experts.

    Raises:
        KTAMXError: The state of some experts is missing, or cannot be divided.
    """
    packer = packer_of(trainer.model)
    if packer is not None and packer.promotion is not None:
        packer.promotion.release()
        packer.promotion.resumed = Path(checkpoint) if checkpoint else None
    with loading_whole_states(trainer):
        result = original(trainer, checkpoint, *args, **kwargs)
    if checkpoint is not None and packer is not None and (Path(checkpoint) / "optimizer.pt").is_file():
        restore_state(Path(checkpoint), trainer.model, trainer.optimizer)
    return result
