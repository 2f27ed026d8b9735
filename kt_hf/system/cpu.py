"""What the CPU can do, and how many threads the operators should use on it.

Everything is read from /proc and /sys where they exist (their root can be given, for tests), with py-cpuinfo and psutil
where they do not.
"""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import KTAMXConfigError
from ..ranks import World, current_world

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CpuFeatures:
    """Instruction sets that decide the backend.

    Attributes:
        name: The CPU's model name.
        amx: Whether it has AMX with bf16 and INT8.
        avx512_bf16: Whether it has AVX512 with BF16.
        avx2: Whether it has AVX2.
        avx512_vbmi: Whether it has AVX512 with VBMI.
    """

    name: str
    amx: bool
    avx512_bf16: bool
    avx2: bool
    avx512_vbmi: bool = False


@dataclass(frozen=True)
class ThreadPlan:
    """Worker threads of the operators.

    Attributes:
        pools: (NUMA node, number of threads) of each pool of threads.
    """

    pools: tuple[tuple[int, int], ...]

    @property
    def workers(self) -> int:
        """The number of threads of all pools."""
        return sum(threads for _, threads in self.pools)

    def __str__(self) -> str:
        where = ", ".join(f"{threads} on node {node}" for node, threads in self.pools)
        return f"{self.workers} worker thread{'s' if self.workers != 1 else ''} ({where})"


def cpu_features(root: Path = Path("/")) -> CpuFeatures:
    """Instruction sets of this CPU, by /proc/cpuinfo, else by py-cpuinfo."""
    flags: set[str] = set()
    name = platform.processor() or platform.machine()
    try:
        for line in (root / "proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "flags" and not flags:
                flags = set(value.split())
            elif key.strip() == "model name":
                name = value.strip()
    except OSError:
        import cpuinfo  # slow (it starts processes), so only where /proc is missing

        info = cpuinfo.get_cpu_info()
        flags, name = set(info.get("flags", ())), info.get("brand_raw", name)
    return CpuFeatures(
        name=name,
        amx={"amx_tile", "amx_bf16", "amx_int8"} <= flags,
        avx512_bf16={"avx512f", "avx512bw", "avx512_bf16"} <= flags,
        avx2="avx2" in flags,
        avx512_vbmi="avx512vbmi" in flags,
    )


def affinity() -> set[int]:
    """Logical CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def physical_cores(cpus: Iterable[int], root: Path = Path("/")) -> list[int]:
    """One logical CPU of each physical core among `cpus`, in order."""
    seen: set[tuple[str, str]] = set()
    cores = []
    for cpu in sorted(cpus):
        topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        try:
            core = (topology / "physical_package_id").read_text().strip(), (topology / "core_id").read_text().strip()
        except OSError:
            core = ("cpu", str(cpu))
        if core not in seen:
            seen.add(core)
            cores.append(cpu)
    return cores


def numa_nodes(root: Path = Path("/")) -> dict[int, set[int]]:
    """NUMA node -> its logical CPUs, without nodes that have none; {} where the system has no such list."""
    nodes = {}
    for folder in sorted((root / "sys/devices/system/node").glob("node[0-9]*")):
        try:
            cpus = parse_cpu_list((folder / "cpulist").read_text())
        except OSError:
            continue
        if cpus:
            nodes[int(folder.name.removeprefix("node"))] = cpus
    return nodes


def parse_cpu_list(text: str) -> set[int]:
    """The numbers of a list in the Linux kernel's format: `0-3,8,10-11`."""
    cpus: set[int] = set()
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            cpus.update(range(int(first), int(last or first) + 1))
    return cpus


def cgroup_cpu_limit(root: Path = Path("/")) -> float | None:
    """The number of CPUs that the control group of this process, or one above it, allows; None without a limit.

    Control groups of versions 1 and 2 are read.
    """
    limits = []
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    base = root / "sys/fs/cgroup"
    for line in groups:
        _, controllers, path = line.split(":", 2)
        relative = Path(path.lstrip("/"))
        for folder in [relative, *relative.parents]:
            try:
                if controllers == "":
                    quota, period = (base / folder / "cpu.max").read_text().split()
                elif "cpu" in controllers.split(","):
                    quota = (base / "cpu" / folder / "cpu.cfs_quota_us").read_text().strip()
                    period = (base / "cpu" / folder / "cpu.cfs_period_us").read_text().strip()
                else:
                    continue
            except (OSError, ValueError):
                continue
            if quota not in ("max", "-1"):
                limits.append(int(quota) / int(period))
    return min(limits, default=None)


def plan_threads(
    requested: int | None = None, tp_enabled: bool = True, root: Path = Path("/"), cpus: set[int] | None = None
) -> ThreadPlan:
    """Threads for the operators: the physical cores of the process's affinity and control group, less one.

    One core is left to the operators' queue thread, which spins while a call runs: with as many workers as cores, each
    small step waits for a scheduler quantum. Where several processes of this host train one model, each plans with
    a part of the cores, next to each other by NUMA node.

    Args:
        requested: Number of threads the user asked for; more than there are cores are clamped, with a warning. None
            plans by the cores.
        tp_enabled: With cores on several NUMA nodes, make one pool a node, all of equal size (the operators split each
            expert evenly over the pools); otherwise one pool.
        root: Where /proc and /sys are; tests give another.
        cpus: The logical CPUs to plan for; None for those of the process's affinity.

    Raises:
        KTAMXConfigError: `requested` is zero or negative.
    """
    if requested is not None and requested < 1:
        raise KTAMXConfigError(f"kt_num_threads={requested} is not positive: leave it out (None) to have it planned.")
    nodes = sorted(numa_nodes(root).items())
    world = current_world()
    cores = _of_rank(physical_cores(affinity() if cpus is None else cpus, root), nodes, world)
    limit = cgroup_cpu_limit(root)
    count = len(cores) if limit is None else max(1, min(len(cores), int(limit / world.local_size)))
    most = max(1, count - 1)
    workers = most
    if requested is not None:
        workers = requested
        if requested > count:
            logger.warning(
                "kt_num_threads=%d: this machine has %d core%s for the process, %d worker%s will be used.",
                requested, count, "s" if count > 1 else "", most, "s" if most > 1 else "",
            )  # fmt: skip
            workers = most
    by_node = [(node, len([core for core in cores if core in members])) for node, members in nodes]
    by_node = [(node, held) for node, held in by_node if held]
    if not by_node:
        by_node = [(0, len(cores))]
    if not tp_enabled or len(by_node) == 1 or workers < len(by_node):
        return ThreadPlan(((by_node[0][0], workers),))
    each = min(workers // len(by_node), min(held for _, held in by_node))
    return ThreadPlan(tuple((node, max(1, each)) for node, _ in by_node))


def _of_rank(cores: list[int], nodes: list[tuple[int, set[int]]], world: World) -> list[int]:
    """The cores of this process, where several of one host train a model together; at least one."""
    if world.local_size == 1:
        return cores
    by_node = [core for _, members in nodes for core in cores if core in members] or cores
    first, end = (len(by_node) * rank // world.local_size for rank in (world.local_rank, world.local_rank + 1))
    return by_node[first:end] or [by_node[world.local_rank % len(by_node)]]
