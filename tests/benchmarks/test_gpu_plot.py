"""docs/gpu.md shows what gpu_train.csv has."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


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


def rows_of(gpu_plot: Any, **wanted: str) -> list[dict[str, str]]:
    common = {"case": "kt", "family": "deepseek_v2", "layers": "27", "batch": "1", "checkpointing": "on"} | wanted
    found = [row for row in gpu_plot.rows() if all(row[key] == value for key, value in common.items())]
    assert found, f"no row is {common}"
    return found


def speed(row: dict[str, str]) -> float:
    return float(row["tokens_per_second"])


def test_what_was_promised_of_experts_on_the_cpu_was_measured(gpu_plot: Any) -> None:
    """The step within 1.3 of the operators, at most 7 GB, above what others do, and faster with more experts."""
    for row in rows_of(gpu_plot, gpu_experts="0", streamed_experts="0"):
        assert float(row["step"]) <= 1.3 * (float(row["operator forward"]) + float(row["operator backward"]))
    (ours,) = rows_of(gpu_plot, gpu_experts="0", streamed_experts="0", lora_device="cpu")
    assert float(ours["gpu_peak_gb"]) <= 7
    assert speed(ours) > speed(rows_of(gpu_plot, case="streamed, pageable")[0])
    (qwen,) = rows_of(gpu_plot, family="qwen3_moe", lora_device="cpu")
    assert speed(qwen) > speed(rows_of(gpu_plot, family="qwen3_moe", case="peer, 15 threads")[0])
    *split, stock = gpu_plot.placements(gpu_plot.rows())
    by_number = [speed(row) for row in split if int(row["gpu_experts"]) >= 8]
    assert by_number == sorted(by_number)
    assert stock["case"] == "stock"
    assert by_number[-1] * 1.3 >= speed(stock)


@pytest.mark.parametrize(("batch", "faster"), [("1", 1.8), ("4", 4.0)])
def test_what_was_promised_of_a_planned_placement_was_measured(gpu_plot: Any, batch: str, faster: float) -> None:
    """Faster than the CPU, at most 12 GB more of the GPU than it needs, and no more host memory."""
    cpu = rows_of(gpu_plot, batch=batch, lora_device="gpu", gpu_experts="0", streamed_experts="0")[-1]
    planned = max(rows_of(gpu_plot, batch=batch, lora_device="gpu"), key=lambda row: int(row["gpu_experts"]))
    assert int(planned["gpu_experts"]) > 0
    assert speed(planned) >= faster * speed(cpu)
    assert float(planned["gpu_peak_gb"]) - float(cpu["gpu_peak_gb"]) <= 12
    assert float(planned["host_peak_gb"]) <= float(cpu["host_peak_gb"])


def test_what_was_promised_of_the_planner_was_measured(gpu_plot: Any) -> None:
    """Within a tenth of the best of each sweep, a step within 1.3 of its bound; slower buses leave more to the CPU."""
    sweeps = gpu_plot.sweeps()
    assert {int(sweep[0]["tokens"]) for sweep in sweeps} >= {512, 2048, 8192, 32768}
    assert {sweep[0]["bus"] for sweep in sweeps} == {"1/1", "1/2", "1/4"}
    for sweep in sweeps:
        chosen, best = gpu_plot.chosen_and_best(sweep)
        assert len(sweep) >= 6
        assert float(chosen["step"]) <= 1.1 * float(best["step"])
        assert float(chosen["step"]) <= 1.3 * float(chosen["bound"])
    left = {sweep[0]["bus"]: 64 - sum(gpu_plot.on_tiers(gpu_plot.chosen_and_best(sweep)[0]))
            for sweep in sweeps if sweep[0]["tokens"] == "2048"}  # fmt: skip
    assert left["1/1"] <= left["1/2"] <= left["1/4"]
    assert left["1/4"] > left["1/1"]


def test_what_was_promised_of_8_bits_was_measured(gpu_plot: Any) -> None:
    """Half the host memory, and faster, the more the bus was what a step waited for."""
    pairs = gpu_plot.eight_bits()
    assert [int(eight["batch"]) for eight, _ in pairs] == [1, 4]
    for eight, wide in pairs:
        assert 0.5 <= float(eight["streamed_gb"]) / float(wide["streamed_gb"]) < 0.51
    ratios = [speed(eight) / speed(wide) for eight, wide in pairs]
    assert ratios[0] > 1.4
    assert ratios[0] > ratios[1] > 1.1


def test_the_plot_of_the_sweeps(gpu_plot: Any, tmp_path: Path) -> None:
    gpu_plot.plot_sweeps(gpu_plot.sweeps(), tmp_path / "plots/two.svg")
    assert (tmp_path / "plots/two.svg").read_text().count("<use ") > 5 * len(gpu_plot.sweeps())


def test_a_page_without_its_places_is_refused(gpu_plot: Any) -> None:
    with pytest.raises(ValueError, match="table: by part"):
        gpu_plot.fill("# Nothing", gpu_plot.rows())
