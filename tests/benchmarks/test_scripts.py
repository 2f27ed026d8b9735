"""Every benchmark runs on a tiny shape, and the report makes of a CSV the tables and plots that it should."""

import csv
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from kt_hf.backends import kernel_availability

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
COMMANDS = (
    "layer --shape tiny --tokens 16 --runs 1",
    "layer --shape tiny --tokens 16 --runs 2 --ranks 0 --cases default stock",
    "step --models tiny --layers 1 --tokens 16 --runs 1",
    "threads --shape tiny --tokens 64 --runs 1 --workers 1",
    "dpo --shape tiny --layers 1 --tokens 32 --runs 1",
)
# Imports what all scripts share once, and runs each in a fork: else most of the test's time would be imports.
RUNNER = """
import importlib, os, sys, traceback
sys.path.insert(0, sys.argv[1])
scripts = [line.split() for line in sys.stdin]
modules = [importlib.import_module(name) for name, *_ in scripts]
failed = 0
for module, (name, *arguments) in zip(modules, scripts):
    sys.stdout.flush()
    child = os.fork()
    if not child:
        status = 1
        try:
            sys.argv = [name, *arguments]
            status = int(module.main() or 0)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(status)
    failed |= os.waitpid(child, 0)[1]
sys.exit(bool(failed))
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV that every benchmark has appended to."""
    kernel = kernel_availability().ok
    commands = [line for line in COMMANDS if kernel or not line.startswith("threads")]
    return run(tmp_path_factory.mktemp("benchmarks") / "results.csv", commands)


def run(file: Path, commands: Sequence[str]) -> Path:
    """The file, after these benchmarks have appended to it."""
    lines = "\n".join(f"{line} --save {file}" for line in commands)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    environment["OMP_WAIT_POLICY"] = "passive"  # threads that spin take the cores of the other tests
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, BENCHMARKS], input=lines, capture_output=True, text=True, cwd=ROOT,
        env=environment,
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "left out" not in done.stdout
    return file


def test_percentiles_of_few_runs_lie_between_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    harness = importlib.import_module("harness")
    harness.append("layer", "tiny r=8", 1, 1, {"kt": harness.Timing({"forward": [0.001, 0.1]})}, tmp_path / "rows.csv")
    (row,) = read(tmp_path / "rows.csv")
    assert 1 <= float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"]) <= 100


GPU_COMMANDS = (
    "train --layers 2 --sequence 32 --steps 1 --placement cpu 4,4",
    "train --layers 2 --sequence 32 --steps 1 --case stock",
    "tiers --layers 2 --tokens 64 --sequence 64 --rounds 1 --step 8",
    "fp8 --layers 2 --sequence 32 --batch 1 --rounds 1",
)


