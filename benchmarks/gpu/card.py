"""The card that placements are measured on: its memory and the cap on it; or the CPU in its place, to try a script."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from common import free_memory, machine
from train import peaks, reset_peaks

from kt_hf.placement import calibration, choice, promotion

GB = 10**9


class Card:
    """A GPU, or with `tiny` the CPU, whose memory is then by script: each GB of a cap is room for a layer."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.tiny, self.cap = device, device.type == "cpu", 0.0
        if self.tiny:
            promotion.DeviceMemory = ScriptedMemory  # type: ignore[misc, assignment]
            calibration.copy_rate = choice.copy_rate = lambda *_: 1e12

    @property
    def total_gb(self) -> float:
        return 80.0 if self.tiny else torch.cuda.get_device_properties(self.device).total_memory / GB

    def limit(self, gb: float) -> None:
        """Let PyTorch have so many GB."""
        self.cap = ScriptedMemory.cap = min(gb, self.total_gb)
        if not self.tiny:
            torch.cuda.set_per_process_memory_fraction(self.cap / self.total_gb, self.device)

    def synchronize(self) -> None:
        if not self.tiny:
            torch.cuda.synchronize()

    def peak(self) -> dict[str, float]:
        """GB that tensors took at most, and that PyTorch took from the card, since the last `reset`."""
        if self.tiny:
            return {"allocated_gb": 0.0, "reserved_gb": 0.0}
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return {"allocated_gb": allocated / GB, "reserved_gb": reserved / GB}

    def reset(self) -> None:
        if not self.tiny:
            torch.cuda.reset_peak_memory_stats()

    def clear(self) -> None:
        """Give back what deleted models held, of the card and of the host's peak."""
        free_memory(self.device)
        reset_peaks(self.device)

    def host_peak_gb(self) -> float:
        return peaks(self.device)["host_peak_gb"]


class ScriptedMemory:
    """Of the CPU in the card's place: a pass takes as much as ten layers."""

    cap = 0.0

    def __init__(self, _: Any) -> None:
        self.promotion: Any = None

    def allocated(self) -> int:
        return int(10 * self._layer()) + len(self.promotion.held) * self._layer() if self.promotion else 0

    peak = allocated

    def reset_peak(self) -> None:
        return

    trim = reset_peak

    def limit(self) -> int:
        return int(self.cap * self._layer())

    def _layer(self) -> int:
        return max((layer.weights.nbytes for layer in self.promotion._layers.values()), default=1)


class Rows:
    """Results as they come, a line of JSON each: a run that is cut off keeps those it has."""

    def __init__(self, folder: Path, part: str, card: Card) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / f"{part}.jsonl"
        self._common = machine(card.device)
        self._begin = time.perf_counter()

    def add(self, **row: Any) -> dict[str, Any]:
        rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
        with self.file.open("a") as file:
            file.write(json.dumps(self._common | rounded) + "\n")
        words = "  ".join(f"{k} {v}" for k, v in rounded.items() if v not in (None, ""))
        print(f"[{time.perf_counter() - self._begin:6.1f} s] {words}", flush=True)
        return row


def read_rows(folder: Path, part: str) -> list[dict[str, Any]]:
    """What a part has written; [] before it ran."""
    file = folder / f"{part}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
