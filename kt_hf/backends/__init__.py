"""The backends and the choice between them. Nothing outside this package imports kt_kernel."""

from __future__ import annotations

import logging
import os
import threading

from ..cpu import ThreadPlan, cpu_features
from ..errors import KTAMXConfigError, KTAMXNotAvailableError
from .base import (
    LORA_NAMES,
    Availability,
    ExpertsBackend,
    ExpertShape,
    ExpertWeights,
    Gradients,
    Saved,
)
from .torch_cuda import gpu_backend
from .torch_grouped import TorchBackend

logger = logging.getLogger(__name__)

# The operators' scratch memory is global to the process: one call at a time, whatever the layer.
CALL_LOCK = threading.RLock()
if hasattr(os, "register_at_fork"):
    # A fork made while another thread computes: nobody would ever give the child's copy of the lock back.
    os.register_at_fork(after_in_child=CALL_LOCK._at_fork_reinit)  # type: ignore[attr-defined]

__all__ = [
    "CALL_LOCK",
    "LORA_NAMES",
    "Availability",
    "ExpertShape",
    "ExpertWeights",
    "ExpertsBackend",
    "Gradients",
    "Saved",
    "TorchBackend",
    "choose_backend",
    "kernel_availability",
    "pack",
]


def kernel_availability() -> Availability:
    """Whether kt-kernel's bf16 SFT operators run on this machine."""
    from . import kt_kernel

    return kt_kernel.availability()


def choose_backend(requested: str, shape: ExpertShape) -> tuple[str, str]:
    """The backend for `kt_backend`, and why.

    Raises:
        KTAMXNotAvailableError: A backend was asked for by name that does not run here.
        KTAMXConfigError: A backend was asked for by name that cannot compute experts of this shape.
    """
    if requested == "torch":
        return "torch", "asked for"
    if requested in ("AMXInt8", "AMXInt4"):
        raise KTAMXNotAvailableError(f"kt_backend={requested} is not available yet: use AMXBF16, torch or auto.")
    from . import kt_kernel

    available = kt_kernel.availability()
    problem = kt_kernel.shape_problem(shape) if available.ok else None
    if requested == "auto":
        if not available.ok:
            return "torch", available.reason
        if problem:
            return "torch", f"kt-kernel's operators cannot compute these experts: {problem}"
        return "AMXBF16", available.reason
    if not available.ok:
        raise KTAMXNotAvailableError(
            f"kt_backend={requested} cannot run: {available.reason}. kt_backend=torch runs on any machine "
            "(kt_backend=auto picks by itself)."
        )
    if problem:
        raise KTAMXConfigError(f"kt_backend={requested}: {problem}. kt_backend=torch takes any shape.")
    return requested, available.reason


def pack(
    name: str,
    weights: ExpertWeights,
    shape: ExpertShape,
    rank: int,
    plan: ThreadPlan,
    max_len: int,
    share_backward: bool,
    share_cache: bool,
    label: str,
) -> ExpertsBackend:
    """Build the backend `name` around a layer's weights, which it takes over: it empties `weights` when it copies."""
    if name == "torch":
        return gpu_backend(weights, shape) if weights.gate_up.is_cuda else TorchBackend(weights, shape)
    from . import kt_kernel

    return kt_kernel.KTKernelBackend(weights, shape, rank, plan, max_len, share_backward, share_cache, label)


def describe_cpu() -> str:
    """One line about the CPU, for messages."""
    features = cpu_features()
    has = [name for name, here in (("AMX", features.amx), ("AVX512-BF16", features.avx512_bf16)) if here]
    return f"{features.name} ({', '.join(has) or ('AVX2 only' if features.avx2 else 'no AVX2')})"
