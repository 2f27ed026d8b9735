"""`kt-hf bench`: a table, JSON and a plot of what was measured, under each placement. The CPU stands for the GPU."""

from __future__ import annotations

import json
import shutil
import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from kt_hf.backends import ExpertsBackend
from kt_hf.backends.gpu.resident import GroupedBackend
from kt_hf.backends.gpu.streamed import StreamedBackend
from kt_hf.backends.tiered import TieredBackend
from kt_hf.cli import app
from kt_hf.errors import KTAMXError
from kt_hf.placement import choice
from kt_hf.placement import packer as packing
from kt_hf.placement.planner import TierPlan
from kt_hf.tools import bench
from kt_hf.train.model_sizes import ModelSizes
from tests.support.cases import KERNEL_MARKS
from tests.support.tiny import save_model

E, LAYERS = 4, 2
SIZES = ModelSizes(LAYERS, E, 2, 64, 64, 2, 0, 0, 0, 0, 259, 64, 64)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("model"), layers=LAYERS))


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def cpu_for_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, so it is where layers are measured."""
    monkeypatch.setattr("kt_hf.system.gpu.experts_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(bench, "measure", bench.measure_here)


@dataclass
class Built:
    """A layer as it was measured: its experts by tier, in order, and what was planned."""

    tiers: dict[str, int]
    planned: TierPlan | None
    backend: ExpertsBackend


@pytest.fixture
def built(cpu_for_gpu: None, monkeypatch: pytest.MonkeyPatch) -> list[Built]:
    found, original = [], packing.Packer.build

    def pack(packer: packing.Packer, *args: Any) -> ExpertsBackend:
        backend = original(packer, *args)
        parts = [(p.backend, p.experts.tolist()) for p in backend.parts] if isinstance(backend, TieredBackend) else None
        tiers = {tier_of(one): len(ids) for one, ids in parts or [(backend, range(E))]}
        assert [e for _, ids in parts or () for e in ids] in ([], list(range(E))), "not the first experts first"
        found.append(Built(tiers, packer.planned, backend))
        return backend

    monkeypatch.setattr(packing.Packer, "build", pack)
    return found


def tier_of(backend: ExpertsBackend) -> str:
    if isinstance(backend, StreamedBackend):
        return "streamed" if backend.weights.resident is None else "resident"
    return "resident" if isinstance(backend, GroupedBackend) else "CPU"


def invoke(model: str, *options: str) -> Any:
    return CliRunner().invoke(app, ["bench", model, "--tokens", "4,16", "--threads", "1", "--runs", "2", *options])


def asked(backend: str, tokens: list[int], placement: Any = "cpu") -> bench.Asked:
    return bench.Asked(SIZES, 8, backend, 1, tokens, 1, placement)


def text_of(result: Any) -> str:
    assert result.exit_code == 0, result.output
    return " ".join(result.stdout.split())


@pytest.mark.parametrize(
    "backend", ["torch", *(pytest.param(name, marks=KERNEL_MARKS) for name in ("AMXBF16", "AMXInt8"))]
)
def test_it_measures_the_models_shape(backend: str, model: str, tmp_path: Path) -> None:
    options = ("--placement", "{resident: 0}", "--json", "--plot", str(tmp_path / "bench.png"))
    result = invoke(model, "--backend", backend, *options)
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["shape"] == [4, 2, 64, 64]
    assert [(row["backend"], row["threads"], row["tokens"]) for row in answer["rows"]] == [
        (backend, 1, 4),
        (backend, 1, 16),
    ]
    assert all(row["forward_ms"] > 0 and row["backward_ms"] > 0 for row in answer["rows"])
    assert all((row["resident"], row["streamed"], row["predicted_ms"]) == (0, 0, None) for row in answer["rows"])
    assert (tmp_path / "bench.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_placements_are_measured(backend: str, model: str, built: list[Built]) -> None:
    """One row each and number of tokens, of a layer that has its experts so; all of its parts were computed."""
    wanted = ["cpu", "{resident: 1, streamed: 1}", "{resident: 2}", "{streamed: 4}", "gpu"]
    before = torch.get_num_threads()
    result = invoke(model, "--backend", backend, "--json", *(o for one in wanted for o in ("--placement", one)))
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    tiers = [(0, 0), (1, 1), (2, 0), (0, 4), (4, 0)]
    assert [(row["resident"], row["streamed"], row["tokens"]) for row in rows] == [
        (*t, n) for t in tiers for n in (4, 16)
    ]
    assert all(row["forward_ms"] > 0 and row["backward_ms"] > 0 and row["predicted_ms"] is None for row in rows)
    split = {"resident": 1, "streamed": 1, "CPU": 2}
    expected = [{"CPU": 4}, split, {"resident": 2, "CPU": 2}, {"streamed": 4}, {"resident": 4}]
    assert [one.tiers for one in built] == expected
    assert isinstance(built[1].backend, TieredBackend)
    assert built[1].backend.cpu_seconds > 0
    assert torch.get_num_threads() == before


def test_streamed_experts_are_as_the_checkpoint_has_them(model: str, built: list[Built], tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    quantised = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": quantised}))
    result = invoke(str(tmp_path), "--backend", "torch", "--placement", "{resident: 1, streamed: 3}", "--json")
    assert result.exit_code == 0, result.output
    (layer,) = built
    assert layer.tiers == {"resident": 1, "streamed": 3}
    for part in layer.backend.parts:
        assert isinstance(part.backend, StreamedBackend)
        dtypes = {tensor.dtype for tensor in part.backend.weights.resident or part.backend.weights.tensors}
        assert dtypes == {torch.float8_e4m3fn, torch.float32}, "values and scales"


def test_auto_is_planned_and_predicted(
    backend: str, model: str, built: list[Built], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the CPU may be worth a part; else experts are streamed without a plan."""
    for name in ("cpu_may_be_faster", "is_worth_its_cpu"):
        monkeypatch.setattr(choice, name, lambda *_: True)
    result = invoke(model, "--backend", backend, "--placement", "auto", "--tokens", "16", "--json")
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)["rows"]
    (layer,) = built
    assert layer.planned is not None
    parts = layer.planned.stream_seconds, layer.planned.cpu_seconds, layer.planned.gpu_seconds
    assert row["predicted_ms"] == pytest.approx(max(parts) / LAYERS * 1000, abs=0.005)
    assert row["predicted_ms"] > 0
    assert (row["resident"], row["streamed"]) == (layer.planned.resident, layer.planned.streamed)
    assert (layer.tiers.get("resident", 0), layer.tiers.get("streamed", 0)) == (row["resident"], row["streamed"])


