"""What a run of the demo does, and the folder it writes to."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from . import DemoError

SUMMARY = "demo.json"  # also marks a folder as the demo's own
PLOT = "loss.png"
ADAPTER = "adapter"
RELOADED = "reloaded-answers.json"


@dataclass(frozen=True)
class DemoSettings:
    """Sizes of a run. The defaults take a few minutes and a few GB on two slow cores."""

    backend: str = "auto"
    lora_target: str = "all"
    steps: int = 24
    batch: int = 5  # examples a step; one is about 90 tokens
    learning_rate: float = 1e-3
    lora_rank: int = 8
    lora_alpha: int = 16
    dtype: str = "auto"  # of the model: auto, bfloat16 or float32
    num_experts: int = 8
    num_layers: int | None = None  # None: all 30
    held_out: int = 32  # examples in each evaluation
    eval_every: int = 8  # steps; and after the last
    new_tokens: int = 48  # longest answer
    least_fall: float = 0.15  # of the held-out loss, else the run has failed
    seed: int = 0

    def fast(self) -> DemoSettings:
        """These settings with few layers and steps: half a minute to check the machinery; the answers mean nothing."""
        return replace(
            self,
            steps=min(self.steps, 6),
            batch=2,
            num_layers=2,
            held_out=6,
            eval_every=3,
            new_tokens=8,
            least_fall=0.01,
        )

    def with_dtype(self) -> DemoSettings:
        """These settings with the dtype "auto" settled: float32 for a CPU without 16-bit products, else bfloat16."""
        from ..builtin.smollm2_moe import default_dtype

        return replace(self, dtype=default_dtype(self.dtype))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DemoSettings:
        """The settings that a summary has kept, by the names of the fields."""
        return cls(**{field.name: values[field.name] for field in fields(cls)})


class OutputFolder:
    """The demo's folder. A folder with something else in it is refused; the demo's own is written over."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.summary_file = path / SUMMARY
        self.plot_file = path / PLOT
        self.adapter = path / ADAPTER
        self.reloaded_file = path / RELOADED

    def claim(self, settings: DemoSettings) -> None:
        """Make the folder ours, and remove what an earlier run reported.

        Raises:
            DemoError: It is a file, or holds something that is not the demo's.
        """
        if self.path.exists() and not self.path.is_dir():
            raise DemoError(f"{self.path} is not a folder. Name another one with --output-dir.", exit_code=2)
        if self.path.is_dir() and any(self.path.iterdir()) and not self.summary_file.is_file():
            raise DemoError(
                f"{self.path} is not empty and was not made by the demo, so nothing is written there. "
                "Name another folder with --output-dir.",
                exit_code=2,
            )
        self.path.mkdir(parents=True, exist_ok=True)
        self.write({"status": "running", "settings": asdict(settings)})
        for old in (self.plot_file, self.reloaded_file):
            old.unlink(missing_ok=True)

    def write(self, summary: dict[str, Any]) -> None:
        """Write the summary."""
        self.summary_file.write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def read(self) -> dict[str, Any]:
        """The summary of the run that made this folder.

        Raises:
            DemoError: There is none.
        """
        if not self.summary_file.is_file():
            raise DemoError(f"{self.path} is not a folder of the demo: it has no {SUMMARY}.", exit_code=2)
        summary: dict[str, Any] = json.loads(self.summary_file.read_text(encoding="utf-8"))
        return summary
