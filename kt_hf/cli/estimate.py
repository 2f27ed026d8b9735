"""`kt-hf estimate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .failures import FAILED, plain_failures


def main(
    what: Annotated[
        str, typer.Argument(metavar="CONFIG.yaml|MODEL", help="A configuration, or a model's name or folder.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings put over the file's.")
    ] = None,
    device: Annotated[
        str, typer.Option(help="Where all but the experts would be: cuda, cpu, or auto for what this machine has.")
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, sizes in bytes.")] = False,
) -> None:
    """Tell how much memory a run takes, before anything is loaded.

    Part by part, whether it fits, and what to change if not.

    Example: kt-hf estimate configs/qwen3_30b_a3b_sft.yaml per_device_train_batch_size=4

    Sequences are taken to be as long as cutoff_len allows. The exit code is 0 when it fits, 1 when not, 2 when a
    setting is wrong.
    """
    with plain_failures():
        made = make(what, overrides or [], device)
        if as_json:
            typer.echo(json.dumps(made.as_json(), indent=2))
        else:
            show(made)
        if not made.fits:
            raise typer.Exit(FAILED)


def make(what: str, overrides: list[str], device: str = "auto") -> Any:
    """The `Estimate` of a YAML file, or of a model with the default settings.

    Raises:
        KTAMXError: Bad settings, no such model, or one without experts.
    """
    from ..errors import KTAMXConfigError
    from ..train.config.read import check_settings, read_arguments
    from ..train.config.yaml_file import Setting, read_overrides
    from ..train.memory import estimate
    from ..train.model_sizes import model_sizes
    from ..train.models import load_config

    if device not in ("auto", "cuda", "cpu"):
        raise KTAMXConfigError(f"--device={device}: it must be auto, cuda or cpu.")
    if Path(what).suffix in (".yaml", ".yml"):
        settings = read_arguments(Path(what), overrides, purpose="estimate")
    else:
        given, problems = read_overrides({"model_name_or_path": Setting(what, "command line")}, overrides)
        settings = check_settings(given, problems, what, purpose="estimate")
    import torch

    from ..backends import kernel_availability
    from ..system.memory import available_memory

    config, _ = load_config(settings.own)
    here = torch.cuda.is_available()
    gpu = here if device == "auto" else device == "cuda"
    kernel = settings.kt.kt_backend != "torch" and kernel_availability().ok
    return estimate(
        settings,
        model_sizes(config, settings.own),
        kernel=kernel,
        gpu=gpu,
        host_free=available_memory(),
        gpu_free=torch.cuda.mem_get_info()[0] if here and gpu else None,
    )


def show(made: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    for title, parts, total, free in (
        ("Host memory", made.host, made.host_total, made.host_free),
        ("GPU memory", made.gpu, made.gpu_total, made.gpu_free),
    ):
        if not parts:
            continue
        table = Table(title=title, title_justify="left", box=None, show_header=False, padding=(0, 2))
        table.add_column()
        table.add_column(justify="right")
        for name, size in parts.items():
            table.add_row(name, f"{size / 2**30:.2f} GiB")
        table.add_row("[bold]in all, at most[/bold]", f"[bold]{total / 2**30:.1f} GiB[/bold]")
        if free is not None:
            table.add_row("free here", f"{free / 2**30:.1f} GiB")
        console.print(table)
    shared = ", backward weights shared" if made.shared_backward else ""
    console.print(
        f"{made.tokens} tokens a forward{shared}. " + ("It fits." if made.fits else "[red]It does not fit.[/red]")
    )
    if made.plan:
        assumed = "by assumed rates" if made.gpu_free is not None else "by assumed rates and on a GPU of 80 GB"
        console.print(f"kt_expert_placement auto, {assumed} (a run measures its machine's): {made.plan}.")
    for line in made.advice:
        console.print(f"  - {line}")
