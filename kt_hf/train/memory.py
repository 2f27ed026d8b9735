"""How much memory a run will take, from its configuration alone, and what can be done where it is too much."""

from __future__ import annotations

import dataclasses

from ..backends import shape_problem
from ..errors import KTAMXConfigError
from .activation_memory import expert_activations
from .config.settings import TrainSettings
from .memory_parts import GIB, Estimate, backend, parts_of, saved_without_backward, shape_of
from .model_sizes import ModelSizes

_FAR = 1.25


def estimate(
    settings: TrainSettings, sizes: ModelSizes, kernel: bool, gpu: bool, host_free: int | None, gpu_free: int | None
) -> Estimate:
    """The memory of a training run at its peak.

    Args:
        settings: What is to be run.
        sizes: Of its model.
        kernel: Whether kt-kernel's operators compute the experts, else PyTorch.
        gpu: Whether all but the experts is on a GPU.
        host_free: Memory the process may take; None leaves the question open, and backward weights unshared.
        gpu_free: Likewise of the GPU.
    """
    memory = parts_of(settings, sizes, kernel, gpu, host_free, gpu_free)
    memory.host_free, memory.gpu_free = host_free, gpu_free if gpu else None
    memory.host_total_otherwise = _otherwise(settings, sizes, kernel, gpu, gpu_free, memory)
    fitting = None if memory.fits or not gpu else _fitting_batch(settings, sizes, kernel, gpu_free)
    memory.advice = [] if memory.fits else _advice(settings, memory, kernel, fitting)
    return memory


def check_gpu(memory: Estimate) -> None:
    """Refuse a run for which the GPU is too small by far, wherever experts are.

    Estimates are within a tenth of what was measured; a quarter more than there is runs out of memory.

    Args:
        memory: Of the run.

    Raises:
        KTAMXConfigError: Naming what is needed, what is there, and what would fit.
    """
    if memory.gpu_free is not None and memory.gpu_total > _FAR * memory.gpu_free:
        raise KTAMXConfigError(f"The GPU is too small for this run ({in_words(memory)}): {'; '.join(memory.advice)}.")


def _fitting_batch(s: TrainSettings, m: ModelSizes, kernel: bool, gpu_free: int | None) -> int | None:
    """The first of a half of the batch, a quarter and so on that fits on the GPU; None if none does."""
    batch = s.trainer.get("per_device_train_batch_size", 8)
    while (batch := batch // 2) > 0:
        smaller = dataclasses.replace(s, trainer={**s.trainer, "per_device_train_batch_size": batch})
        if gpu_free is not None and parts_of(smaller, m, kernel, True, None, gpu_free).gpu_total <= gpu_free:
            return batch
    return None


def _otherwise(
    s: TrainSettings, m: ModelSizes, kernel: bool, gpu: bool, gpu_free: int | None, memory: Estimate
) -> int | None:
    """Host memory with the other choice of kt_share_backward_weights; None where there is none."""
    free = s.kt.kt_share_backward_weights is None and not saved_without_backward(s)
    if not free or not memory.host.get("backward copies"):
        return None
    kt = dataclasses.replace(s.kt, kt_share_backward_weights=not memory.shared_backward)
    return parts_of(dataclasses.replace(s, kt=kt), m, kernel, gpu, None, gpu_free).host_total


def in_words(memory: Estimate) -> str:
    """One line: what is needed at most, and what is free."""
    host = f"{memory.host_total / GIB:.1f} GiB of host memory"
    free = f", {memory.host_free / GIB:.1f} free" if memory.host_free is not None else ""
    gpu = f"; {memory.gpu_total / GIB:.1f} GiB on the GPU" if memory.gpu else ""
    gpu_free = f", {memory.gpu_free / GIB:.1f} free" if memory.gpu_free is not None else ""
    return f"at most {host}{free}{gpu}{gpu_free}"


def _quantized_advice(s: TrainSettings, e: Estimate) -> str | None:
    if e.sizes is None or backend(s) != "AMXBF16" or not e.host["experts packed"]:
        return None
    if shape_problem(shape_of(e.sizes), backend="AMXInt8"):
        return None
    saved = (e.host["experts packed"] + e.host["backward copies"]) // 2
    return f"kt_backend: AMXInt8 saves {saved / GIB:.1f} GiB of host memory (experts quantised, a few percent of error)"


def _advice(s: TrainSettings, e: Estimate, kernel: bool, fitting: int | None) -> list[str]:
    """Settings that would save memory where it is short, the most harmless first.

    `fitting` is a smaller batch that the GPU has room for, None if it has for none or is not short.
    """
    advice = []
    host_short = e.host_free is not None and e.host_total > e.host_free
    if host_short and kernel and s.run.use_kt:
        if not e.shared_backward and e.host["backward copies"]:
            saved = e.host["backward copies"] * (1 - 1 / e.sizes.expert_layers if e.sizes else 0)
            advice.append(
                f"kt_share_backward_weights: true saves {saved / GIB:.1f} GiB of host memory (slower backward)"
            )
        quantized = _quantized_advice(s, e)
        if quantized:
            advice.append(quantized)
        if s.kt.kt_expert_activations != "recompute" and s.checkpointing and e.sizes:
            less = expert_activations(s, e.sizes, e.tokens, kernel) * (1 - 1 / e.sizes.expert_layers)
            advice.append(f"kt_expert_activations: recompute saves up to {less / GIB:.1f} GiB of host memory")
    if not s.checkpointing:
        advice.append("gradient checkpointing (leave out disable_gradient_checkpointing) saves activations")
    batch = s.trainer.get("per_device_train_batch_size", 8)
    if fitting is not None:
        advice.insert(0, f"per_device_train_batch_size: {fitting} fits on the GPU")
    elif batch > 1:
        advice.append(f"per_device_train_batch_size: 1, gradient_accumulation_steps: {batch} times as many")
    advice.append("a smaller cutoff_len saves activations and logits, a smaller lora_rank the optimizer")
    if host_short and s.run.use_kt and e.host_free is not None:
        need = e.host["experts packed"] if "experts packed" in e.host else e.host["experts"]
        if need > e.host_free:
            smaller = [line for line in advice if "AMXInt8" in line and need / 2 <= e.host_free]
            advice = smaller or [
                f"the experts alone need {need / GIB:.0f} GiB of host memory: take a larger machine or a smaller model"
            ]
    return advice
