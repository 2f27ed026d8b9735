"""`kt-hf import`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .failures import plain_failures


def main(
    adapter: Annotated[Path, typer.Argument(help="Folder or safetensors file of an adapter.", show_default=False)],
    output: Annotated[Path, typer.Argument(help="A new folder.", show_default=False)],
    source: Annotated[
        str | None, typer.Option("--from", help="What it should be: peft, per-expert or fused. Its keys tell anyway.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="Its adapter_config.json, where it is not beside it.")] = None,
) -> None:
    """Write another program's adapter in kt_hf's format.

    It can be trained further and loaded then.

    Example: kt-hf import llama_factory_adapter outputs/start --from per-expert

    The exit code is 0 when it is written, 2 when it cannot be.
    """
    with plain_failures():
        from ..adapters import convert, open_adapter
        from ..errors import KTAMXConfigError

        if source is not None:
            with open_adapter(adapter, config) as opened:
                if opened.format != source:
                    raise KTAMXConfigError(f"--from={source}: {adapter} is of the format {opened.format}.")
        written = convert(adapter, output, to="kt", config=config)
        typer.echo(
            f"Written: {written}. Train it further with adapter_name_or_path={written} (kt-hf train), or load it with "
            "PeftModel.from_pretrained on a patched model."
        )
