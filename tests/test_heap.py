"""Freed memory is kept for the next tensors, unless the environment says how malloc is to be."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import resource, torch
from kt_hf.heap import keep_freed_memory
keep_freed_memory()
found = []
for _ in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensor = torch.ones(100 * 2**20, dtype=torch.uint8)
    del tensor
    found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(found))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, True),
        ({"MALLOC_ARENA_MAX": "4"}, True),
        ({"MALLOC_MMAP_THRESHOLD_": str(2**20)}, False),
        ({"GLIBC_TUNABLES": f"glibc.malloc.mmap_threshold={2**20}"}, False),
    ],
    ids=str,
)
def test_a_large_tensor_gets_the_pages_of_the_last(settings: dict[str, str], kept: bool) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))} | settings
    environment |= {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    faults = int(done.stdout)
    assert faults < 25 if kept else faults >= 50, "100 MiB are 50 huge pages, or 25,600 others"
