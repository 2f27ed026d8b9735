"""`kt-hf quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .failures import plain_failures

_TO = {"int8": "AMXInt8", "AMXInt8": "AMXInt8", "AMXInt4": "AMXInt4"}
_INT4 = "int4"


def main(
    model: Annotated[str, typer.Argument(help="A model's folder, or its name on the hub.", show_default=False)],
    output: Annotated[Path, typer.Argument(help="A new folder, on a disk with space.", show_default=False)],
    to: Annotated[str, typer.Option(help="int4, or AMXInt8 (int8) or AMXInt4.")] = "int8",
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
    """Quantize a model's experts once.

    int4 writes a whole checkpoint in compressed-tensors' layout, groups of 32, which kt-hf, vLLM and SGLang load by its
    name. AMXInt8 and AMXInt4 write experts alone as the CPU operators hold them, for kt_weight_path.

    Example: kt-hf quantize Qwen/Qwen3-30B-A3B qwen3-int4 --to int4

    The checkpoint is streamed, a few layers in memory at a time. The exit code is 0 when the folder is written, 2 when
    it cannot be.
    """
    with plain_failures():
        from ..errors import KTAMXConfigError
        from ..tools.quantize import run, run_int4

        if to == _INT4:
            if no_backward or pools is not None:
                raise KTAMXConfigError("--no-backward and --pools are of AMXInt8 and AMXInt4: leave them out.")
            run_int4(model, output, trust_remote_code)
            typer.echo(f"Written: {output}, a checkpoint. Train it as a model: model_name_or_path: {output}")
            return
        if to not in _TO:
            raise KTAMXConfigError(f"--to={to}: it must be {_INT4} or {' or '.join(_TO)}.")
        run(model, output, _TO[to], backward=not no_backward, pools=pools, trust_remote_code=trust_remote_code)
        typer.echo(f"Written: {output}. Use it with kt_backend: {_TO[to]} and kt_weight_path: {output}")
