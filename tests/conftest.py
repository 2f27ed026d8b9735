"""Shared fixtures.

The environment is set here, before a test module imports transformers: no test may touch the network.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version

for _name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ[_name] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["WANDB_MODE"] = "disabled"

KERNEL_PROBE = "import sys, kt_kernel; sys.exit(0 if hasattr(kt_kernel.kt_kernel_ext.moe, 'AMXBF16_SFT_MOE') else 3)"


def _kernel_missing() -> str | None:
    """Why kt-kernel's SFT operators cannot run here, or None; asks the CPU and kt-kernel, not the package tested."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "no /proc/cpuinfo: kt-kernel's SFT operators need Linux on x86-64"
    flags = set(next((line for line in lines if line.startswith("flags")), "").split())
    if not flags & {"avx512_bf16", "amx_bf16"}:
        return "the CPU has neither avx512_bf16 nor amx_bf16, which kt-kernel's SFT operators need"
    forced = os.environ.get("KT_KERNEL_CPU_VARIANT", "").lower()
    needed = {"amx": "amx_bf16", "avx512_bf16": "avx512_bf16"}.get(forced)
    if needed and needed not in flags:
        return f"KT_KERNEL_CPU_VARIANT={forced} forces operators that this CPU cannot run"
    # A child, so that a variant which dies of an illegal instruction costs a skip and not the whole run.
    probe = subprocess.run([sys.executable, "-c", KERNEL_PROBE], capture_output=True, text=True)
    if probe.returncode == 3:
        return f"the kt-kernel variant loaded here (KT_KERNEL_CPU_VARIANT={forced!r}) has no SFT operators"
    if probe.returncode:
        last = (probe.stderr.strip().splitlines() or ["no message"])[-1]
        return f"kt-kernel does not import (exit {probe.returncode}): {last}"
    return None


_MISSING = _kernel_missing()
KERNEL_MARKS = (pytest.mark.kernel, pytest.mark.skipif(_MISSING is not None, reason=str(_MISSING)))


def _own_adapters_refused() -> str | None:
    """Why transformers' own `model.add_adapter` refuses the PEFT that is installed, or None."""
    from transformers.integrations import peft

    wanted, here = getattr(peft, "MIN_PEFT_VERSION", "0"), version("peft")
    return (
        f"transformers wants PEFT {wanted} for its own adapters, not {here}"
        if Version(here) < Version(wanted)
        else None
    )


_REFUSED = _own_adapters_refused()
transformers_adapters = pytest.mark.skipif(_REFUSED is not None, reason=str(_REFUSED))


def pytest_report_header() -> str:
    return f"kt-kernel's operators: {'tested' if _MISSING is None else 'their tests are skipped, ' + _MISSING}"


@dataclass(frozen=True)
class Case:
    """A backend, the dtype of the model given to it, and how close to the fp32 reference a layer must then be.

    `forward` and `grad` bound relative_error of one layer's output and gradients. `same` bounds the difference of two
    ways to compute one thing with the same arithmetic; sums may be taken in another order, in bf16 at the last.
    """

    backend: str
    dtype: torch.dtype
    forward: float
    grad: float
    same: float

    def __str__(self) -> str:
        return f"{self.backend}-{str(self.dtype).removeprefix('torch.')}"


TORCH_FP32 = Case("torch", torch.float32, forward=1e-5, grad=1e-4, same=1e-5)
TORCH_BF16 = Case("torch", torch.bfloat16, forward=1e-2, grad=2e-2, same=5e-3)
KERNEL_BF16 = Case("AMXBF16", torch.bfloat16, forward=1e-2, grad=2e-2, same=5e-3)


@pytest.fixture(params=["torch", pytest.param("AMXBF16", marks=KERNEL_MARKS)])
def backend(request: pytest.FixtureRequest) -> str:
    """The kt_backend to test with; AMXBF16 only where the CPU and the installed kt-kernel can run it."""
    return request.param


@pytest.fixture(
    params=[
        pytest.param(TORCH_FP32, id=str(TORCH_FP32)),
        pytest.param(TORCH_BF16, id=str(TORCH_BF16)),
        pytest.param(KERNEL_BF16, id=str(KERNEL_BF16), marks=KERNEL_MARKS),
    ]
)
def case(request: pytest.FixtureRequest) -> Case:
    """Backend, model dtype and tolerances together."""
    return request.param


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def make_config(backend: str, **overrides: Any) -> Any:
    """A KTConfig of one thread: the operators are bit-deterministic with one worker only."""
    from kt_hf import KTConfig

    return KTConfig(kt_backend=backend, **{"kt_num_threads": 1, **overrides})
