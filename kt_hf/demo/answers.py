"""Ask the model. As a program: load the demo's adapter in a new process and ask it the demo's questions.

python -m kt_hf.demo.answers demo-output
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import DemoError
from .settings import DemoSettings, OutputFolder


def ask(model: Any, tokenizer: Any, questions: Sequence[str], new_tokens: int) -> list[list[int]]:
    """Ask the model each question by itself, by greedy decoding.

    Returns:
        The answers as token ids: at most `new_tokens` each, the end token included.
    """
    answers = []
    model.eval()
    for question in questions:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
        answers.append(output[0, inputs["input_ids"].shape[1] :].tolist())
    return answers


def as_text(tokenizer: Any, answers: Sequence[Sequence[int]]) -> list[str]:
    """The answers as text, without the end token."""
    return [str(tokenizer.decode(answer, skip_special_tokens=True)).strip() for answer in answers]


def build(settings: DemoSettings) -> tuple[Any, Any]:
    """Make the up-cycled model, patched, and its tokenizer.

    Raises:
        KTAMXNotAvailableError: The model's package, or the backend that was asked for, is not there.
    """
    from .. import KTConfig, apply_kt_moe
    from ..builtin.smollm2_moe import upcycle
    from ..train.config.settings import BUILTIN_MODEL

    model, tokenizer = upcycle(
        settings.num_experts, seed=settings.seed, num_layers=settings.num_layers, dtype=settings.dtype
    )
    if (settings.num_experts, settings.seed) == (DemoSettings.num_experts, DemoSettings.seed):  # `kt-hf chat` finds it
        name = BUILTIN_MODEL + (f"/{settings.num_layers}" if settings.num_layers else "")
        model.config._name_or_path = model.name_or_path = name
    return apply_kt_moe(model, KTConfig(kt_backend=settings.backend)), tokenizer


def reload_and_ask(folder: OutputFolder, device: str) -> tuple[list[str], list[list[int]], list[str]]:
    """Make the model anew, load the adapter that the demo saved, and ask.

    Args:
        folder: The demo's.
        device: Where all but the experts runs.

    Returns:
        The questions, the answers as token ids, and the answers as text.

    Raises:
        DemoError: The folder has no adapter of the demo.
    """
    from peft import PeftModel

    summary = folder.read()
    if not (folder.adapter / "adapter_config.json").is_file():
        raise DemoError(f"{folder.adapter} holds no adapter: the demo has not got as far as saving it.", exit_code=2)
    settings = DemoSettings.from_dict(summary["settings"])
    model, tokenizer = build(settings)
    model = PeftModel.from_pretrained(model, str(folder.adapter)).to(device)
    questions = summary["questions"]
    answers = ask(model, tokenizer, questions, settings.new_tokens)
    return questions, answers, as_text(tokenizer, answers)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the questions and answers.

    Args:
        arguments: Of the command line; None takes the process's.

    Returns:
        The exit code: 0, or 2 if the folder is none of the demo's.
    """
    parser = argparse.ArgumentParser(
        prog="python -m kt_hf.demo.answers", description="Load the demo's adapter and ask it the demo's questions."
    )
    parser.add_argument("folder", type=Path, nargs="?", default=Path("demo-output"), help="what kt-hf demo wrote")
    parser.add_argument("--device", default="cpu", help="where all but the experts runs")
    parser.add_argument("--write", type=Path, help="also write the answers and their token ids to this JSON file")
    options = parser.parse_args(arguments)
    from ..errors import KTAMXError
    from ..train.quiet import quiet_libraries

    try:
        quiet_libraries()
        questions, ids, texts = reload_and_ask(OutputFolder(options.folder), options.device)
    except (DemoError, KTAMXError) as error:
        print(error, file=sys.stderr)
        return getattr(error, "exit_code", 2)
    if options.write:
        content = [{"question": q, "answer": t, "token_ids": i} for q, t, i in zip(questions, texts, ids, strict=True)]
        options.write.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for question, text in zip(questions, texts, strict=True):
        print(f"{question}\n    {text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
