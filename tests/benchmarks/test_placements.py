"""The benchmarks of placements: each part runs on tiny shapes without a GPU; what they stand on is as it is said."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kt_hf import KTConfig, load_kt_model

ROOT = Path(__file__).parents[2]
GPU = ROOT / "benchmarks/gpu"
PARTS = {
    "cells": ["--family", "deepseek_v2", "--cells", "12/1", "24/1/2", "--layers", "3"],
    "full": ["--layers", "8", "--batch", "1"],
    "resident": ["--layers", "2", "--batch", "1"],
    "safety": ["--layers", "2", "--caps", "24", "--steps", "8"],
    "losses": ["--layers", "2", "--steps", "4"],
    "low-bit": ["--layers", "2", "--batch", "1", "--dtypes", "int4"],
    "widening": [],
    "drawn": ["--layers", "2", "--where", "resident"],
    "formats": ["--layers", "2"],
    "estimate": [],
    "peer": [],
}


@pytest.fixture
def gpu_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(GPU))


class TopKRouter(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = x.new_zeros(len(x), 16)  # as if all tokens chose the same experts
        return logits, x.new_ones(len(x), 2), torch.zeros(len(x), 2, dtype=torch.int64)


@pytest.mark.usefixtures("gpu_scripts")
def test_routing_is_spread_and_the_same_each_time() -> None:
    spread_class = importlib.import_module("routing").Spread
    model = nn.Sequential(TopKRouter(), TopKRouter())
    spread = spread_class(model)
    x = torch.randn(512, 4)
    (_, weights, ids), other = model[0](x), model[1](x)
    counts = torch.bincount(ids.flatten(), minlength=16)
    assert counts.min() > 0
    assert counts.max() < 4 * 64  # a few times its share of 1,024
    assert all(len(set(row)) == 2 for row in ids.tolist())
    assert torch.allclose(weights.sum(-1), torch.ones(512))
    assert not torch.equal(ids, other[2]), "each layer its own"
    assert torch.equal(model[0](x)[2], ids), "a recompute gets the same"
    assert spread.describe() == "16 to 16"


@pytest.mark.usefixtures("gpu_scripts")
@pytest.mark.parametrize("family", ["qwen3_30b", "deepseek_v2"])
def test_the_checkpoint_is_one_that_loads(family: str, tmp_path: Path) -> None:
    models, checkpoints = importlib.import_module("models"), importlib.import_module("checkpoints")
    config = models.make_config(family, "tiny", 2)
    checkpoints.make_checkpoint(config, tmp_path, torch.device("cpu"))
    model = load_kt_model(tmp_path, KTConfig(kt_backend="torch"))
    assert len(model._kt_wrappers) == 2 - (family == "deepseek_v2")
    ids = torch.arange(8)[None]
    assert torch.isfinite(model(input_ids=ids, labels=ids).loss)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all parts write to: some read what others wrote."""
    return tmp_path_factory.mktemp("placements")


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_every_part_runs_without_a_gpu(part: str, results: Path) -> None:
    rows = run(part, PARTS[part], results)
    assert rows
    assert not [row for row in rows if row.get("error") and part != "peer"]
    if part == "cells":
        assert [row["held"] for row in rows if row["case"] == "auto"][-1] == 2
        assert {row["case"] for row in rows} >= {"0 layers", "1 layers", "2 layers", "verdict"}
    if part == "losses":
        assert all(row["equals_auto"] for row in rows if row["case"].startswith(("streamed", "resident")))


def run(part: str, arguments: list[str], folder: Path) -> list[dict[str, Any]]:
    """Rows of a part."""
    line = [sys.executable, "-m", "benchmarks.gpu", "placements", "--tiny", "--part", part, "--out", folder, *arguments]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*line, "--checkpoint", folder / "checkpoints"], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, f"{part}: {done.stderr[-3000:]}"
    return [json.loads(text) for text in (folder / f"{part}.jsonl").read_text().splitlines()]
