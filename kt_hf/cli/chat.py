"""`kt-hf chat`."""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import KTAMXConfigError
from .failures import plain_failures

if TYPE_CHECKING:
    from rich.console import Console

    from ..use.generation import Answerer
    from ..use.questions import Question


def main(
    adapter: Annotated[
        Path | None, typer.Argument(help="The adapter's folder; without one the base model answers.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="The base model, in place of the one the adapter names.")] = None,
    prompt: Annotated[str | None, typer.Option(help="One question: print the answer and leave.")] = None,
    questions: Annotated[
        Path | None, typer.Option("--input", help="A file of questions, JSON lines with prompt or messages.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="The new file of the answers to --input.")] = None,
    who: Annotated[str, typer.Option("--answer", help="Who answers: adapter, base or both.")] = "adapter",
    system: Annotated[str, typer.Option(help="A system prompt.")] = "",
    thinking: Annotated[
        bool | None, typer.Option("--thinking/--no-thinking", help="enable_thinking of the chat template.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; above it tokens are drawn.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens of this probability.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 512,
    seed: Annotated[int | None, typer.Option(help="Of what is drawn.")] = None,
    backend: Annotated[str | None, typer.Option(help="kt_backend, in place of the adapter's.")] = None,
    device: Annotated[str, typer.Option(help="Where all but the experts runs: auto, cpu or cuda.")] = "auto",
    template: Annotated[
        str | None, typer.Option(help="Chat template of a tokenizer that has none: chatml or alpaca.")
    ] = None,
) -> None:
    """Talk with a trained model, or with its base model.

    Example: kt-hf chat outputs/demo_smol --prompt "What does math.isnan do?"

    Without --prompt and --input it is a conversation; /help lists its commands, Ctrl-C stops an answer. The exit code
    is 0, 2 when the adapter or its base model is not there or an option is wrong, 130 after Ctrl-C.
    """
    with plain_failures():
        from rich.console import Console

        from ..train.quiet import quiet_libraries
        from ..use.generation import Answerer, Sampling
        from ..use.opening import Choice, check
        from ..use.questions import Question, check_output, check_questions, read_questions

        _check(prompt, questions, output, who, adapter)
        _check_texts(prompt, system)
        sampling = Sampling(temperature, top_p, max_new_tokens, seed)
        rows = read_questions(questions, system) if questions else []
        if output:
            check_output(output)
        quiet_libraries()
        errors, console = Console(stderr=True, highlight=False), Console(highlight=False)
        checked = check(Choice(adapter, base, backend, device, template))
        for note in checked.notes:
            errors.print(f"note: {note}", markup=False)
        if prompt is not None:
            asked = [{"role": "system", "content": system}] if system else []
            rows = [Question({}, [*asked, {"role": "user", "content": prompt}], "--prompt")]
        check_questions(checked.tokenizer, checked.config, rows, thinking)
        answerer = Answerer(checked.load(errors), sampling, thinking)
        _answer(answerer, console, errors, prompt, rows, output, who, system)


def _check(prompt: str | None, questions: Path | None, output: Path | None, who: str, adapter: Path | None) -> None:
    if prompt is not None and questions is not None:
        raise KTAMXConfigError("--prompt and --input: give one of them.")
    if prompt is not None and not prompt.strip():
        raise KTAMXConfigError("--prompt is empty.")
    if (questions is None) != (output is None):
        raise KTAMXConfigError("--input and --output go together: a file of questions, and a new file for the answers.")
    if who not in ("adapter", "base", "both"):
        raise KTAMXConfigError(f"--answer {who}: it must be adapter, base or both.")
    if who == "both" and adapter is None:
        raise KTAMXConfigError("--answer both needs an adapter.")


def _check_texts(prompt: str | None, system: str) -> None:
    from ..use.questions import is_text

    for name, text in (("--prompt", prompt), ("--system", system)):
        if not is_text(text or ""):
            raise KTAMXConfigError(f"{name} is not UTF-8 text.")


def _answer(
    answerer: Answerer,
    console: Console,
    errors: Console,
    prompt: str | None,
    rows: list[Question],
    output: Path | None,
    who: str,
    system: str,
) -> None:
    from ..use.chat import Chat
    from ..use.questions import answer_file

    if output:
        answer_file(answerer, rows, output, who, errors, errors.is_terminal)
        typer.echo(f"Written: {output}")
        return
    chat = Chat(answerer, console, system=system, who=who)
    if prompt is not None:
        chat.ask(prompt)
        return
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a line that is not UTF-8 is refused, not the end
    with contextlib.suppress(ImportError):  # not on every system
        import readline  # noqa: F401 - editing and history of the line that is typed
    console.print("Ask something; /help lists the commands, Ctrl-D leaves.")
    chat.run()
