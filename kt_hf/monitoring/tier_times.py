"""What the parts of a planned placement took in training, beside what they should take."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Iterable

from ..backends.gpu.weight_stream import Streamer
from ..backends.tiered import TieredBackend
from ..experts.layer import KTExperts
from ..placement.packer import Packer
from ..placement.planner import TierPlan

logger = logging.getLogger(__name__)
_SKIPPED, _TIMED = 2, 3  # steps: the first make buffers and learn what comes after what


class TierTimes:
    """Times a few steps of a run and tells once. It keeps nothing of the model alive.

    The CPU's seconds are those inside its backend, without the copies that the plan has in them; forwards that the plan
    does not know (a DPO reference's, a recompute that computes again) are in what is told.

    Args:
        packer: Of a patched model.

    Attributes:
        told: The message, once there is one.
    """

    def __init__(self, packer: Packer) -> None:
        self._plan: TierPlan | None = packer.planned if packer.tiers and packer.tiers.on_gpu else None
        self._packer = weakref.ref(packer)
        self._steps = 0
        self._began: tuple[float, float] | None = None  # the step's begin, and the CPU's seconds until then
        self._step = self._cpu = self._streaming = 0.0
        self.told: str | None = None
        if streamer := self._streamer():
            streamer.watched()  # a run that was interrupted has left it on

    def step_begin(self, layers: Iterable[KTExperts]) -> None:
        if self._plan is None or self.told or self._steps < _SKIPPED:
            return
        if streamer := self._streamer():
            streamer.watch()
        self._began = time.perf_counter(), _cpu_seconds(layers)

    def step_end(self, layers: Iterable[KTExperts], forwards: int) -> None:
        """A step of so many forwards has ended."""
        if self._plan is None or self.told:
            return
        self._steps += 1
        if self._began is None:
            return
        begin, cpu = self._began
        self._began = None
        self._step += time.perf_counter() - begin
        self._cpu += _cpu_seconds(layers) - cpu
        if streamer := self._streamer():
            self._streaming += streamer.watched()
        if self._steps == _SKIPPED + _TIMED:
            self._tell(self._plan, _TIMED * max(forwards, 1))

    def _tell(self, plan: TierPlan, count: int) -> None:
        parts = [
            f"{name} {took / count:.3g} s ({planned:.3g} planned)"
            for name, took, planned in (
                ("streaming", self._streaming, plan.stream_seconds),
                ("the CPU's experts", self._cpu, plan.cpu_seconds),
            )
            if planned
        ]
        self.told = f"a forward and backward takes {self._step / count:.3g} s: {', '.join(parts) or 'all on the GPU'}"
        logger.info("kt_hf: kt_expert_placement=auto, after %d steps: %s.", self._steps, self.told)

    def _streamer(self) -> Streamer | None:
        packer = self._packer()
        return packer.streamer if packer and self._plan and self._plan.streamed else None


def _cpu_seconds(layers: Iterable[KTExperts]) -> float:
    backends = [layer.backend for layer in layers]
    return sum(backend.cpu_seconds for backend in backends if isinstance(backend, TieredBackend))
