"""The choice of a backend, and its construction."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ..errors import KTAMXConfigError
from ..shapes import ExpertShape
from ..system.cpu import ThreadPlan, affinity, cpu_features, physical_cores
from .base import CALL_LOCK, Availability, ExpertsBackend, ExpertWeights
from .gpu.resident import gpu_backend
from .kt_kernel import installation
from .kt_kernel.backend import KTKernelBackend
from .kt_kernel.operators import OPERATORS, check_rank, check_shape, shape_problem
from .kt_kernel.packed_files import PackedLayerFiles
from .packed import PackedMatrices
from .torch_loop import TorchBackend

# Measured on two AVX512-BF16 cores: a SmolLM2 step of 512 tokens takes 3.2 s so, 4.6 with the operators' one worker
# (the other core is lost to their queue thread, which spins); two DeepSeek-V2-Lite layers, 2,048 tokens, 4.8 and 8.9.
FEW_CORES = (
    "this process has two physical cores without AMX, which compute experts faster by PyTorch than by the operators; "
    "kt_num_threads=1 asks for the operators"
)
"""Why `auto` takes PyTorch on two cores without AMX, as the log says it."""
# Tokens of an expert up to which MXFP4's operators are as fast as PyTorch on two cores of AVX2 (docs/low-bit.md): their
# time grows with rows, PyTorch's is mostly that of weights. A call of unknown length is taken to be of `_TOKENS`.
_MXFP4_ROWS, _TOKENS = 128, 2_048
_ONE_THREAD = "PyTorch has one thread here, as OMP_NUM_THREADS=1 makes it: OMP_NUM_THREADS=2 uses both cores"


def kernel_availability(backend: str = "AMXBF16") -> Availability:
    """Whether kt-kernel's SFT operators run on this machine, and why or why not.

    Args:
        backend: The value of `kt_backend` that asks for them: MXFP4 runs where the others do not.
    """
    return installation.availability(backend)


def choose_backend(
    requested: str,
    shape: ExpertShape,
    pools: int = 1,
    workers: int | None = None,
    dtype: torch.dtype | None = None,
    rank: int | None = None,
    stored: Sequence[PackedMatrices] = (),
    tokens: int | None = None,
) -> tuple[str, str]:
    """The name of the backend for a value of `kt_backend`, and the reason in words. `auto` never quantizes.

    Args:
        requested: The value of `kt_backend`.
        shape: Sizes of a layer's experts.
        pools: Number of pools of the operators' worker threads.
        workers: Number of worker threads that was planned; None where the user has set it.
        dtype: The model's dtype; None for bf16.
        rank: LoRA rank; None if it is not known yet.
        stored: How the checkpoint stores experts of low bits: a matrix of each kind; none for bf16.
        tokens: Of a forward in training; None if unknown.

    Raises:
        KTAMXNotAvailableError: A backend was asked for by name that does not run here.
        KTAMXConfigError: A backend was asked for by name that cannot compute experts of this shape in `pools` pools, or
            LoRA of this rank.
    """
    if requested == "torch":
        return "torch", "asked for"
    if requested != "auto":
        available = installation.check_available(requested)
        check_shape(shape, pools, requested)
        check_rank(rank, requested)
        return requested, available.reason
    available = installation.availability()
    if not available.ok:
        if keeps_packed("MXFP4", stored) and _mxfp4_alone(shape, pools):
            rows = (tokens or _TOKENS) * shape.top_k / shape.num_experts
            if rows <= _MXFP4_ROWS:
                return "MXFP4", "the checkpoint is in MXFP4 and is computed as it is; " + available.reason
            faster = f"{rows:.0f} tokens an expert are faster so than by MXFP4, which takes less memory"
            return "torch", f"{available.reason}; {faster} (kt_backend=MXFP4)"
        return "torch", available.reason
    if problem := shape_problem(shape, pools):
        return "torch", f"kt-kernel's operators cannot compute these experts: {problem}"
    # By the machine, whatever OMP_NUM_THREADS says (torchrun sets it to 1). Not where a control group leaves two
    # cores of many: PyTorch would start as many threads as there are.
    two = workers == 1 and len(physical_cores(affinity())) == 2
    if two and dtype in (None, torch.bfloat16) and not cpu_features().amx:
        threads = torch.get_num_threads()
        return "torch", FEW_CORES if threads > 1 else f"{FEW_CORES}; {_ONE_THREAD}"
    return "AMXBF16", available.reason


def keeps_packed(backend: str, stored: Sequence[PackedMatrices]) -> bool:
    """Whether a backend on the CPU computes with experts as their checkpoint stores them, without rounding.

    Args:
        backend: The name of a backend.
        stored: A matrix of each kind that there is.
    """
    operators = OPERATORS.get(backend)
    return operators is not None and bool(stored) and all(operators.takes(matrix) for matrix in stored)


def _mxfp4_alone(shape: ExpertShape, pools: int) -> bool:
    """Whether MXFP4's operators run where those in bf16 do not (AVX2)."""
    return installation.availability("MXFP4").ok and shape_problem(shape, pools, "MXFP4") is None


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
    """Build a backend around a layer's weights, which it takes over.

    Args:
        name: "torch", or a key of `OPERATORS`.
        weights: gate_up [E, 2I, H] and down [E, H, I]; the operators copy and empty them. Or the files of packed
            weights, for AMXInt8 and AMXInt4 alone.
        shape: The layer's sizes.
        rank: LoRA rank that the operators are built for; 0 without LoRA. PyTorch takes any rank later.
        plan: Worker threads of the operators.
        max_len: The most tokens in a call of the operators.
        share_backward: One buffer of backward weights for all layers instead of one a layer (operators only).
        share_cache: One saved forward for all layers instead of one a layer (operators only).
        label: The layer's name, for messages.

    Raises:
        KTAMXConfigError: Weights, sizes or settings that the backend cannot take.
        KTAMXNotAvailableError: The operators do not run on this machine.
    """
    if name == "torch":
        if isinstance(weights, PackedLayerFiles):
            raise KTAMXConfigError(f"{label}: kt_backend=torch cannot load weights saved for kt-kernel's operators.")
        if weights.low_bit is not None:
            device, dtype = weights.gate_up.device, weights.gate_up.dtype
            weights = weights.wide(range(shape.num_experts), device, dtype)
        return gpu_backend(weights, shape) if weights.gate_up.is_cuda else TorchBackend(weights, shape)
    return KTKernelBackend(weights, shape, rank, plan, max_len, share_backward, share_cache, label, name)


