"""Two pools of threads, as on a machine of two NUMA nodes: here both are on the one there is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kt_hf.backends.kt_kernel.engine import pool_config
from kt_hf.system.cpu import plan_threads
from tests.support.cases import KERNEL_MARKS
from tests.support.machine import TWO_SOCKETS, machine
from tests.support.tiny import ROOT

pytestmark = list(KERNEL_MARKS)


def test_pools_are_bound_to_the_nodes_of_the_plan(tmp_path: Path) -> None:
    """On a simulated machine of two nodes with four cores each, one core left to the operators' queue thread."""
    root = machine(tmp_path, TWO_SOCKETS, {0: "0-3", 1: "4-7"})
    config = pool_config(plan_threads(root=root, cpus=set(range(8))))
    assert config.subpool_count == 2
    assert list(config.subpool_numa_map) == [0, 1]
    assert list(config.subpool_thread_count) == [3, 3]
    config = pool_config(plan_threads(root=root, cpus=set(range(8)), tp_enabled=False))
    assert (config.subpool_count, list(config.subpool_numa_map)) == (1, [0])
    config = pool_config(plan_threads(root=root, cpus=set(range(4, 8))))
    assert (config.subpool_count, list(config.subpool_numa_map)) == (1, [1])


slow = pytest.mark.slow  # a process of minutes; trainer/test_stock_trainer.py trains over two pools


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """In a process of its own: a process has one set of pools."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.two_pools"], cwd=ROOT, capture_output=True, text=True, timeout=500,
        check=False, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    *others, last = done.stdout.splitlines()
    assert others == [], "kt-kernel prints on the user's output"
    return json.loads(last.removeprefix("RESULT "))


@slow
@pytest.mark.parametrize(
    ("case", "limit"),
    [("AMXBF16 False", 0.01), ("AMXBF16 True", 0.01), ("AMXInt8 False", 0.03), ("AMXInt8 True", 0.03),
     ("AMXInt4 False", 0.35)],
)  # fmt: skip
def test_forward_gradients_and_refreshed_lora(found: dict[str, Any], case: str, limit: float) -> None:
    """Against the fp32 reference; three values of LoRA in turn."""
    runs = found["errors"][case]
    assert len(runs) == 3
    for run in runs:
        assert len(run) == 9
        assert max(run.values()) < limit, run


@slow
def test_saved_experts_are_split_as_well(found: dict[str, Any]) -> None:
    assert found["differ"] == []


@slow
def test_sizes_that_do_not_split_are_told(found: dict[str, Any]) -> None:
    assert (
        "128 does not split into 2 pools of multiples of 128 (kt_tp_enabled=False makes one pool)" in found["refusal"]
    )
