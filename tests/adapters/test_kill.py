"""A run killed at any moment leaves the last complete checkpoint, and none that loads but is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("when", ["points", "random"])
def test_killed(when: str, tmp_path: Path) -> None:
    """`points`: before, within and after every write, rename and removal of three saves; `random`: 30 moments."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.support.killed", when, tmp_path],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    print(run.stdout)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-3000:]
