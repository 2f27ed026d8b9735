"""Runs in this process, on a tiny model: what they print, and whether they got as far as loading it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kt_hf.train import run as run_module
from kt_hf.train.config.read import read_arguments
from kt_hf.train.run import run
from tests.support.tiny import write_yaml


@dataclass
class Runs:
    """`again` runs the file `run.yaml` of `folder`; `printed` is what the last run printed."""

    folder: Path
    printed: str = ""

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def again(self, *overrides: str) -> dict[str, Any]:
        with open(os.devnull, "w") as nowhere:
            console = Console(record=True, width=300, file=nowhere)
            try:
                return run(read_arguments(self.folder / "run.yaml", overrides), console)
            finally:
                self.printed = console.export_text()


def runs_in(folder: Path, model: Path, rows: list[dict[str, Any]] | None = None, **settings: object) -> Runs:
    """Two steps of two rows, saved after each."""
    rows = rows or [{"instruction": f"{i} + {i}?", "output": f"It is {2 * i}."} for i in range(4)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_yaml(
        folder / "run.yaml",
        **{
            "model_name_or_path": str(model), "dataset": str(folder / "data.jsonl"), "output_dir": str(folder / "out"),
            "max_steps": 2, "save_steps": 1, "logging_steps": 1, "max_length": 64, "per_device_train_batch_size": 2,
            "kt_backend": "torch", "activation_checkpointing": False, "lora_rank": 2, "lora_alpha": 4,
        }
        | settings,
    )  # fmt: skip
    return Runs(folder)


def forbid_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that gets as far as loading its model fails the test."""
    monkeypatch.setattr(run_module, "load_model", lambda *_: pytest.fail("the model was loaded"))
