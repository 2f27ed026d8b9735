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
_SKIPPED, _TIMED = 2, 3  # steps; the first ones make buffers and learn the layers' order


class TierTimes:
    """Times a few steps of a run whose tiers were planned, and logs once what they took. Keeps no model alive.

    The CPU's seconds are those inside its backend, without the copies that the plan counts; forwards that the plan
    leaves out (a DPO reference's, a recompute that computes again) are counted.

    Args:
        packer: What built the backends of a patched model.

    Attributes:
        message: What was logged; None before.
    """

    def __init__(self, packer: Packer) -> None:
        self._plan: TierPlan | None = packer.planned if packer.tiers and packer.tiers.on_gpu else None
        self._packer = weakref.ref(packer)
        self._steps = 0
        self._began: tuple[float, float] | None = None  # the step's begin, and the CPU's seconds until then
        self._step = self._cpu = self._streaming = 0.0
        self.message: str | None = None
        if streamer := self._streamer():
            streamer.watched()  # a run that was interrupted has left it on

    def step_begin(self, layers: Iterable[KTExperts]) -> None:
        """A training step of a model with these layers begins."""
        if self._plan is None or self.message or self._steps < _SKIPPED:
            return
        if streamer := self._streamer():
            streamer.watch()
        self._began = time.perf_counter(), _cpu_seconds(layers)

    def step_end(self, layers: Iterable[KTExperts], forwards: int) -> None:
        """The step has ended.

        Args:
            layers: Of the model.
            forwards: How many forwards the step had: its gradient accumulation.
        """
        if self._plan is None or self.message:
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
            self._log(self._plan, _TIMED * max(forwards, 1))

    def _log(self, plan: TierPlan, count: int) -> None:
        parts = [
            f"{name} {seconds / count:.3g} s ({planned:.3g} planned)"
            for name, seconds, planned in (
                ("streaming", self._streaming, plan.stream_seconds),
                ("the CPU's experts", self._cpu, plan.cpu_seconds),
            )
            if planned
        ]
        self.message = (
            f"a forward and backward takes {self._step / count:.3g} s: {', '.join(parts) or 'all on the GPU'}"
        )
        logger.info("kt_hf: kt_expert_placement=auto, after %d steps: %s.", self._steps, self.message)

    def _streamer(self) -> Streamer | None:
        packer = self._packer()
        return packer.streamer if packer and self._plan and self._plan.streamed else None


def _cpu_seconds(layers: Iterable[KTExperts]) -> float:
    backends = [layer.backend for layer in layers]
    return sum(backend.cpu_seconds for backend in backends if isinstance(backend, TieredBackend))
