"""What this machine and this installation can do, what is wrong with them, and how to mend it."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil
from packaging.version import Version

from ..ranks import Ranks, current_world, of_all_ranks

# Oldest versions for training, besides those that importing kt_hf checks.
TRAIN_FLOORS = {"trl": "1.16", "datasets": "4.7", "matplotlib": "3.9"}
KERNEL = "0.7.2"


@dataclass
class Finding:
    """One line of the report: a fact, and a remedy if it is not as it should be.

    Attributes:
        group: The part of the report, such as "CPU".
        name: What the fact is about.
        value: The fact in words.
        ok: True if it is as it should be, False if it keeps something from working, None for a fact or an advice.
        fix: What to do about it; "" for nothing.
    """

    group: str
    name: str
    value: str
    ok: bool | None = None
    fix: str = ""


def examine() -> list[Finding]:
    """All findings, in the order in which they are shown. Takes some seconds: each self-test is a process.

    Of several processes that a launcher has started all call this: the first examines, the others tell it what they
    have, and get no findings.

    Raises:
        KTAMXError: The processes cannot meet.
    """
    together = list(_processes())
    if current_world().rank:
        return []
    return [*_cpu(), *_kernel(), *_memory(), *_gpu(), *together, *_versions(), *_self_tests()]


def _processes() -> Iterator[Finding]:
    """What processes that were started together have of the machine."""
    from ..system.cpu import plan_threads
    from ..system.gpu import experts_device
    from ..system.memory import available_memory

    world = current_world()
    if world.size == 1:
        return
    every = of_all_ranks(
        Ranks(world),
        lambda: [
            str(plan_threads()),
            f"{available_memory() / 2**30:.1f} GiB",
            str(experts_device() or "no GPU"),
            world.local_size,
            platform.node(),
        ],
    )
    backend = "nccl" if experts_device() is not None else "gloo"
    hosts = world.size // world.local_size
    several = f" on {hosts} hosts" if hosts > 1 else ""
    words = f"{world.size} processes{several}, {world.local_size} of this host, by {backend}"
    even = len({one[3] for one in every}) == 1
    fix = "" if even else "start as many processes on each host, or set kt_expert_ranks: all"
    yield Finding("processes", "world", words, even, fix)
    for rank, (threads, memory, device, _, host) in enumerate(every):
        where = f"on {host}; " if hosts > 1 else ""
        yield Finding("processes", f"rank {rank}", f"{where}{threads}; {memory} of host memory; {device}")


def _cpu() -> Iterator[Finding]:
    from ..system.cpu import affinity, cgroup_cpu_limit, cpu_features, numa_nodes, physical_cores, plan_threads

    features, cpus = cpu_features(), affinity()
    yield Finding("CPU", "name", features.name)
    for name, has in (("AMX", features.amx), ("AVX512-BF16", features.avx512_bf16), ("AVX2", features.avx2)):
        yield Finding("CPU", name, "yes" if has else "no")
    limit = cgroup_cpu_limit()
    limited = f", limited to {limit:g} by the control group" if limit else ""
    yield Finding("CPU", "cores", f"{len(physical_cores(cpus))} physical, {len(cpus)} logical{limited}")
    nodes = numa_nodes()
    yield Finding("CPU", "NUMA", f"{len(nodes) or 1} node{'s' if len(nodes) > 1 else ''}")
    plan = plan_threads()
    few = plan.workers < 8
    advice = "experts will be slow: the operators want 8 cores or more" if few else ""
    yield Finding("CPU", "plan", str(plan), None, advice)


def _kernel() -> Iterator[Finding]:
    from ..backends import choose_backend, kernel_availability
    from ..backends.kt_kernel.installation import has_wheels
    from ..shapes import ExpertShape
    from ..system.cpu import cpu_features, plan_threads

    available, features = kernel_availability(), cpu_features()
    lacking = (features.amx or features.avx512_bf16) and not available.ok
    # Without kt-kernel kt_hf installs and works there: an advice, nothing wrong.
    nowhere = lacking and _installed("kt-kernel") is None and not has_wheels()
    fix = f"pip install kt-kernel=={KERNEL}; unset KT_KERNEL_CPU_VARIANT" if lacking else ""
    yield Finding(
        "kernel",
        "kt-kernel",
        available.reason,
        available.ok or (False if lacking and not nowhere else None),
        "this CPU can run its operators: use Python 3.11 or 3.12 on Linux x86-64" if nowhere else fix,
    )
    backend, why = choose_backend("auto", ExpertShape(8, 2, 64, 64), workers=plan_threads().workers)
    yield Finding("kernel", "backend auto", f"{backend} ({why})" if backend == "torch" else backend)


def _memory() -> Iterator[Finding]:
    from ..system.memory import available_memory

    total, free = psutil.virtual_memory().total, available_memory()
    yield Finding("memory", "host", f"{free / 2**30:.1f} GiB free of {total / 2**30:.1f} GiB")
    swap = psutil.swap_memory()
    if swap.used > 2**30:
        advice = "experts that are swapped out are very slow: free memory first"
        yield Finding("memory", "swap", f"{swap.used / 2**30:.1f} GiB in use", None, advice)


def _gpu() -> Iterator[Finding]:
    import torch

    from ..system.parallel import launch_command

    if not torch.cuda.is_available():
        built = torch.version.cuda
        yield Finding(
            "GPU", "CUDA", "no GPU seen" if built else "PyTorch is built without CUDA", None,
            "attention and the rest run on the CPU" + ("" if built else "; for a GPU install PyTorch's CUDA wheels"),
        )  # fmt: skip
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        yield Finding("GPU", str(index), f"{name}, {free / 2**30:.1f} GiB free of {total / 2**30:.1f} GiB")
    if torch.cuda.device_count() > 1:
        yield Finding(
            "GPU", "count", str(torch.cuda.device_count()), None,
            "" if current_world().size > 1 else f"one is used, as CUDA_VISIBLE_DEVICES=0 says to trainers. For all: "
            f"{launch_command(torch.cuda.device_count())}",
        )  # fmt: skip
    to_gpu, back = pcie_speed()
    yield Finding("GPU", "copies", f"{to_gpu:.1f} GB/s to the GPU, {back:.1f} GB/s back (pinned)")


def pcie_speed(megabytes: int = 256, runs: int = 3) -> tuple[float, float]:
    """Measure GB/s of pinned copies to the first GPU, and back; the best of `runs` copies of `megabytes` MB."""
    import torch

    host = torch.empty(megabytes * 10**6, dtype=torch.uint8).pin_memory()
    device = host.to("cuda")
    speeds = []
    for source, target in ((host, device), (device, host)):
        best = 0.0
        for _ in range(runs):
            torch.cuda.synchronize()
            start = time.perf_counter()
            target.copy_(source, non_blocking=True)
            torch.cuda.synchronize()
            best = max(best, megabytes / 1000 / (time.perf_counter() - start))
        speeds.append(best)
    return speeds[0], speeds[1]


def _versions() -> Iterator[Finding]:
    from .._versions import FLOORS, __version__

    yield Finding("versions", "python", f"{platform.python_version()} on {platform.platform()}")
    yield Finding("versions", "kt-hf", __version__)
    for name, floor in (FLOORS | TRAIN_FLOORS).items():
        installed = _installed(name)
        good = installed is not None and Version(Version(installed).base_version) >= Version(floor)
        extra = "'kt-hf[train]'" if name in TRAIN_FLOORS else f"'{name}>={floor}'"
        yield Finding(
            "versions", name, f"{installed or 'not installed'} (at least {floor})", good,
            "" if good else f"pip install -U {extra}",
        )  # fmt: skip
    kernel = _installed("kt-kernel")
    good = kernel is None or kernel == KERNEL
    fix = "" if good else f"pip install kt-kernel=={KERNEL}: others have not been tested"
    yield Finding("versions", "kt-kernel", kernel or "not installed", None if good else False, fix)


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _self_tests() -> Iterator[Finding]:
    from ..backends import OPERATORS, QUANTIZED, kernel_availability
    from .selftest import in_new_process

    for backend in (*(name for name in OPERATORS if kernel_availability(name).ok), "torch"):
        result = in_new_process(backend)
        value = result.problem or (
            f"right: output within {result.output_error:.1e}, gradients within {result.gradient_error:.1e}"
        )
        other = "AMXBF16 or torch" if backend in QUANTIZED else "torch"
        fix = "" if result.ok else f"kt_backend: {other} avoids it; please report the block below"
        yield Finding("self-test", backend, value, result.ok, fix)


def block(findings: list[Finding]) -> str:
    """The findings as plain text, a line each, to paste into a bug report."""
    return "\n".join(f"{f.group}/{f.name}: {f.value}" for f in findings)


def as_json(findings: list[Finding]) -> dict[str, Any]:
    """The findings as JSON's values: "ok", whether all is well, and "findings", a list of objects."""
    return {"ok": healthy(findings), "findings": [finding.__dict__ for finding in findings]}


def healthy(findings: list[Finding]) -> bool:
    """Whether no finding keeps anything from working."""
    return all(finding.ok is not False for finding in findings)
