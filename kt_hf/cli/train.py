"""`kt-hf train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .failures import plain_failures


def main(
    config: Annotated[Path, typer.Argument(help="A YAML file of settings, see configs/.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings put over the file's.")
    ] = None,
) -> None:
    """Train a LoRA adapter, by SFT, DPO or another stage.

    Example: kt-hf train configs/demo_smol.yaml learning_rate=5e-4

    The exit code is 0 when the adapter is saved, 1 when the run failed, 2 when a setting or the data is wrong (all that
    is wrong is reported at once, nothing is written), 130 after Ctrl-C, 143 after SIGTERM.
    """
    with plain_failures():
        import torch
        from rich.console import Console

        from ..train.config.read import read_arguments
        from ..train.quiet import quiet_libraries

        settings = read_arguments(config, overrides or ())
        quiet_libraries()
        from ..train.run import run

        run(settings, Console(highlight=False))
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()  # and its threads, before Python ends
