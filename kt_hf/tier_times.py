"""What the parts of a planned placement took in training, beside what they should take."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from .backends.split import SplitBackend
from .experts import KTExperts
from .planner import Split

logger = logging.getLogger(__name__)
_SKIPPED, _TIMED = 2, 3  # steps: the first make buffers and learn what comes after what


class TierTimes:
    """Times a few steps of a run and tells once.

    Args:
        layers: Of a patched model.

    Attributes:
        told: The message, once there is one.
    """

    def __init__(self, layers: Sequence[KTExperts]) -> None:
        packer = layers[0].packer
        self._plan: Split | None = packer.planned if packer.tiers and packer.tiers.on_gpu else None
        self._streamer = packer.streamer if self._plan and self._plan.streamed else None
        self._layers = layers
        self._steps = 0
        self._begin = self._cpu = 0.0
        self.told: str | None = None

    def step_end(self, forwards: int) -> None:
        """A step of so many forwards has ended."""
        if self._plan is None or self.told:
            return
        self._steps += 1
        if self._steps == _SKIPPED:
            self._begin, self._cpu = time.perf_counter(), self._cpu_seconds()
            if self._streamer:
                self._streamer.watch()
        elif self._steps == _SKIPPED + _TIMED:
            count = _TIMED * max(forwards, 1)
            cpu, step = self._cpu_seconds() - self._cpu, time.perf_counter() - self._begin
            streaming = self._streamer.watched() if self._streamer else 0.0
            parts = [
                f"{name} {took / count:.3g} s ({planned:.3g} planned)"
                for name, took, planned in (
                    ("streaming", streaming, self._plan.stream_seconds),
                    ("the CPU's experts", cpu, self._plan.cpu_seconds),
                )
                if planned
            ]
            self.told = f"a forward and backward takes {step / count:.3g} s: {', '.join(parts) or 'all on the GPU'}"
            logger.info("kt_hf: kt_expert_placement=auto, after %d steps: %s.", self._steps, self.told)

    def _cpu_seconds(self) -> float:
        backends = [layer.backend for layer in self._layers]
        return sum(backend.cpu_seconds for backend in backends if isinstance(backend, SplitBackend))
