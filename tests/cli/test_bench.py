"""`kt-hf bench`: a table, JSON and a plot of what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kt_hf.cli import app
from kt_hf.errors import KTAMXError
from kt_hf.train import bench
from tests.conftest import KERNEL_MARKS
from tests.train.tiny import save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("model")))


def invoke(model: str, *options: str) -> Any:
    return CliRunner().invoke(app, ["bench", model, "--tokens", "4,16", "--threads", "1", "--runs", "2", *options])


@pytest.mark.parametrize(
    "backend", ["torch", *(pytest.param(name, marks=KERNEL_MARKS) for name in ("AMXBF16", "AMXInt8"))]
)
def test_it_measures_the_models_shape(backend: str, model: str, tmp_path: Path) -> None:
    result = invoke(model, "--backend", backend, "--json", "--plot", str(tmp_path / "bench.png"))
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["shape"] == [4, 2, 64, 64]
    assert [(row["backend"], row["threads"], row["tokens"]) for row in answer["rows"]] == [
        (backend, 1, 4),
        (backend, 1, 16),
    ]
    assert all(row["forward_ms"] > 0 and row["backward_ms"] > 0 for row in answer["rows"])
    assert (tmp_path / "bench.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_table_is_shown(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [bench.Row("torch", 1, 4, 1.0, 3.0), bench.Row("torch", 1, 16, 2.0, 6.0)]
    monkeypatch.setattr(bench, "measure", lambda *_: rows)
    result = invoke(model)
    assert result.exit_code == 0, result.output
    assert "The experts of all 2 layers: at most 1000 tokens/s, 1 threads, 16 tokens a batch." in " ".join(
        result.stdout.split()
    )


def test_a_failed_measurement_is_told() -> None:
    with pytest.raises(KTAMXError, match=r"The benchmark failed: .*hidden size 30"):
        bench.measure((4, 2, 30, 64), 8, "AMXBF16", 1, [4], 1)


@pytest.mark.parametrize("options", [("--tokens", "many"), ("--threads", "0"), ("--backend", "AMXBF8")])
def test_bad_input_is_exit_code_2(options: tuple[str, str], model: str) -> None:
    result = CliRunner().invoke(app, ["bench", model, *options])
    assert result.exit_code == 2
    assert "Traceback" not in result.output