def quantize_layer(
    name: str, weights: ExpertWeights, shape: ExpertShape, plan: ThreadPlan, folder: Path, backward: bool, label: str
) -> PackedLayerFiles:
    """Quantize a layer's weights and write them packed to a new folder.

    Args:
        name: AMXInt8 or AMXInt4.
        weights: gate_up [E, 2I, H] and down [E, H, I]; they are emptied.
        shape: The layer's sizes.
        plan: Worker threads; each expert is split over its pools.
        folder: The folder to write, which must not exist.
        backward: Also write the weights for backward, as much again; without them they are made at each backward.
        label: The layer's name, for messages.

    Raises:
        KTAMXNotAvailableError: The operators do not run on this machine.
        KTAMXConfigError: The operators cannot take experts of these sizes.
        OSError: The disk is full, or cannot be written to.
    """
    with CALL_LOCK:
        backend = KTKernelBackend(weights, shape, 0, plan, 1, not backward, True, label, name, save_to=folder)
        del backend  # its memory is for the next layer
    return PackedLayerFiles(folder, backward)


def describe_cpu() -> str:
    """One line about the CPU, for messages."""
    features = cpu_features()
    instructions = {"AMX": features.amx, "AVX512-BF16": features.avx512_bf16}
    present = [name for name, has in instructions.items() if has]
    return f"{features.name} ({', '.join(present) or ('AVX2 only' if features.avx2 else 'no AVX2')})"
