"""The backends and dtypes to test with, which of them this machine can run, and how exact each must be."""

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

from kt_hf import KTConfig

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


KERNEL_MISSING = _kernel_missing()
KERNEL_MARKS = (pytest.mark.kernel, pytest.mark.skipif(KERNEL_MISSING is not None, reason=str(KERNEL_MISSING)))


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

_FP32 = pytest.param(TORCH_FP32, id=str(TORCH_FP32))
_KERNEL = pytest.param(KERNEL_BF16, id=str(KERNEL_BF16), marks=KERNEL_MARKS)
# Above the layer its dtype is its own business: the oracle and the operators are enough there.
CASES = [_FP32, _KERNEL]
ALL_CASES = [_FP32, pytest.param(TORCH_BF16, id=str(TORCH_BF16)), _KERNEL]


def make_config(backend: str, **overrides: Any) -> Any:
    """A KTConfig of one thread: the operators are bit-deterministic with one worker only."""
    return KTConfig(kt_backend=backend, **{"kt_num_threads": 1, **overrides})
