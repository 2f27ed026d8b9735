"""Seconds of a training step by part, of models that kt_hf patched.

`operator` is the time inside the CPU's backend, `wait` the host's for the GPU before it (attention and what else runs
there), `copy in` and `copy out` the GPU's time for copies to and from the CPU, `other` the rest of the step. On a GPU
`copy in` is part of `wait`, and `copy out` may overlap with anything.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from kt_hf.backends import tiered as split
from kt_hf.backends import transfer
from kt_hf.backends.gpu import grouped_mm as grouped
from kt_hf.backends.gpu import pinned_weights, streamed
from kt_hf.backends.gpu import weight_stream as streamer
from kt_hf.experts import function as autograd
from kt_hf.experts import layer as experts
from kt_hf.experts import runner
from kt_hf.experts.layer import update_lora
from kt_hf.placement import calibration as rates
from kt_hf.placement import choice

PARTS = ("operator forward", "operator backward", "wait", "copy in", "copy out", "optimizer", "refresh", "other")
COUNTED = ("operator forward", "operator backward", "wait", "optimizer", "refresh")


class Parts:
    """Seconds by part of the current step."""

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda
        self.seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, Any, Any]] = []

    @contextlib.contextmanager
    def host(self, part: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - begin

    def of_host(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.host(part):
                return call(*args, **kwargs)

        return timed

    def of_gpu(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if not self.cuda:
                return call(*args, **kwargs)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            result = call(*args, **kwargs)
            end.record()
            self._events.append((part, begin, end))
            return result

        return timed

    def take(self) -> dict[str, float]:
        """After a synchronisation: what was counted since the last call."""
        for part, begin, end in self._events:
            self.seconds[part] += begin.elapsed_time(end) / 1e3
        found, self.seconds, self._events = dict(self.seconds), defaultdict(float), []
        return found


def watch(model: Any, parts: Parts) -> None:
    """Time the CPU's backends of a patched model, and all transfers."""
    for layer in model._kt_wrappers:
        backend = layer._runner.backend
        for one in [part.backend for part in getattr(backend, "parts", ())] or [backend]:
            if one.device.type == "cpu" and one.name != "streamed":
                one.forward = parts.of_host("operator forward", one.forward)
                one.backward = parts.of_host("operator backward", one.backward)


def watch_transfers(parts: Parts) -> None:
    to_host, to_device = parts.of_gpu("copy in", transfer.to_host), parts.of_gpu("copy out", transfer.to_device)
    for module in (autograd, runner, split, experts, grouped, streamed):
        for name, timed in (("to_host", to_host), ("to_device", to_device)):
            if hasattr(module, name):
                setattr(module, name, timed)
    transfer.Arriving.wait = parts.of_host("wait", transfer.Arriving.wait)  # type: ignore[method-assign]


class Steps:
    """Training steps on one random batch.

    Args:
        model: With LoRA, on its device.
        sequence: Tokens a row, `batch` rows.
        lr: Of AdamW, fused.
    """

    def __init__(self, model: Any, sequence: int, batch: int, lr: float) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        vocabulary = min(512, model.config.vocab_size)
        made = torch.randint(vocabulary, (batch, sequence), generator=torch.Generator().manual_seed(2))
        self.ids = made.to(self.device)
        trained = [p for p in model.parameters() if p.requires_grad] + getattr(model, "more_parameters", [])
        self.optimizer = torch.optim.AdamW(trained, lr=lr, fused=True)
        layers = getattr(model, "_kt_wrappers", [])
        self.refresh = getattr(model, "refresh", lambda: update_lora(layers))

    def one(self, parts: Parts | None) -> tuple[float, float, dict[str, float]]:
        """Seconds, the loss, and seconds by part."""
        synchronise = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        synchronise()
        begin = time.perf_counter()
        if parts:
            parts.take()
        loss = self.model(input_ids=self.ids, labels=self.ids).loss
        loss.backward()
        synchronise()
        middle = time.perf_counter()
        self.optimizer.step()
        self.optimizer.zero_grad()
        synchronise()
        stepped = time.perf_counter()
        self.refresh()
        synchronise()
        seconds = time.perf_counter() - begin
        if not parts:
            return seconds, loss.item(), {}
        found = parts.take() | {"optimizer": stepped - middle, "refresh": begin + seconds - stepped}
        found["other"] = seconds - sum(found.get(part, 0.0) for part in COUNTED)
        return seconds, loss.item(), found


@contextlib.contextmanager
def slower_bus(times: int) -> Iterator[None]:
    """Copies of expert weights take so many times as long, also where the planner measures them: 2 is PCIe 4."""
    copy, to_gpu, rate = streamer.Streamer._copy, pinned_weights.HostWeights.to_gpu, choice.copy_rate

    def repeated(self: Any, source: Tensor, target: Tensor) -> None:
        for _ in range(times):
            copy(self, source, target)

    def moved(self: Any, device: torch.device) -> None:
        fresh = self.resident is None
        to_gpu(self, device)
        for _ in range(times - 1 if fresh else 0):
            for source, target in zip(self.tensors, self.resident, strict=True):
                target.copy_(source, non_blocking=True)

    def slower_rate(*args: Any) -> float:
        return rate(*args) / times

    streamer.Streamer._copy = repeated  # type: ignore[method-assign]
    pinned_weights.HostWeights.to_gpu = moved  # type: ignore[method-assign]
    rates.copy_rate = choice.copy_rate = slower_rate
    try:
        yield
    finally:
        streamer.Streamer._copy, pinned_weights.HostWeights.to_gpu = copy, to_gpu  # type: ignore[method-assign]
        rates.copy_rate = choice.copy_rate = rate
