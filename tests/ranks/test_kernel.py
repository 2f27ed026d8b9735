"""kt-kernel's operators on two ranks: as far from fp32 as one process is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.cases import KERNEL_MARKS
from tests.support.helpers import MIXTRAL
from tests.support.layers import SCALING, make_inputs, random_lora
from tests.support.models import base_weights
from tests.support.rank_kernel import TOKENS
from tests.support.ranks import relative
from tests.support.reference import experts_forward_backward

pytestmark = [*KERNEL_MARKS, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
LAUNCHERS = {1: [], 2: ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]}


def on(ranks: int, folder: Path) -> dict[str, Tensor]:
    """What processes of their own have, in one: kt-kernel refuses forks."""
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, *LAUNCHERS[ranks], str(ROOT / "tests/support/rank_kernel.py"), str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        cwd=folder, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    parts = [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]
    return {name: torch.cat([part[name] for part in parts]).float() for name in parts[0]}


def test_two_ranks_are_as_near_to_fp32_as_one_process(tmp_path: Path) -> None:
    base = next(iter(base_weights(MIXTRAL(torch.bfloat16)).values()))
    inputs = make_inputs(MIXTRAL, TOKENS, torch.bfloat16)
    expected = experts_forward_backward(*inputs, base, random_lora(MIXTRAL), SCALING)
    one, two = on(1, tmp_path / "one"), on(2, tmp_path / "two")
    for name, value in {"output": expected.output, **expected.grads}.items():
        of_one, of_two = relative(one[name], value), relative(two[name], value)
        assert of_one < 0.03, name
        assert of_two <= 1.3 * of_one, (name, of_two, of_one)
