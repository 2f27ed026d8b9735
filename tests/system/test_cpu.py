"""The CPU's instruction sets and the thread plan, read from simulated /proc and /sys trees."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from kt_hf import KTAMXConfigError
from kt_hf.system.cpu import (
    ThreadPlan,
    affinity,
    cgroup_cpu_limit,
    cpu_features,
    numa_nodes,
    parse_cpu_list,
    physical_cores,
    plan_threads,
)
from tests.support.machine import EIGHT, FOUR_SMT, TWO_SOCKETS, features, machine, write

AVX2 = "fpu sse2 avx avx2 fma"
AVX512 = f"{AVX2} avx512f avx512bw avx512vl"
AVX512_BF16 = f"{AVX512} avx512_bf16"
AMX = f"{AVX512_BF16} amx_bf16 amx_tile amx_int8"


@pytest.mark.parametrize(
    ("text", "cpus"),
    [("0-3,8,10-11\n", {0, 1, 2, 3, 8, 10, 11}), ("5", {5}), ("\n", set()), ("", set()), ("0-0,2,", {0, 2})],
)
def test_cpu_list(text: str, cpus: set[int]) -> None:
    assert parse_cpu_list(text) == cpus


@pytest.mark.parametrize(
    ("cores", "allowed", "expected"),
    [
        (EIGHT, range(8), [0, 1, 2, 3, 4, 5, 6, 7]),
        (FOUR_SMT, range(8), [0, 1, 2, 3]),
        (FOUR_SMT, {1, 5}, [1]),
        (FOUR_SMT, {2, 5, 6}, [2, 5]),
        ([(0, 0), (0, 0), (0, 1), (0, 1)], range(4), [0, 2]),
        (TWO_SOCKETS, range(8), [0, 1, 2, 3, 4, 5, 6, 7]),
        ([], range(3), [0, 1, 2]),  # no topology: each logical CPU counts
    ],
)
def test_physical_cores(tmp_path: Path, cores: list[tuple[int, int]], allowed: set[int], expected: list[int]) -> None:
    assert physical_cores(allowed, machine(tmp_path, cores)) == expected


def test_numa_nodes(tmp_path: Path) -> None:
    """Nodes of memory alone have no CPUs; node 10 comes after node 2, and other folders lie beside."""
    root = machine(tmp_path, [], {0: "0-1", 2: "2-3", 10: "4", 1: ""})
    write(root, {"sys/devices/system/node/node_states/cpulist": "0-99"})
    (root / "sys/devices/system/node/node7").mkdir()
    assert numa_nodes(root) == {0: {0, 1}, 2: {2, 3}, 10: {4}}
    assert numa_nodes(tmp_path / "nothing") == {}


V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/cpu"
GROUPS: dict[str, tuple[dict[str, object], float | None]] = {
    "no cgroup": ({}, None),
    "v2": ({"proc/self/cgroup": "0::/job", f"{V2}/job/cpu.max": "250000 100000"}, 2.5),
    "v2 without a limit": ({"proc/self/cgroup": "0::/job", f"{V2}/job/cpu.max": "max 100000"}, None),
    "v2 in a namespace": ({"proc/self/cgroup": "0::/", f"{V2}/cpu.max": "300000 100000"}, 3),
    "v2 limit of the parent": (
        {
            "proc/self/cgroup": "0::/pod/box",
            f"{V2}/pod/cpu.max": "400000 100000",
            f"{V2}/pod/box/cpu.max": "max 100000",
        },
        4,
    ),
    "v2 smallest of all": (
        {
            "proc/self/cgroup": "0::/pod/box",
            f"{V2}/cpu.max": "800000 100000",
            f"{V2}/pod/cpu.max": "200000 100000",
            f"{V2}/pod/box/cpu.max": "600000 100000",
        },
        2,
    ),
    "v2 files missing": ({"proc/self/cgroup": "0::/job"}, None),
    "v2 unreadable": ({"proc/self/cgroup": "0::/job", f"{V2}/job/cpu.max": "?"}, None),
    "v1": (
        {
            "proc/self/cgroup": "7:memory:/job\n4:cpu,cpuacct:/job\n1:name=systemd:/",
            f"{V1}/job/cpu.cfs_quota_us": "150000",
            f"{V1}/job/cpu.cfs_period_us": "50000",
        },
        3,
    ),
    "v1 without a limit": (
        {"proc/self/cgroup": "4:cpu:/", f"{V1}/cpu.cfs_quota_us": "-1", f"{V1}/cpu.cfs_period_us": "100000"},
        None,
    ),
    "v1 limit of the parent": (
        {
            "proc/self/cgroup": "4:cpu:/pod/box",
            f"{V1}/pod/cpu.cfs_quota_us": "200000",
            f"{V1}/pod/cpu.cfs_period_us": "100000",
            f"{V1}/pod/box/cpu.cfs_quota_us": "-1",
            f"{V1}/pod/box/cpu.cfs_period_us": "100000",
        },
        2,
    ),
    "v1 path of the host, seen from a container": (
        {
            "proc/self/cgroup": "4:cpuacct,cpu:/docker/1f2e",
            f"{V1}/cpu.cfs_quota_us": "50000",
            f"{V1}/cpu.cfs_period_us": "100000",
        },
        0.5,
    ),
    "both versions": (
        {
            "proc/self/cgroup": "4:cpu:/job\n0::/job",
            f"{V1}/job/cpu.cfs_quota_us": "500000",
            f"{V1}/job/cpu.cfs_period_us": "100000",
            f"{V2}/job/cpu.max": "max 100000",
        },
        5,
    ),
}


@pytest.mark.parametrize("name", GROUPS)
def test_cgroup_limit(tmp_path: Path, name: str) -> None:
    files, limit = GROUPS[name]
    assert cgroup_cpu_limit(write(tmp_path, files)) == limit


@pytest.mark.parametrize(
    ("cores", "cpus", "workers"),
    [
        (EIGHT, set(range(8)), 7),
        (FOUR_SMT, set(range(8)), 3),
        (FOUR_SMT, {0, 4}, 1),
        (EIGHT, {3}, 1),
        (EIGHT, {3, 5, 6}, 2),
    ],
)
def test_plan_is_the_physical_cores_less_one(
    tmp_path: Path, cores: list[tuple[int, int]], cpus: set[int], workers: int
) -> None:
    assert plan_threads(root=machine(tmp_path, cores), cpus=cpus) == ThreadPlan(((0, workers),))


@pytest.mark.parametrize(("quota", "workers"), [("300000", 2), ("250000", 1), ("50000", 1), ("9900000", 7), ("max", 7)])
def test_plan_keeps_to_the_control_group(tmp_path: Path, quota: str, workers: int) -> None:
    root = machine(tmp_path, EIGHT)
    write(root, {"proc/self/cgroup": "0::/job", f"{V2}/job/cpu.max": f"{quota} 100000"})
    assert plan_threads(root=root, cpus=set(range(8))).workers == workers


@pytest.mark.parametrize("requested", [1, 5, 8])
def test_request_within_the_machine_is_kept(tmp_path: Path, requested: int, caplog: pytest.LogCaptureFixture) -> None:
    plan = plan_threads(requested, root=machine(tmp_path, EIGHT), cpus=set(range(8)))
    assert plan == ThreadPlan(((0, requested),))
    assert not caplog.records


@pytest.mark.parametrize(("cores", "cpus", "workers"), [(EIGHT, range(8), 7), (FOUR_SMT, range(8), 3), (EIGHT, {0}, 1)])
def test_larger_request_is_clamped_with_a_warning(
    tmp_path: Path, cores: list[tuple[int, int]], cpus: set[int], workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    plan = plan_threads(60, root=machine(tmp_path, cores), cpus=set(cpus))
    assert plan.workers == workers
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "kt_num_threads=60" in caplog.text
    assert f"{workers} worker" in caplog.text


@pytest.mark.parametrize("requested", [0, -1, -60])
def test_request_that_is_not_positive_is_refused(requested: int) -> None:
    with pytest.raises(KTAMXConfigError, match=rf"kt_num_threads={requested} is not positive"):
        plan_threads(requested)


@pytest.mark.parametrize(
    ("nodes", "cpus", "settings", "pools"),
    [
        ({0: "0-3", 1: "4-7"}, range(8), {}, ((0, 3), (1, 3))),
        ({0: "0-3", 1: "4-7"}, range(8), {"requested": 8}, ((0, 4), (1, 4))),
        ({0: "0-3", 1: "4-7"}, range(8), {"requested": 2}, ((0, 1), (1, 1))),
        ({0: "0-3", 1: "4-7"}, range(8), {"requested": 1}, ((0, 1),)),
        ({0: "0-3", 1: "4-7"}, range(4, 8), {}, ((1, 3),)),  # bound to one node
        ({0: "0-3", 1: "4-7"}, range(4), {"tp_enabled": False}, ((0, 3),)),
        ({0: "0-5", 1: "6-7"}, range(8), {}, ((0, 2), (1, 2))),  # pools are equal: the smaller node decides
        ({0: "0-7", 1: ""}, range(8), {}, ((0, 7),)),  # a node of memory alone
        ({}, range(8), {}, ((0, 7),)),
    ],
)
def test_plan_over_nodes(
    tmp_path: Path, nodes: dict[int, str], cpus: range, settings: dict[str, int], pools: tuple[tuple[int, int], ...]
) -> None:
    assert plan_threads(root=machine(tmp_path, TWO_SOCKETS, nodes), cpus=set(cpus), **settings).pools == pools


def test_without_tensor_parallelism_there_is_one_pool(tmp_path: Path) -> None:
    root = machine(tmp_path, TWO_SOCKETS, {0: "0-3", 1: "4-7"})
    assert len(plan_threads(tp_enabled=False, root=root, cpus=set(range(8))).pools) == 1


def test_plan_where_nothing_is_told(tmp_path: Path) -> None:
    assert plan_threads(root=tmp_path, cpus={0, 1, 2}) == ThreadPlan(((0, 2),))


def test_plan_of_this_machine() -> None:
    assert 1 <= plan_threads().workers <= max(1, len(affinity()) - 1)


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        (ThreadPlan(((0, 1),)), "1 worker thread (1 on node 0)"),
        (ThreadPlan(((0, 3), (1, 3))), "6 worker threads (3 on node 0, 3 on node 1)"),
    ],
)
def test_plan_in_words(plan: ThreadPlan, text: str) -> None:
    assert str(plan) == text


FLAGS = {
    "AMX": (AMX, features(amx=True, avx512_bf16=True)),
    "AMX without bf16 tiles": (f"{AVX512_BF16} amx_tile amx_int8", features(avx512_bf16=True)),
    "AVX512-BF16": (AVX512_BF16, features(avx512_bf16=True)),
    "AVX512 without BF16": (AVX512, features()),
    "AVX2": (AVX2, features()),
    "older": ("fpu sse2 avx", features(avx2=False)),
}


@pytest.mark.parametrize("name", FLAGS)
def test_instruction_sets(tmp_path: Path, name: str) -> None:
    flags, expected = FLAGS[name]
    one = f"processor\t: {{}}\nmodel name\t: Some CPU\nflags\t\t: {flags}\nvmx flags\t: amx_tile amx_bf16 amx_int8\n"
    write(tmp_path, {"proc/cpuinfo": "\n".join(one.format(i) for i in range(2))})
    assert cpu_features(tmp_path) == expected


def test_instruction_sets_without_flags(tmp_path: Path) -> None:
    """As on ARM, whose line is called Features."""
    found = cpu_features(write(tmp_path, {"proc/cpuinfo": "processor : 0\nFeatures : fp asimd bf16 avx2"}))
    assert (found.amx, found.avx512_bf16, found.avx2) == (False, False, False)


def test_instruction_sets_without_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = {"flags": AMX.split(), "brand_raw": "Some CPU"}
    monkeypatch.setitem(sys.modules, "cpuinfo", SimpleNamespace(get_cpu_info=lambda: info))
    assert cpu_features(tmp_path) == features(amx=True, avx512_bf16=True)
