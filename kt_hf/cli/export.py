"""`kt-hf export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .failures import plain_failures


def main(
    adapter: Annotated[Path, typer.Argument(help="The adapter's folder, as training saved it.", show_default=False)],
    output: Annotated[Path, typer.Argument(help="A new folder, or a file: .pt for sglang.", show_default=False)],
    to: Annotated[
        str | None, typer.Option(help="peft, per-expert, fused, sglang or merged; a file's extension may decide.")
    ] = None,
    base: Annotated[Path | None, typer.Option(help="Folder of the base model; needed for merged.")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Read it again as its target will: every tensor there, every value right.")
    ] = False,
) -> None:
    """Write an adapter in another program's format, or merged.

    For stock PEFT, vLLM, SGLang or llama.cpp, or merged into the model.

    Example: kt-hf export outputs/demo_smol outputs/demo_smol_peft --to peft

    The exit code is 0 when it is written (and, with --check, whole), 2 when it cannot be.
    """
    with plain_failures():
        from ..adapters import check_export, convert

        typer.echo(f"Written: {convert(adapter, output, to=to, base=base)}")
        if check:
            notes = check_export(output, adapter, base=base)
            typer.echo("Checked: every tensor is there, of the values that adapter and base give.")
            for note in notes:
                typer.echo(f"Note: {note}")
