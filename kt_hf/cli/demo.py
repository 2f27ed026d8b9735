"""`kt-hf demo`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ..demo import DemoError
from ..demo.settings import DemoSettings
from .failures import plain_failures


def main(
    output_dir: Annotated[
        Path, typer.Option("--output-dir", "-o", help="Folder for the adapter, the loss plot and the summary.")
    ] = Path("demo-output"),
    backend: Annotated[
        str, typer.Option(help="What computes the experts: auto, torch, AMXBF16, … (kt_backend of KTConfig).")
    ] = DemoSettings.backend,
    lora_target: Annotated[
        str, typer.Option(help="all, all_attention, or names such as gate_proj,up_proj,down_proj.")
    ] = DemoSettings.lora_target,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = DemoSettings.steps,
    fast: Annotated[
        bool, typer.Option("--fast", help="A few layers and steps: checks the machinery, the answers mean nothing.")
    ] = False,
) -> None:
    """Train and check a small real model, within minutes.

    A mixture of experts learns Python's documentation, on this computer.

    Needs about 5 GB of memory and no network. The exit code is 0 when the held-out loss fell as expected and the saved
    adapter gives the same answers in a new process, 1 when not, 2 when something is missing or an option is wrong.
    """
    with plain_failures(DemoError):
        from rich.console import Console

        from ..demo.run import run_demo

        settings = replace(DemoSettings(), backend=backend, lora_target=lora_target, steps=steps)
        run_demo(settings.fast() if fast else settings, output_dir, Console(highlight=False))
