"""docs/gpu.md shows what gpu_train.csv has, the plot of docs/ranks.md what gpu_ranks.jsonl has."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def gpu_page() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS / "report"))
        yield importlib.import_module("gpu_page")


def test_the_page_is_made_of_the_rows(gpu_page: Any) -> None:
    page = gpu_page.PAGE.read_text()
    assert gpu_page.fill(page, gpu_page.rows()) == page, "run: python benchmarks/report/gpu_page.py"


def test_rows_are_those_measured_last(gpu_page: Any) -> None:
    found = gpu_page.rows()
    assert len({tuple(row[key] for key in gpu_page.KEY) for row in found}) == len(found) > 10
    faster = [row | {"step": "0.5", "tokens_per_second": "4096"} for row in found]
    assert "4,096" in gpu_page.against(faster)
    assert "4,096" not in gpu_page.against(found)


def assert_drawn(file: Path) -> None:
    """Lines in several colors, in a file of a size for git."""
    assert file.stat().st_size <= 60_000
    with Image.open(file) as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("RGB").getcolors(10_000)) > 20


def test_the_plot(gpu_page: Any, tmp_path: Path) -> None:
    gpu_page.plot(gpu_page.rows(), tmp_path / "plots/one.png")
    assert_drawn(tmp_path / "plots/one.png")


def test_the_plot_of_ranks(gpu_page: Any, tmp_path: Path) -> None:
    """Ratios of one day's rows alone; those of docs/ranks.md's table."""
    ranks_page: Any = importlib.import_module("ranks_page")
    cases = ranks_page.measured()
    ranks_page.draw(cases, tmp_path / "ranks.png")
    assert_drawn(tmp_path / "ranks.png")
    page = ranks_page.PLOT.parents[1].joinpath("ranks.md").read_text()
    table = page.split("## Measured on two GPUs")[1].split("\n\n")[2]
    told = 0
    for (tier, dtype, tokens), rates in cases.items():
        label = ranks_page.ratio(rates, 2)
        assert ranks_page.ratio(rates, 1) == ""
        if label:
            told += 1
            line = next(line for line in table.splitlines() if line.startswith(f"| {tier}, {dtype} | {tokens:,} |"))
            assert f"x{float(label[1:]):.1f}" in line
    assert told >= 4
    other_day = {1: (100.0, "2026-01-01"), 2: (200.0, "2026-01-02")}
    assert ranks_page.ratio(other_day, 2) == ""


def rows_of(gpu_page: Any, **wanted: str) -> list[dict[str, str]]:
    common = {"case": "kt", "family": "deepseek_v2", "layers": "27", "batch": "1", "checkpointing": "on"} | wanted
    found = [row for row in gpu_page.rows() if all(row[key] == value for key, value in common.items())]
    assert found, f"no row is {common}"
    return found


def speed(row: dict[str, str]) -> float:
    return float(row["tokens_per_second"])


def test_what_was_promised_of_experts_on_the_cpu_was_measured(gpu_page: Any) -> None:
    """The step within 1.3 of the operators, at most 7 GB, above what others do, and faster with more experts."""
    for row in rows_of(gpu_page, gpu_experts="0", streamed_experts="0"):
        assert float(row["step"]) <= 1.3 * (float(row["operator forward"]) + float(row["operator backward"]))
    (ours,) = rows_of(gpu_page, gpu_experts="0", streamed_experts="0", lora_device="cpu")
    assert float(ours["gpu_peak_gb"]) <= 7
    assert speed(ours) > speed(rows_of(gpu_page, case="streamed, pageable")[0])
    (qwen,) = rows_of(gpu_page, family="qwen3_moe", lora_device="cpu")
    assert speed(qwen) > speed(rows_of(gpu_page, family="qwen3_moe", case="peer, 15 threads")[0])
    *split, stock = gpu_page.placements(gpu_page.rows())
    by_number = [speed(row) for row in split if int(row["gpu_experts"]) >= 8]
    assert by_number == sorted(by_number)
    assert stock["case"] == "stock"
    assert by_number[-1] * 1.3 >= speed(stock)


@pytest.mark.parametrize(("batch", "faster"), [("1", 1.8), ("4", 4.0)])
def test_what_was_promised_of_a_planned_placement_was_measured(gpu_page: Any, batch: str, faster: float) -> None:
    """Faster than the CPU, at most 12 GB more of the GPU than it needs, and no more host memory."""
    cpu = rows_of(gpu_page, batch=batch, lora_device="gpu", gpu_experts="0", streamed_experts="0")[-1]
    planned = max(rows_of(gpu_page, batch=batch, lora_device="gpu"), key=lambda row: int(row["gpu_experts"]))
    assert int(planned["gpu_experts"]) > 0
    assert speed(planned) >= faster * speed(cpu)
    assert float(planned["gpu_peak_gb"]) - float(cpu["gpu_peak_gb"]) <= 12
    assert float(planned["host_peak_gb"]) <= float(cpu["host_peak_gb"])


def test_what_was_promised_of_the_planner_was_measured(gpu_page: Any) -> None:
    """Within a tenth of the best of each sweep, a step within 1.3 of its bound; slower buses leave more to the CPU."""
    sweeps = gpu_page.sweeps()
    assert {int(sweep[0]["tokens"]) for sweep in sweeps} >= {512, 2048, 8192, 32768}
    assert {sweep[0]["bus"] for sweep in sweeps} == {"1/1", "1/2", "1/4"}
    for sweep in sweeps:
        chosen, best = gpu_page.chosen_and_best(sweep)
        assert len(sweep) >= 6
        assert float(chosen["step"]) <= 1.1 * float(best["step"])
        assert float(chosen["step"]) <= 1.3 * float(chosen["bound"])
    left = {sweep[0]["bus"]: 64 - sum(gpu_page.on_tiers(gpu_page.chosen_and_best(sweep)[0]))
            for sweep in sweeps if sweep[0]["tokens"] == "2048"}  # fmt: skip
    assert left["1/1"] <= left["1/2"] <= left["1/4"]
    assert left["1/4"] > left["1/1"]


def test_what_was_promised_of_8_bits_was_measured(gpu_page: Any) -> None:
    """Half the host memory, and faster, the more the bus was what a step waited for."""
    pairs = gpu_page.eight_bits()
    assert [int(eight["batch"]) for eight, _ in pairs] == [1, 4]
    for eight, wide in pairs:
        assert 0.5 <= float(eight["streamed_gb"]) / float(wide["streamed_gb"]) < 0.51
    ratios = [speed(eight) / speed(wide) for eight, wide in pairs]
    assert ratios[0] > 1.4
    assert ratios[0] > ratios[1] > 1.1


def test_the_plot_of_the_sweeps(gpu_page: Any, tmp_path: Path) -> None:
    gpu_page.plot_sweeps(gpu_page.sweeps(), tmp_path / "plots/two.png")
    assert_drawn(tmp_path / "plots/two.png")


def test_a_page_without_its_places_is_refused(gpu_page: Any) -> None:
    with pytest.raises(ValueError, match="table: by part"):
        gpu_page.fill("# Nothing", gpu_page.rows())
