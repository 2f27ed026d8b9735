"""`kt-hf estimate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import KTAMXConfigError
from .failures import FAILED, plain_failures

if TYPE_CHECKING:
    from ..train.config.settings import TrainSettings


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
    host_gb: Annotated[
        float | None, typer.Option(metavar="N", help="Host memory of another machine; by default what is free here.")
    ] = None,
    gpu_gb: Annotated[float | None, typer.Option(metavar="N", help="Memory of its GPU; means --device cuda.")] = None,
    ranks: Annotated[
        int,
        typer.Option(metavar="N", help="Processes of one host that divide the experts, a GPU for each."),
    ] = 1,
    hosts: Annotated[int, typer.Option(metavar="N", help="Hosts with as many processes each.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, sizes in bytes.")] = False,
) -> None:
    """Tell how much memory a run takes, before anything is loaded.

    Part by part, whether it fits, and what to change if not.

    Example: kt-hf estimate configs/qwen3_30b_a3b_sft.yaml per_device_train_batch_size=4

    Sequences are taken to be as long as cutoff_len allows. Another machine (--host-gb 512 --gpu-gb 24, of 2^30 bytes,
    as memory is sold) is taken to have a CPU that kt-kernel's operators run on. With --ranks sizes are of one process;
    --host-gb is the memory of a host, which they share. With --hosts each host has all experts, or they are divided
    among the processes of all (kt_expert_ranks, by default where no host has memory for them). The exit code is 0 when
    it fits this machine, or the one given, 1 when not, 2 when a setting is wrong.
    """
    with plain_failures():
        estimate = make(what, overrides or [], device, host_gb, gpu_gb, ranks, hosts)
        if as_json:
            typer.echo(json.dumps(estimate.as_json(), indent=2))
        else:
            show(estimate)
        if not estimate.fits:
            raise typer.Exit(FAILED)


def make(
    what: str,
    overrides: list[str],
    device: str = "auto",
    host_gb: float | None = None,
    gpu_gb: float | None = None,
    ranks: int = 1,
    hosts: int = 1,
) -> Any:
    """The `Estimate` of a YAML file, or of a model with the default settings.

    Args:
        what: A YAML file, or a model's name or folder.
        overrides: Settings as `key=value`, put over the file's.
        device: `cuda`, `cpu`, or `auto` for what this machine has.
        host_gb: Host memory of another machine, in units of 2^30 bytes; None for what is free here.
        gpu_gb: Memory of its GPU; None for what is free here, if the run is to be here.
        ranks: Processes of a host; the estimate is of one of them.
        hosts: How many hosts have as many processes.

    Raises:
        KTAMXError: Bad settings, no such model, or one without experts.
    """
    if device not in ("auto", "cuda", "cpu"):
        raise KTAMXConfigError(f"--device={device}: it must be auto, cuda or cpu.")
    if gpu_gb is not None and device == "cpu":
        raise KTAMXConfigError(f"--gpu-gb={gpu_gb:g} and --device=cpu: leave one of them out.")
    host_given, gpu_given = _bytes(host_gb, "--host-gb"), _bytes(gpu_gb, "--gpu-gb")
    settings = _settings(what, overrides)
    import torch

    from ..backends import OPERATORS, kernel_availability
    from ..system.memory import available_memory
    from ..train.hub import sizes_of
    from ..train.memory import estimate
    from ..train.model_sizes import model_sizes
    from ..train.models import load_config

    config = sizes_of(settings.run.model_name_or_path) or load_config(settings.run)[0]
    elsewhere = host_given is not None or gpu_given is not None
    has_gpu = torch.cuda.is_available()
    gpu = gpu_given is not None or (device == "cuda" if device != "auto" else has_gpu and not elsewhere)
    backend = settings.kt.kt_backend
    sizes = model_sizes(config, settings.run)
    host_free = available_memory() if host_given is None else host_given
    gpu_free = torch.cuda.mem_get_info()[0] if has_gpu and gpu and not elsewhere else gpu_given
    return estimate(
        settings,
        _divided(settings, sizes, (hosts, ranks), host_free, gpu_free if gpu else 0),
        kernel=backend in OPERATORS or (backend == "auto" and (elsewhere or kernel_availability().ok)),
        gpu=gpu,
        host_free=host_free // ranks,
        gpu_free=gpu_free,
    )


def _divided(settings: TrainSettings, sizes: Any, world: tuple[int, int], host_free: int, gpu_free: int | None) -> Any:
    """The sizes of one of the processes: `world` are hosts, and processes of each."""
    from ..train.memory_parts import ASSUMED_GPU
    from ..train.owners import owners_of

    hosts, ranks = world
    if hosts < 1 or ranks < 1:
        raise KTAMXConfigError(f"--hosts={hosts} --ranks={ranks}: give 1 or more of both.")
    gpus = ranks * (ASSUMED_GPU if gpu_free is None else gpu_free)
    owners = owners_of(settings, sizes, world, (host_free, gpus))
    if sizes.experts % owners:
        fitting = ", ".join(str(n) for n in range(1, sizes.experts + 1) if sizes.experts % n == 0)
        several = f" --hosts={hosts}" if owners > ranks else ""
        raise KTAMXConfigError(
            f"--ranks={ranks}{several}: a layer's {sizes.experts} experts are divided evenly by {fitting}."
        )
    return sizes.of_rank(owners, ranks, hosts)


def _bytes(gb: float | None, option: str) -> int | None:
    if gb is not None and not 0 < gb < 2**30:
        raise KTAMXConfigError(f"{option}={gb:g} is no size of memory: write {option} 512, or 1.5.")
    return None if gb is None else int(gb * 2**30)


def _settings(what: str, overrides: list[str]) -> TrainSettings:
    """The settings of a YAML file, or the defaults for a model.

    A model that nobody has is refused before the libraries that know TRL's settings are imported, which takes seconds.
    """
    from ..builtin.known_models import known_config
    from ..train.hub import configuration_of

    written = Path(what).suffix in (".yaml", ".yml")
    if not written and not what.startswith("builtin:") and known_config(what) is None:
        configuration_of(what)
    from ..train.config.read import check_settings, read_arguments
    from ..train.config.yaml_file import Setting, read_overrides

    if written:
        return read_arguments(Path(what), overrides, purpose="estimate")
    given, problems = read_overrides({"model_name_or_path": Setting(what, "command line")}, overrides)
    return check_settings(given, problems, what, purpose="estimate")


def _of_each(sizes: Any) -> str:
    """Of how many processes a table is."""
    if sizes is None or sizes.of_host * sizes.hosts == 1:
        return ""
    return f", of each of {sizes.of_host} processes" + (f" on each of {sizes.hosts} hosts" if sizes.hosts > 1 else "")


def show(estimate: Any) -> None:
    """Print an `Estimate` as tables, its verdict and its advice."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    for title, parts, total, free in (
        ("Host memory", estimate.host, estimate.host_total, estimate.host_free),
        (f"GPU memory {estimate.moment}".strip(), estimate.gpu, estimate.gpu_total, estimate.gpu_free),
    ):
        if not parts:
            continue
        title += _of_each(estimate.sizes)
        table = Table(title=title, title_justify="left", box=None, show_header=False, padding=(0, 2))
        table.add_column()
        table.add_column(justify="right")
        for name, size in ((name, size) for name, size in parts.items() if size):
            table.add_row(name, f"{size / 2**30:.2f} GiB")
        table.add_row("[bold]in all, at the peak[/bold]", f"[bold]{total / 2**30:.1f} GiB[/bold]")
        if free is not None:
            table.add_row("there is", f"{free / 2**30:.1f} GiB")
        console.print(table)
    if estimate.ranks > 1:
        sizes, a_host = estimate.sizes, "a host" if estimate.sizes.hosts > 1 else "the host"
        once = "once" if sizes.ranks == sizes.of_host else f"once on {sizes.hosts} hosts together"
        console.print(
            f"{sizes.of_host} processes take {sizes.of_host * estimate.host_total / 2**30:.1f} GiB of {a_host}: the "
            f"experts {once}, {sizes.experts} of a layer and their LoRA in each, the rest of the model in each as a "
            "whole."
        )
    verdict = "It fits." if estimate.fits else "[red]It does not fit.[/red]"
    console.print(f"{estimate.tokens} tokens a forward. {verdict}")
    other = estimate.host_total_otherwise
    if other is not None:
        how = "with" if estimate.shared_backward else "without"
        choice = "true" if estimate.shared_backward else "false"
        fast = "faster" if estimate.shared_backward else "slower"
        console.print(
            f"Host memory is {how} one buffer of backward weights for all layers (kt_share_backward_weights: {choice}, "
            f"as a run would choose by the memory there is); otherwise {other / 2**30:.1f} GiB, {fast}."
        )
    if estimate.plan:
        assumed = "by assumed rates" if estimate.gpu_free is not None else "by assumed rates and on a GPU of 80 GB"
        console.print(f"kt_expert_placement auto, {assumed} (a run measures its machine's): {estimate.plan}.")
        if estimate.plan.resident_layers and not estimate.plan.cpu:
            console.print("A run begins with all streamed; layers stay on the GPU as its first steps leave room.")
    for line in estimate.advice:
        console.print(f"  - {line}")