@pytest.mark.slow
@pytest.mark.parametrize("command", GPU_COMMANDS)
def test_the_gpu_benchmarks_run_without_one(command: str, tmp_path: Path) -> None:
    name, *arguments = command.split()
    line = [sys.executable, BENCHMARKS / "gpu", name, "--device", "cpu", "--shape", "tiny", *arguments]
    done = subprocess.run([*line, "--csv", tmp_path / "rows.csv"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = read(tmp_path / "rows.csv")
    assert len(rows) >= 1 + (name != "train" or "--placement" in arguments)
    assert all(float(row["step"]) > 0 for row in rows)
    assert rows[0].keys() == dict.fromkeys(read_header(BENCHMARKS / f"gpu_{name}.csv")).keys()


@pytest.mark.slow
def test_the_cost_of_lora_is_measured_in_every_case(tmp_path: Path) -> None:
    tiny = [f"--{name}={value}" for name, value in (("layers", 2), ("batch", 1), ("sequence", 32), ("steps", 1))]
    line = [sys.executable, BENCHMARKS / "gpu", "lora", "--device", "cpu", "--shape", "tiny", *tiny]
    done = subprocess.run([*line, "--csv", tmp_path / "rows.csv"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = read(tmp_path / "rows.csv")
    assert [row["case"] for row in rows] == ["gpu", "cpu", "waiting", "torch", "some"]
    for row in rows:
        parts = sum(float(row[part]) for part in ("forward", "backward", "clip", "optimizer", "zero", "refresh"))
        assert 0 < parts < 10
        assert int(row["experts_touched"]) > 100


@pytest.mark.slow
def test_the_benchmark_of_products_runs_without_a_gpu(tmp_path: Path) -> None:
    """All of it, by Triton's interpreter."""
    pytest.importorskip("triton")
    line = [sys.executable, BENCHMARKS / "gpu", "products", "--device", "cpu", "--shape", "tiny", "--rounds", "1"]
    more = ["--only", "layers", "waits", "kernels", "sweep", "--blocks", "64,32,2,4", "--csv", tmp_path / "rows.csv"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*line, *more], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    kinds = {(row["place"], row["way"]) for row in read(tmp_path / "rows.csv")}
    assert kinds == {(place, way) for place in ("resident", "streamed") for way in ("PyTorch", "fused", "own")}
    assert "seen in a resident layer" in done.stdout
    assert "forward_tflops" in done.stdout


@pytest.mark.slow
def test_a_decoded_token_copies_the_experts_that_it_chose(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "benchmarks.gpu", "decoding", "--tiny", "--out", tmp_path]
    small = ["--layers", "3", "--tokens", "4", "--turns", "2"]
    done = subprocess.run([*line, *small], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {row["case"]: row for row in map(json.loads, (tmp_path / "decoding.jsonl").read_text().splitlines())}
    places = [f"{kind} {place}" for kind in ("bf16", "int4") for place in ("resident", "streamed")]
    assert rows.keys() == {"stock, merged", "stock", "bf16 auto", *places}
    for case, row in rows.items():
        assert len(row["turns"]) == 2
        assert row["tokens_per_s"] > 0
        assert row["copied_mb"] == pytest.approx(row["chosen_mb"] if "streamed" in case else 0, rel=1e-3, abs=1e-6)
    assert rows["bf16 auto"]["held"] == 3


def read(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def measured(file: Path, benchmark: str, **wanted: str) -> set[str]:
    rows = [row for row in read(file) if row["benchmark"] == benchmark]
    return {row["case"] for row in rows if all(row[name] == value for name, value in wanted.items())}


def test_a_benchmark_appends_what_it_measured(tmp_path: Path) -> None:
    """One case of one script; test_each_benchmark_... runs all of them."""
    file = run(tmp_path / "results.csv", ["layer --shape tiny --tokens 16 --runs 1 --cases default"])
    assert measured(file, "layer", shape="tiny r=8", part="forward") == {"default"}
    assert measured(file, "layer", shape="tiny r=8", part="backward") == {"default"}


@pytest.mark.slow
def test_each_benchmark_appends_what_it_measured(results: Path) -> None:
    kernel = kernel_availability().ok
    operators = {"kt", "kt-int8", "kt-int4", "bare"} if kernel else set()
    peers = {"peer", "peer-shared"} if kernel else set()
    stock = {"default", "torch", "stock", "stock-eager"}
    assert measured(results, "layer", shape="tiny r=8", part="backward") == stock | operators | peers
    assert measured(results, "layer", shape="tiny r=0", part="forward") == {"default", "stock"}
    peers = {"operators", "operators-all", "peer", "peer-default"} if kernel else set()
    assert measured(results, "step", part="refresh") == {"kt", "torch", "stock", "stock-eager"} | peers
    for row in read(results):
        assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"]) or row["part"] == "refresh"
        assert int(row["threads"]) > 0
        if row["benchmark"] in ("layer", "step"):
            assert int(row["peak_mib"]) > 100


@pytest.mark.slow
def test_a_reference_pass_first_makes_nothing_be_computed_again(results: Path) -> None:
    calls = dict(case.split(": ") for case in measured(results, "dpo"))
    assert calls["precomputed"] == "1 forwards, 1 backwards"
    assert calls["reference first"] == "2 forwards, 1 backwards"


def test_a_csv_of_other_columns_is_not_appended_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    harness = importlib.import_module("harness")
    file = tmp_path / "other.csv"
    file.write_text("date,seconds\n")
    with pytest.raises(SystemExit, match="has other columns than this benchmark writes"):
        harness.append("layer", "tiny r=8", 1, 1, {"kt": harness.Timing({"forward": [1.0]})}, file)
    assert file.read_text() == "date,seconds\n"


def plot(file: Path, page: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, BENCHMARKS / "report/cpu_page.py", "--csv", file, "--page", page]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def row(**given: object) -> dict[str, object]:
    common = {
        "date": "2026-01-01", "commit": "abc", "cpu": "Some CPU (AMX)", "cores": 4, "torch": "2.9",
        "transformers": "5.17", "peft": "0.21", "kt_kernel": "0.7.2 amx", "benchmark": "layer", "shape": "tiny r=8",
        "tokens": 64, "threads": 3,
    }  # fmt: skip
    return common | {"p20_ms": given["p50_ms"], "p80_ms": given["p50_ms"], "runs": 5} | given


def write(file: Path, rows: list[dict[str, object]]) -> None:
    header = read_header(BENCHMARKS / "results.csv")
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, header)
        writer.writeheader()
        writer.writerows(rows)


def read_header(file: Path) -> list[str]:
    with file.open(newline="") as lines:
        return next(csv.reader(lines))


PAGE = """# Page
Kept.
<!-- table: layer -->
old
<!-- end -->
<!-- plot: layer -->
<!-- end -->
<!-- table: threads -->
<!-- end -->
<!-- table: step -->
<!-- end -->
Kept as well.
"""


def test_the_page_is_made_of_the_csv(tmp_path: Path) -> None:
    write(tmp_path / "small.csv", [
        row(case="default", part="forward", p50_ms=1, commit="older"),
        row(case="torch", part="forward", p50_ms=1, commit="older"),  # not measured again: left out
        row(case="default", part="forward", p50_ms=2),
        row(case="default", part="backward", p50_ms=4),
        row(case="stock", part="forward", p50_ms=10, threads=4),
        row(case="stock", part="backward", p50_ms=23.456, threads=4),
        row(case="default", part="forward", p50_ms=0.5, cores=2, kt_kernel="0.7.2 avx512_bf16"),
        row(benchmark="threads", case="PyTorch on 1, planned", part="forward", p50_ms=110, threads=3),
        row(benchmark="threads", case="PyTorch on 1", part="forward", p50_ms=100, threads=2),
    ])  # fmt: skip
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    done = plot(tmp_path / "small.csv", page)
    assert done.returncode == 0, done.stderr[-2000:]
    text = page.read_text()
    assert text.startswith("# Page\nKept.\n<!-- table: layer -->\n**Some CPU, 4 cores, AMX**\n")
    assert text.endswith("Kept as well.\n")
    assert "| shape | tokens | default | stock | stock / kt_hf |" in text
    assert "| tiny r=8 | 64 | 2.00 + 4.00 | 10.0 + 23.5 | 5.58 |" in text
    assert "**Some CPU, 2 cores, AVX512-BF16**" in text
    assert "| tiny r=8 | 64 | 2, PyTorch on 1 | 100 | 3, PyTorch on 1 | 110 | 10.0% |" in text
    assert "![layer](plots/layer.png)" in text
    assert "<!-- table: step -->\nNot measured yet.\n<!-- end -->" in text
    drawn = (tmp_path / "plots/layer.png").read_bytes()
    assert drawn.startswith(b"\x89PNG")
    assert len(drawn) < 60_000
    assert plot(tmp_path / "small.csv", page).returncode == 0
    assert page.read_text() == text
    assert (tmp_path / "plots/layer.png").read_bytes() == drawn


@pytest.mark.slow
def test_the_projects_page_can_be_made_of_every_benchmark(results: Path, tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    page.write_text((ROOT / "docs/performance.md").read_text())
    done = plot(results, page)
    assert done.returncode == 0, done.stderr[-2000:]
    if kernel_availability().ok:
        assert "Not measured" not in page.read_text()
        assert len(list((tmp_path / "plots").glob("*.png"))) == 3


def test_missing_columns_are_refused_in_words(tmp_path: Path) -> None:
    file = tmp_path / "other.csv"
    file.write_text("date,case,p50_ms\n2026-01-01,kt,1\n")
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    done = plot(file, page)
    assert done.returncode == 1
    assert "lacks the columns commit, cpu, cores" in done.stderr
    assert "Traceback" not in done.stderr
    assert page.read_text() == PAGE
