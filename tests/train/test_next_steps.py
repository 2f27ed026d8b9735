"""The commands and the program that a run prints at its end: copied from what it prints, they run."""

from __future__ import annotations

import contextlib
import io
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner

from kt_hf.adapters import convert
from kt_hf.cli import app
from tests.support.tiny import environment, save_model, trained
from tests.train.test_scripts import ROWS

TITLES = {"sft": "Load it, and ask it something:", "rm": "Load it, and score an answer:"}
BUILTIN = "builtin:smollm2-moe/2"


def printed(text: str, title: str) -> list[str]:
    """The lines below a title, as somebody copies them."""
    below = text[text.index(title) :].splitlines()[1:]
    return [line.strip() for line in below[: next(i for i, line in enumerate([*below, ""]) if line[:2] != "  ")]]


def scored(program: str) -> tuple[str, dict[str, Any]]:
    """What a program prints, and its variables."""
    names: dict[str, Any] = {}
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(program, names)
    return out.getvalue(), names


def test_a_reward_models_program_and_export_give_its_score(tiny_model: Path, tmp_path: Path) -> None:
    _, text = trained(tmp_path, tiny_model, [ROWS["rm"]] * 4, "stage=rm", "torch_dtype=float32", "plot_loss=true")
    assert "kt-hf chat" not in text  # it has nothing to say
    out, names = scored("\n".join(printed(text, TITLES["rm"])))
    convert(tmp_path / "out", tmp_path / "peft", to="peft")
    stock = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1, dtype=torch.float32)
    with torch.no_grad():
        score = PeftModel.from_pretrained(stock, tmp_path / "peft").eval()(**names["inputs"]).logits.item()
    assert float(out) == pytest.approx(score, abs=1e-5)
    card, report = ((tmp_path / "out" / name).read_text() for name in ("README.md", "report.html"))
    assert "AutoModelForSequenceClassification.from_pretrained(" in card
    assert "kt-hf chat" not in card + report
    assert "--to merged" not in card  # the base has no score head to merge into


def test_the_program_of_a_model_without_a_chat_template(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", chat_template=None)
    _, text = trained(tmp_path, model, [{"text": "A story."}] * 4, "stage=pt")
    assert "kt-hf chat" not in text  # which needs one
    _, names = scored("\n".join(printed(text, TITLES["sft"])))
    assert names["output"].shape[1] > names["inputs"]["input_ids"].shape[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "builtin"),
    [
        ("pt", False),
        ("sft", False),
        ("dpo", False),
        ("kto", False),
        ("orpo", False),
        ("rm", False),
        ("sft", True),
        ("rm", True),
    ],
)
def test_everything_printed_runs(stage: str, builtin: bool, tiny_model: Path, tmp_path: Path) -> None:
    rows = {
        "pt": {"text": "A story."},
        "kto": {"prompt": ROWS["dpo"]["prompt"], "completion": ROWS["dpo"]["chosen"], "label": True},
        "orpo": ROWS["dpo"],
    } | ROWS
    model = Path(BUILTIN) if builtin else tiny_model
    other = rows[stage] | ({"label": False} if stage == "kto" else {})
    _, text = trained(tmp_path, model, [rows[stage], other] * 2, f"stage={stage}")
    program = "\n".join(printed(text, TITLES.get(stage, TITLES["sft"])))
    if (stage, builtin) == ("sft", False):  # a process of its own takes many times as long as the program
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    else:
        scored(program)
    titles = ["Export it for stock PEFT:"] + (["Talk with it:"] if stage != "rm" else [])
    for title in titles:
        (line,) = printed(text, title)
        name, *arguments = shlex.split(line)
        assert name == "kt-hf"
        more = ["--prompt", "2+2?", "--max-new-tokens", "2"] if arguments[0] == "chat" else []
        command = CliRunner().invoke(app, [*arguments, *more])
        assert command.exit_code == 0, command.output
    assert (tmp_path / "out_peft" / "adapter_model.safetensors").is_file()
