"""The backends and the choice between them. Nothing outside this package imports kt_kernel."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

import torch

from ..errors import KTAMXConfigError, KTAMXNotAvailableError
from ..shapes import ExpertShape
from ..system.cpu import ThreadPlan, affinity, cpu_features, physical_cores
from .base import Availability, ExpertsBackend, ExpertWeights
from .gpu.resident import gpu_backend
from .kt_kernel.operators import OPERATORS, shape_problem
from .kt_kernel.packed_files import PackedLayerFiles
from .torch_loop import TorchBackend

logger = logging.getLogger(__name__)

# The operators' scratch memory is global to the process: one call at a time, whatever the layer.
CALL_LOCK = threading.RLock()
if hasattr(os, "register_at_fork"):
    # A fork made while another thread computes: nobody would ever give the child's copy of the lock back.
    os.register_at_fork(after_in_child=CALL_LOCK._at_fork_reinit)  # type: ignore[attr-defined]


def kernel_availability() -> Availability:
    """Whether kt-kernel's SFT operators run on this machine."""
    from .kt_kernel import backend as kt_kernel

    return kt_kernel.availability()


# Measured on two AVX512-BF16 cores: a SmolLM2 step of 512 tokens takes 3.2 s so, 4.6 with the operators' one worker
# (the other core is lost to their queue thread, which spins); two DeepSeek-V2-Lite layers, 2,048 tokens, 4.8 and 8.9.
FEW_CORES = (
    "this process has two physical cores without AMX, which compute experts faster by PyTorch than by the operators; "
    "kt_num_threads=1 asks for the operators"
)
_ONE_THREAD = "PyTorch has one thread here, as OMP_NUM_THREADS=1 makes it: OMP_NUM_THREADS=2 uses both cores"


def choose_backend(
    requested: str,
    shape: ExpertShape,
    pools: int = 1,
    workers: int | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[str, str]:
    """The backend for `kt_backend`, and why. `auto` never quantises.

    Args:
        requested: The setting.
        shape: Of a layer's experts.
        pools: Of the operators' worker threads.
        workers: Their number, where the user has not set it.
        dtype: The model's; None for bf16.

    Raises:
        KTAMXNotAvailableError: A backend was asked for by name that does not run here.
        KTAMXConfigError: A backend was asked for by name that cannot compute experts of this shape in so many pools.
    """
    if requested == "torch":
        return "torch", "asked for"
    from .kt_kernel import backend as kt_kernel

    name = "AMXBF16" if requested == "auto" else requested
    available = kt_kernel.availability()
    problem = shape_problem(shape, pools, name) if available.ok else None
    if requested == "auto":
        if not available.ok:
            return "torch", available.reason
        if problem:
            return "torch", f"kt-kernel's operators cannot compute these experts: {problem}"
        # By the machine, whatever OMP_NUM_THREADS says (torchrun sets it to 1). Not where a control group leaves two
        # cores of many: PyTorch would start as many threads as there are.
        two = workers == 1 and len(physical_cores(affinity())) == 2
        if two and dtype in (None, torch.bfloat16) and not cpu_features().amx:
            threads = torch.get_num_threads()
            return "torch", FEW_CORES if threads > 1 else f"{FEW_CORES}; {_ONE_THREAD}"
        return name, available.reason
    if not available.ok:
        raise KTAMXNotAvailableError(
            f"kt_backend={requested} cannot run: {available.reason}. kt_backend=torch runs on any machine "
            "(kt_backend=auto picks by itself)."
        )
    if problem:
        other = [o.name for o in OPERATORS.values() if o.multiple < OPERATORS[name].multiple]
        fitting = [f"kt_backend={o}" for o in other if not shape_problem(shape, pools, o)]
        raise KTAMXConfigError(
            f"kt_backend={requested}: {problem}. "
            + (f"{' and '.join(fitting)} can compute them; " if fitting else "")
            + "kt_backend=torch takes any shape."
        )
    return requested, available.reason


def build_backend(
    name: str,
    weights: ExpertWeights | PackedLayerFiles,
    shape: ExpertShape,
    rank: int,
    plan: ThreadPlan,
    max_len: int,
    share_backward: bool,
    share_cache: bool,
    label: str,
) -> ExpertsBackend:
    """Build the backend `name` around a layer's weights, which it takes over: it empties `weights` when it copies.

    Saved weights are for AMXInt8 and AMXInt4 alone.
    """
    if name == "torch":
        if isinstance(weights, PackedLayerFiles):
            raise KTAMXConfigError(f"{label}: kt_backend=torch cannot load weights saved for kt-kernel's operators.")
        return gpu_backend(weights, shape) if weights.gate_up.is_cuda else TorchBackend(weights, shape)
    from .kt_kernel import backend as kt_kernel

    return kt_kernel.KTKernelBackend(weights, shape, rank, plan, max_len, share_backward, share_cache, label, name)


def quantize_layer(
    name: str, weights: ExpertWeights, shape: ExpertShape, plan: ThreadPlan, folder: Path, backward: bool, label: str
) -> PackedLayerFiles:
    """Quantise a layer's weights, which are emptied, and write them to the new folder `folder`.

    Args:
        name: AMXInt8 or AMXInt4.
        backward: Also write the weights for backward, as much again; without them they are made at each backward.

    Raises:
        KTAMXNotAvailableError, KTAMXConfigError: As `choose_backend`.
        OSError: The disk is full, or cannot be written to.
    """
    from .kt_kernel import backend as kt_kernel

    with CALL_LOCK:
        backend = kt_kernel.KTKernelBackend(
            weights, shape, 0, plan, 1, not backward, True, label, name, save_to=folder
        )  # fmt: skip
        del backend  # its memory is for the next layer
    return PackedLayerFiles(folder, backward)


def describe_cpu() -> str:
    """One line about the CPU, for messages."""
    features = cpu_features()
    has = [name for name, here in (("AMX", features.amx), ("AVX512-BF16", features.avx512_bf16)) if here]
    return f"{features.name} ({', '.join(has) or ('AVX2 only' if features.avx2 else 'no AVX2')})"
