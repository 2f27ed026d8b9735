"""`kt-hf eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import KTAMXConfigError
from .failures import plain_failures

if TYPE_CHECKING:
    from ..use.evaluation import Wanted
    from ..use.opening import Choice


def main(
    adapter: Annotated[
        Path | None, typer.Argument(help="The adapter's folder; without one the base model is evaluated.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="The base model, in place of the one the adapter names.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Data as kt-hf train reads them: a file, folder, name.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks of lm-eval, with commas between.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="A folder of your own lm-eval tasks.")] = None,
    generate: Annotated[
        bool, typer.Option("--generate", help="Also answer the data's questions: exact match.")
    ] = False,
    rouge: Annotated[bool, typer.Option("--rouge", help="With ROUGE, by the package rouge-score.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="The base model beside the adapter.")] = False,
    max_samples: Annotated[int | None, typer.Option(help="Rows taken of the data, and of each task.")] = None,
    cutoff_len: Annotated[int, typer.Option(help="Tokens of a row at most.")] = 1024,
    batch_size: Annotated[int, typer.Option(help="Rows of a batch.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 256,
    output: Annotated[Path | None, typer.Option(help="Also write the numbers to this new JSON file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of the table.")] = False,
    backend: Annotated[str | None, typer.Option(help="kt_backend, in place of the adapter's.")] = None,
    device: Annotated[str, typer.Option(help="Where all but the experts runs: auto, cpu or cuda.")] = "auto",
    template: Annotated[
        str | None, typer.Option(help="Chat template of a tokenizer that has none: chatml or alpaca.")
    ] = None,
) -> None:
    """Measure a trained model: loss, scored answers, lm-eval's tasks.

    Example: kt-hf eval outputs/demo_smol --dataset builtin:pydoc --max-samples 40 --compare

    The loss is the Trainer's evaluation loss, perplexity its exponential. The exit code is 0, 2 when something is not
    there or an option is wrong, 130 after Ctrl-C.
    """
    with plain_failures():
        names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
        _check(adapter, dataset, names, generate, rouge, compare)
        from ..use.evaluation import Wanted, write_result
        from ..use.opening import Choice
        from ..use.questions import check_output

        if output is not None:
            check_output(output)
        choice = Choice(adapter, base, backend, device, template, chat=generate)
        wanted = Wanted(
            dataset, generate, rouge, names, include_path, compare, max_samples, cutoff_len, batch_size, max_new_tokens
        )
        result = _evaluate(choice, wanted)
        if as_json:
            typer.echo(json.dumps(result, indent=2))
        else:
            show(result)
        write_result(output, result)  # after they are shown: a full disk does not take them


def _evaluate(choice: Choice, wanted: Wanted) -> dict[str, Any]:
    """Everything that can be wrong first, then the model, then the numbers."""
    from rich.console import Console

    from ..train.quiet import quiet_libraries
    from ..use.evaluation import evaluate, read_data
    from ..use.opening import check
    from ..use.scores import check_rouge
    from ..use.tasks import check_tasks

    if wanted.rouge:
        check_rouge()
    quiet_libraries()
    if wanted.tasks:
        check_tasks(wanted.tasks, wanted.include)
    checked = check(choice)
    data = read_data(checked, wanted)
    console = Console(stderr=True, highlight=False)
    for note in (*checked.notes, *(data.rows.notes + data.prepared.notes if data else ())):
        console.print(f"note: {note}", markup=False)
    return evaluate(checked.load(console), data, wanted, console)


def _check(
    adapter: Path | None, dataset: str | None, names: list[str], generate: bool, rouge: bool, compare: bool
) -> None:
    if not dataset and not names:
        raise KTAMXConfigError("Nothing to evaluate on: give --dataset, or --tasks of lm-eval.")
    if (generate or rouge) and not dataset:
        raise KTAMXConfigError("--generate and --rouge need --dataset.")
    if rouge and not generate:
        raise KTAMXConfigError("--rouge scores answers: give --generate too.")
    if compare and adapter is None:
        raise KTAMXConfigError("--compare needs an adapter.")


def show(result: dict[str, Any]) -> None:
    """A table of the numbers, one column for each model, and what the adapter changed."""
    from rich.console import Console
    from rich.table import Table

    results = result["results"]
    table = Table("", *results, *(["change"] if len(results) == 2 else []))
    for name in next(iter(results.values())):
        values = [one[name] for one in results.values()]
        cells = [f"{value:.4f}" for value in values]
        table.add_row(name, *cells, *([f"{values[1] - values[0]:+.4f}"] if len(values) == 2 else []))
    Console(highlight=False).print(table)
