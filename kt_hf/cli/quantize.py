"""`kt-hf quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .failures import plain_failures

_TO = {"int8": "AMXInt8", "int4": "AMXInt4"}


def main(
    model: Annotated[str, typer.Argument(help="A model's folder, or its name on the hub.", show_default=False)],
    output: Annotated[Path, typer.Argument(help="A new folder, on a disk with space.", show_default=False)],
    to: Annotated[str, typer.Option(help="int8 or int4.")] = "int8",
    no_backward: Annotated[
        bool,
        typer.Option(
            "--no-backward", help="Half the size: backward weights are made of the others at each backward, slower."
        ),
    ] = False,
    pools: Annotated[
        int | None, typer.Option(min=1, help="NUMA nodes of the machine that will train; by default this one's.")
    ] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="As transformers has it.")] = False,
) -> None:
    """Quantize a model's experts once, for kt_weight_path.

    The folder takes the place of the original weights of the experts.

    Example: kt-hf quantize Qwen/Qwen3-30B-A3B qwen3-int8 --to int8

    The checkpoint is streamed, a few layers in memory at a time. The exit code is 0 when the folder is written, 2 when
    it cannot be.
    """
    with plain_failures():
        from ..errors import KTAMXConfigError
        from ..tools.quantize import run

        if to not in _TO:
            raise KTAMXConfigError(f"--to={to}: it must be {' or '.join(_TO)}.")
        run(model, output, _TO[to], backward=not no_backward, pools=pools, trust_remote_code=trust_remote_code)
        typer.echo(f"Written: {output}. Use it with kt_backend: {_TO[to]} and kt_weight_path: {output}")
