"""`kt-hf eval`: perplexity is the exponential of the Trainer's evaluation loss; scores; an offline task; errors."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from kt_hf import KTAMXConfigError
from kt_hf.cli import app
from kt_hf.use.evaluation import EvalData, Wanted, losses, read_data
from kt_hf.use.opening import Choice, check
from kt_hf.use.scores import score
from tests.support.tiny import save_model
from tests.support.train_runs import runs_in
from tests.use.conftest import Trained

ROWS = [{"instruction": f"{i} + {i}?", "output": f"It is {2 * i}."} for i in range(5)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "held_out.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def test_perplexity_is_that_of_the_trainers_evaluation(tmp_path: Path, data: Path) -> None:
    model = save_model(tmp_path / "model")
    runs = runs_in(tmp_path, model, eval_dataset=str(data), per_device_eval_batch_size=2, bf16=False, learning_rate=0.1)
    expected = runs.again()["eval_loss"]
    checked = check(Choice(adapter=runs.out, device="cpu", chat=False))
    read = read_data(checked, Wanted(str(data), length=64, batch=2))
    assert isinstance(read, EvalData)
    measured = losses(checked.load(), read, Console(quiet=True))
    assert measured["loss"] == pytest.approx(expected, rel=1e-6)
    assert measured["perplexity"] == pytest.approx(math.exp(expected), rel=1e-6)


def test_base_beside_adapter_as_json_and_table(trained: Trained, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "numbers.json"
    command = ["eval", str(trained.adapter), "--dataset", str(data), "--compare", "--generate", "--max-new-tokens", "4",
               "--device", "cpu", "--max-samples", "3"]  # fmt: skip
    done = CliRunner().invoke(app, [*command, "--output", str(out)])
    assert done.exit_code == 0, done.output
    assert "perplexity" in done.stdout
    assert "change" in done.stdout
    result = json.loads(out.read_text())
    assert result["rows"] == 3
    base, adapter = result["results"]["base"], result["results"]["adapter"]
    assert base.keys() == adapter.keys() == {"loss", "perplexity", "exact_match"}
    assert base["loss"] != adapter["loss"]
    checked = check(Choice(base=str(trained.base), device="cpu", chat=False))
    read = read_data(checked, Wanted(str(data), most=3))
    assert isinstance(read, EvalData)
    alone = losses(checked.load(), read, Console(quiet=True))
    assert base["loss"] == pytest.approx(alone["loss"], rel=1e-6)


def test_where_the_numbers_go_is_looked_at_first(trained: Trained, data: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text("mine")
    outputs = {"none/n.json": "there is no folder", "mine.json": "exists already", ".": "exists already"}
    for output, says in ((tmp_path / name, says) for name, says in outputs.items()):
        done = CliRunner().invoke(app, ["eval", "nowhere", "--dataset", str(data), "--output", str(output)])
        assert done.exit_code == 2, done.output
        assert f"--output {output}" in done.stderr
        assert says in done.stderr
    assert (tmp_path / "mine.json").read_text() == "mine"


def test_numbers_that_cannot_be_written_are_shown(
    trained: Trained, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kt_hf.use.evaluation.write_result", full)
    words = [
        "eval",
        str(trained.adapter),
        "--dataset",
        str(data),
        "--device",
        "cpu",
        "--output",
        str(tmp_path / "n.json"),
    ]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 1
    assert "perplexity" in done.stdout


def test_what_cannot_be_answered_is_refused_before_the_weights_are_loaded(trained: Trained, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    checked = check(Choice(adapter=trained.adapter, device="cpu"))
    long = {"instruction": "w " * 300, "output": "x"}
    refused = {
        "needs rows with a question": {"text": "A story."},
        r"question 1: The conversation has 6\d\d tokens": long,
    }
    for says, row in refused.items():
        file.write_text(json.dumps(row) + "\n")
        with pytest.raises(KTAMXConfigError, match=says):
            read_data(checked, Wanted(str(file), generate=True))


def test_a_row_longer_than_the_model_has_positions_for_is_told(trained: Trained, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"instruction": "a", "output": "x " * 400}) + "\n")
    read = read_data(check(Choice(adapter=trained.adapter, device="cpu")), Wanted(str(file)))
    assert isinstance(read, EvalData)
    assert "tokens, and the model was made for 512" in read.prepared.notes[-1]


def test_scores() -> None:
    assert score(["a  b", "c"], ["a b", "d"], rouge=False) == {"exact_match": 0.5}


def test_rouge() -> None:
    pytest.importorskip("rouge_score")
    scores = score(["the cat sat"], ["the cat sat"], rouge=True)
    assert scores == {"exact_match": 1.0, "rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0}


LM_EVAL_TASKS = {
    "multiple_choice": ("""
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""", "acc", 1.0),
    "generate_until": ("""
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["="], max_gen_toks: 4, do_sample: false}
filter_list: [{name: all, filter: [{function: take_first}]}]
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}]
""", "exact_match,all", 1.0),
    "loglikelihood_rolling": ("""
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: bits_per_byte}]
""", "bits_per_byte", 100.0),
}  # fmt: skip


@pytest.mark.parametrize("kind", LM_EVAL_TASKS)
def test_a_task_of_lm_eval_runs_offline(kind: str, trained: Trained, tmp_path: Path) -> None:
    """Each kind of request that lm-eval has, of base and adapter."""
    pytest.importorskip("lm_eval")
    text, metric, most = LM_EVAL_TASKS[kind]
    rows = [{"question": f"{i}+{i}=", "choices": [str(2 * i), "x"], "answer": 0} for i in range(3)]
    (tmp_path / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    head = f"task: sums\noutput_type: {kind}\ntest_split: test\ndataset_path: json\n"
    data = f"dataset_kwargs: {{data_files: {{test: {tmp_path}/task.jsonl}}}}\n"
    (tmp_path / "sums.yaml").write_text(head + data + text)
    words = ["--tasks", "sums", "--include-path", str(tmp_path), "--json", "--device", "cpu", "--compare"]
    done = CliRunner().invoke(app, ["eval", str(trained.adapter), *words])
    assert done.exit_code == 0, done.output
    results = json.loads(done.stdout[done.stdout.index("{") :])["results"]
    assert results.keys() == {"adapter", "base"}
    for values in results.values():
        assert 0 <= values[f"sums {metric}"] <= most


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--dataset, or --tasks"),
        (["--dataset", "none.jsonl", "--rouge"], "give --generate too"),
        (["--tasks", "x", "--generate"], "need --dataset"),
        (["--dataset", "none.jsonl"], "none.jsonl"),
        (["--dataset", "none.jsonl", "--batch-size", "0"], "--batch-size 0"),
    ],
)
def test_errors_say_what_to_do(arguments: list[str], says: str, trained: Trained) -> None:
    done = CliRunner().invoke(app, ["eval", str(trained.adapter), *arguments])
    assert done.exit_code == 2, done.output
    assert says in " ".join(done.stderr.split())


def test_what_is_not_installed_is_named(trained: Trained, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for arguments in (["--tasks", "x"], ["--dataset", str(data), "--generate", "--rouge"]):
        done = CliRunner().invoke(app, ["eval", str(trained.adapter), *arguments])
        assert done.exit_code == 2
        assert "pip install" in done.stderr
