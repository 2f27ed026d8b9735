"""`kt-hf bench`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .failures import plain_failures

if TYPE_CHECKING:
    from ..shapes import ExpertShape
    from ..tools.bench import Row
    from ..train.model_sizes import ModelSizes


def main(
    model: Annotated[str, typer.Argument(help="A model's name or folder: its experts' sizes are used.")] = (
        "builtin:smollm2-moe"
    ),
    tokens: Annotated[str, typer.Option(help="Batch sizes in tokens, separated by commas.")] = "64,256,1024",
    threads: Annotated[
        str | None, typer.Option(help="Worker threads, separated by commas; by default the planned number and half.")
    ] = None,
    backend: Annotated[str, typer.Option(help="auto, AMXBF16, AMXInt8, AMXInt4 or torch, of experts on the CPU.")] = (
        "auto"
    ),
    placement: Annotated[
        list[str] | None,
        typer.Option(
            help="As kt_expert_placement: cpu, gpu, auto, or numbers as in '{resident: 8, streamed: 40}'. Give it "
            "several times for several; by default cpu, and auto where there is a GPU."
        ),
    ] = None,
    rank: Annotated[int, typer.Option(min=1, max=1024, help="LoRA rank.")] = 8,
    runs: Annotated[int, typer.Option(min=1, help="Runs of each; medians are shown.")] = 5,
    plot: Annotated[Path | None, typer.Option(help="Also draw a PNG.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure a layer of a model's experts on this machine.

    How fast it is computed, forward and backward.

    Example: kt-hf bench Qwen/Qwen3-30B-A3B --tokens 512,2048 --threads 8,16,32 --plot bench.png

    Weights are random, so only the model's configuration is read. One layer is held in memory, twice.
    """
    with plain_failures():
        from ..tools import bench
        from ..train.config.settings import RunKeys
        from ..train.hub import sizes_of
        from ..train.model_sizes import model_sizes
        from ..train.models import load_config

        lengths = _numbers("--tokens", tokens)
        keys = RunKeys(model_name_or_path=model)
        sizes = model_sizes(sizes_of(model) or load_config(keys)[0], keys)
        shape = (sizes.experts, sizes.top_k, sizes.hidden, sizes.intermediate)
        rows = _measured(sizes, lengths, threads, backend, placement, rank, runs)
        title = f"{model}: {sizes.experts} experts, {sizes.top_k} a token, {sizes.hidden} x {sizes.intermediate}"
        if plot:
            bench.plot(rows, plot, title, sizes.experts)
        if as_json:
            typer.echo(json.dumps({"model": model, "shape": shape, "rank": rank, "rows": [asdict(r) for r in rows]}))
            return
        _show(rows, title, sizes.experts, sizes.expert_layers)
        if plot:
            typer.echo(f"Drawn: {plot}")


def _measured(
    sizes: ModelSizes,
    lengths: list[int],
    threads: str | None,
    backend: str,
    placement: Sequence[str] | None,
    rank: int,
    runs: int,
) -> list[Row]:
    """The rows of each placement and number of threads; the other arguments are those of `main`."""
    import torch

    from .. import KTConfig
    from ..backends import choose_backend
    from ..shapes import ExpertShape
    from ..system.cpu import plan_threads
    from ..tools import bench

    shape = ExpertShape(sizes.experts, sizes.top_k, sizes.hidden, sizes.intermediate)
    planned = plan_threads().workers
    workers = None if threads else planned
    chosen, _ = choose_backend(KTConfig(kt_backend=backend).kt_backend, shape, workers=workers)
    most = torch.get_num_threads() if chosen == "torch" else planned  # as in a run
    counts = _numbers("--threads", threads) if threads else sorted({max(1, most // 2), most})
    return [
        row
        for where in _placements(placement, shape, chosen)
        for count in counts
        for row in bench.measure(bench.Asked(sizes, rank, chosen, count, lengths, runs, where))
    ]


def _show(rows: Sequence[Row], title: str, experts: int, layers: int) -> None:
    """Print a table of the rows, measured of one of a model's `layers` layers of `experts` experts."""
    from rich.console import Console
    from rich.table import Table

    predictions = any(row.predicted_ms is not None for row in rows)
    tiers = any(row.resident or row.streamed for row in rows)
    columns = ["threads", *["resident", "streamed", "CPU"] * tiers, "tokens", "forward ms", "backward ms", "tokens/s"]
    table = Table(*columns, *["predicted"] * predictions, title=f"{title}, {rows[0].backend}", box=None)
    for row in rows:
        places = row.resident, row.streamed, experts - row.resident - row.streamed
        predicted = "" if row.predicted_ms is None else f"{row.predicted_ms:.1f}"
        table.add_row(
            str(row.threads), *[str(count) for count in places] * tiers, str(row.tokens), f"{row.forward_ms:.1f}",
            f"{row.backward_ms:.1f}", f"{row.tokens_per_second:.0f}", *[predicted] * predictions,
        )  # fmt: skip
    console = Console(highlight=False)
    console.print(table)
    if predictions:
        console.print(
            "Predicted: ms of the slowest of bus, CPU and GPU, forward and backward, where auto chose the places. It "
            "chose for a model, where some weights are on their way while attention is computed."
        )
    best = max(rows, key=lambda row: row.tokens_per_second)
    where = f", {best.where(experts)}" if best.resident or best.streamed else ""
    console.print(
        f"The experts of all {layers} layers: at most {best.tokens_per_second / layers:.0f} tokens/s, "
        f"{best.threads} threads, {best.tokens} tokens a batch{where}."
    )


def _placements(asked: Sequence[str] | None, shape: ExpertShape, backend: str) -> list[Any]:
    """The values of kt_expert_placement to measure, each placement once: without a GPU `auto` is `cpu`.

    Raises:
        KTAMXConfigError: One that a run would refuse on this machine.
    """
    import yaml

    from .. import KTConfig
    from ..errors import KTAMXConfigError
    from ..placement.assembly import chosen_tiers
    from ..system import gpu

    by_tiers: dict[Any, Any] = {}
    device = gpu.experts_device()
    for text in asked or (("cpu", "auto") if device is not None else ("cpu",)):
        try:
            read = yaml.safe_load(text)
            value = text if read is None else read
            by_tiers.setdefault(chosen_tiers(KTConfig(kt_expert_placement=value), [shape], backend, device), value)
        except yaml.YAMLError:
            raise KTAMXConfigError(
                f"--placement={text!r} cannot be read: write cpu, gpu, auto, or numbers as in "
                "'{resident: 8, streamed: 40}'."
            ) from None
        except KTAMXConfigError as error:
            raise KTAMXConfigError(f"--placement={text!r}: {error}") from None
    return list(by_tiers.values())


def _numbers(option: str, text: str) -> list[int]:
    from ..errors import KTAMXConfigError

    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise KTAMXConfigError(f"{option}={text!r}: whole numbers above 0, separated by commas.")
    return [int(part) for part in parts]