def test_auto_goes_with_the_tokens(cpu_for_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each number of tokens has its plan, made for all layers; a layer is gone before the next is packed."""
    seen, layers = [], []

    def plan(_: Any, shape: Any, count: int, tokens: int, *rest: Any) -> TierPlan:
        seen.append((count, tokens))
        return TierPlan(0, 2, 2, 9, 0.02, 0.01, 0.01) if tokens < 64 else TierPlan(1, 1, 2, 9, 0.01, 0.05, 0.01)

    def pack(packer: packing.Packer, *args: Any) -> ExpertsBackend:
        assert all(layer() is None for layer in layers), "the layer before is still held"
        backend = original(packer, *args)
        layers.extend(weakref.ref(part.backend.weights) for part in backend.parts)
        return backend

    original = packing.Packer.build
    monkeypatch.setattr(choice, "measure_rates", lambda *_: None)
    for name in ("cpu_may_be_faster", "is_worth_its_cpu"):
        monkeypatch.setattr(choice, name, lambda *_: True)
    monkeypatch.setattr(choice, "plan_tiers", plan)
    monkeypatch.setattr(packing.Packer, "build", pack)
    rows = bench.measure_here(asked("torch", [4, 16, 64], "auto"))
    assert seen == [(LAYERS, 4), (LAYERS, 16), (LAYERS, 64)]
    assert [(r.resident, r.streamed, r.predicted_ms) for r in rows] == [(0, 2, 10.0), (0, 2, 10.0), (1, 1, 25.0)]
    assert len(layers) == 2 + 3, "one layer for the first two numbers of tokens, one for the last"


def test_a_table_is_shown(model: str, no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [bench.Row("torch", 1, 4, 1.0, 3.0), bench.Row("torch", 1, 16, 2.0, 6.0)]
    monkeypatch.setattr(bench, "measure", lambda _: rows)
    text = text_of(invoke(model))
    assert "The experts of all 2 layers: at most 1000 tokens/s, 1 threads, 16 tokens a batch." in text
    assert "2 a token, 64 x 64, torch threads tokens" in text
    assert " 1 16 2.0 6.0 2000" in text
    assert "redicted" not in text


def test_placements_in_the_table(model: str, cpu_for_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default the CPU and what auto chooses, where there is a GPU."""
    rows = {"cpu": bench.Row("torch", 1, 16, 2.0, 6.0), "auto": bench.Row("torch", 1, 16, 1.0, 3.0, 1, 2, 3.25)}
    monkeypatch.setattr(bench, "measure", lambda one: [rows[one.placement]])
    monkeypatch.setenv("COLUMNS", "200")
    text = text_of(invoke(model))
    assert " 1 0 0 4 16 2.0 6.0 2000 1 1 2 1 16 1.0 3.0 4000 3.2" in text
    assert "at most 2000 tokens/s, 1 threads, 16 tokens a batch, 1 resident + 2 streamed + 1 CPU." in text
    assert list(bench.curves(list(rows.values()), E)) == ["torch, 1 thread, CPU", "torch, 1 thread, auto"]
    assert list(bench.curves([replace(rows["auto"], streamed=3, predicted_ms=None)], E)) == [
        "torch, 1 thread, 1 resident + 3 streamed"
    ]


def test_without_a_gpu_auto_is_the_cpu(model: str, no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "measure", bench.measure_here)
    rows = {}
    for options in ((), ("--placement", "auto"), ("--placement", "cpu", "--placement", "auto")):
        result = invoke(model, "--backend", "torch", "--tokens", "4", "--json", *options)
        assert result.exit_code == 0, result.output
        rows[options] = [(r["resident"], r["streamed"], r["predicted_ms"]) for r in json.loads(result.stdout)["rows"]]
    assert list(rows.values()) == [[(0, 0, None)]] * 3


def test_by_default_all_threads_of_a_run_and_half_of_them(
    model: str, no_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    monkeypatch.setattr(bench, "measure", lambda one: seen.append(one.threads) or [bench.Row("torch", 1, 4, 1.0, 3.0)])
    result = CliRunner().invoke(app, ["bench", model, "--backend", "torch"])
    assert result.exit_code == 0, result.output
    assert seen == [3, 6]


def test_a_failed_measurement_is_told() -> None:
    with pytest.raises(KTAMXError, match=r"The benchmark failed: .*(hidden size 30|cannot run)"):
        bench.measure(replace(asked("AMXBF16", [4]), sizes=replace(SIZES, hidden=30)))


@pytest.mark.parametrize("options", [("--tokens", "many"), ("--threads", "0"), ("--backend", "AMXBF8")])
def test_bad_input_is_exit_code_2(options: tuple[str, str], model: str) -> None:
    result = CliRunner().invoke(app, ["bench", model, *options])
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def refused(model: str, backend: str, placement: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[Any] = []
    monkeypatch.setattr(bench, "measure", measured.append)
    result = invoke(model, "--backend", backend, "--placement", "cpu", "--placement", placement)
    assert result.exit_code == 2, result.output
    assert f"--placement={placement!r}" in result.output
    assert words in result.output
    assert "Traceback" not in result.output
    assert not measured


@pytest.mark.parametrize(
    ("placement", "words"),
    [
        ("gup", "Did you mean gpu?"),
        ("8", "as in {resident: 8, streamed: 16}"),
        ("", "is not one of auto, cpu, gpu"),
        ("null", "is not one of auto, cpu, gpu"),
        ("{resident: 8", "cannot be read: write cpu, gpu, auto, or numbers"),
        ("{resident: -1}", "give a number of experts of each layer"),
        ("{residents: 1}", "it takes resident and streamed"),
        ("{resident: 3, streamed: 2}", "a layer has 4 experts. Set resident and streamed together to 4 or less"),
    ],
)
def test_wrong_placements(
    placement: str, words: str, model: str, cpu_for_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(model, "torch", placement, words, monkeypatch)


@pytest.mark.parametrize("marked", [pytest.param("AMXBF16", marks=KERNEL_MARKS)])
def test_too_few_for_the_operators(marked: str, model: str, cpu_for_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(model, marked, "{streamed: 3}", "leaves 1 on the CPU, and the operators need 2", monkeypatch)


@pytest.mark.parametrize("placement", ["gpu", "{streamed: 1}"])
def test_placements_that_need_a_gpu(placement: str, model: str, no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(model, "torch", placement, "needs a CUDA GPU, and there is none here", monkeypatch)
