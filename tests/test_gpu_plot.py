"""docs/gpu.md shows what gpu_train.csv has."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def gpu_plot() -> Any:
    spec = importlib.util.spec_from_file_location("gpu_plot", BENCHMARKS / "gpu_plot.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_plot"] = module
    spec.loader.exec_module(module)
    return module


def test_the_page_is_made_of_the_rows(gpu_plot: Any) -> None:
    page = gpu_plot.PAGE.read_text()
    assert gpu_plot.fill(page, gpu_plot.rows()) == page, "run: python benchmarks/gpu_plot.py"


def test_rows_are_those_measured_last(gpu_plot: Any) -> None:
    found = gpu_plot.rows()
    assert len({tuple(row[key] for key in gpu_plot.KEY) for row in found}) == len(found) > 10
    faster = [row | {"step": "0.5", "tokens_per_second": "4096"} for row in found]
    assert "4,096" in gpu_plot.against(faster)
    assert "4,096" not in gpu_plot.against(found)


def test_the_plot(gpu_plot: Any, tmp_path: Path) -> None:
    gpu_plot.plot(gpu_plot.rows(), tmp_path / "plots/one.svg")
    drawn = (tmp_path / "plots/one.svg").read_text()
    assert drawn.startswith("<?xml")
    assert drawn.count("<use ") > 5  # a marker a measured placement, and the ticks


def test_a_page_without_its_places_is_refused(gpu_plot: Any) -> None:
    with pytest.raises(ValueError, match="table: by part"):
        gpu_plot.fill("# Nothing", gpu_plot.rows())
