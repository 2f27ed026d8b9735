"""The command `kt-hf`. One module a verb; a module imports heavy libraries only when its verb runs.

A verb's module has a function `main` with typer's annotations; VERBS names it. The ten modules take five milliseconds
to import together, so that they are imported for every command: `kt-hf --help` needs their first lines anyway.
"""

from __future__ import annotations

import importlib
import logging
from typing import Annotated

import typer

from .._versions import __version__

VERBS = {
    "train": "train",
    "estimate": "estimate",
    "quantize": "quantize",
    "chat": "chat",
    "eval": "evaluate",  # a module called eval would hide the function
    "export": "export",
    "import": "import_adapter",  # a module cannot be called import
    "doctor": "doctor",
    "bench": "bench",
    "demo": "demo",
}

app = typer.Typer(
    name="kt-hf",
    help="LoRA fine-tuning of mixture-of-experts models with a stock Hugging Face Trainer, experts on CPU or GPU.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: rich would be a third of the time that `kt-hf --help` takes
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


# A callback also keeps typer from dropping the verb's name while there is only one verb.
@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    # PEFT imports bitsandbytes where it is installed, and that advises on an operator that nobody asked for.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


for _verb, _module in VERBS.items():
    app.command(_verb)(importlib.import_module(f"kt_hf.cli.{_module}").main)
