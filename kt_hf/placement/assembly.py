"""From settings and a model's sizes to the `Packer` that builds its layers' backends."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..backends import FEW_CORES, choose_backend, describe_cpu
from ..config import KTConfig
from ..errors import KTAMXConfigError
from ..experts import kt_layers
from ..quantized import for_run
from ..shapes import ExpertShape, expert_bytes
from ..system import gpu as experts_gpu
from ..system.cpu import plan_threads
from .packer import Packer
from .planner import MemoryBudget
from .tiers import Tiers, asked_for, check_tiers, field_of

logger = logging.getLogger(__name__)


def chosen_tiers(
    config: KTConfig, shapes: Sequence[ExpertShape], backend: str, gpu: torch.device | None
) -> Tiers | None:
    """How many experts of each of these layers are in which tier, the CPU's computed by `backend`; None if that is to
    be planned.

    Raises:
        KTAMXConfigError: There is no GPU for them, or the numbers do not fit the layers or the other settings.
    """
    tiers = asked_for(config, shapes, gpu is not None)
    if tiers is None or not tiers.on_gpu:
        return tiers
    field = field_of(config)
    nothing = "set it to 0" if config.kt_expert_placement is None else "set it to auto"
    if config.kt_weight_path is not None:
        raise KTAMXConfigError(
            f"{field} does not go together with kt_weight_path: saved experts are packed for the CPU. Leave one out."
        )
    if gpu is None:
        raise KTAMXConfigError(f"{field} needs a CUDA GPU, and there is none here: leave it out, or {nothing}.")
    check_tiers(tiers, config, shapes, backend != "torch")
    return tiers


def packer_of(model: nn.Module) -> Packer | None:
    """What built the backends of a patched model; None of a model that is not patched."""
    layers = kt_layers(model)
    factory = layers[0].factory if layers else None
    return factory if isinstance(factory, Packer) else None


def make_packer(
    cfg: KTConfig,
    shapes: Mapping[str, ExpertShape],
    dtype: torch.dtype,
    streamed: bool = False,
    model_type: str | None = None,
) -> Packer:
    """Choose the backend for layers of these shapes, and tell which.

    Args:
        cfg: Settings.
        shapes: Of all layers, by the names of their experts modules.
        dtype: The model's.
        streamed: The weights are not in memory yet.
        model_type: Of the model's configuration; saved weights (`kt_weight_path`) of another are refused.

    Raises:
        KTAMXConfigError: Settings or saved weights that do not fit the model.
        KTAMXNotAvailableError: A backend asked for by name that does not run here.
        KTAMXError: Saved weights of which a file is missing or damaged.
    """
    threads = plan_threads(cfg.kt_num_threads, cfg.kt_tp_enabled)
    saved = None
    if cfg.kt_weight_path is not None:
        saved = for_run(cfg.kt_weight_path, cfg.kt_backend, cfg.kt_lora_rank)
    workers = threads.workers if cfg.kt_num_threads is None else None
    chosen = {choose_backend(cfg.kt_backend, shape, len(threads.pools), workers, dtype) for shape in shapes.values()}
    backend, reason = sorted(chosen, key=lambda c: c[0] != "torch")[0]
    if saved is not None:
        saved.check(shapes, backend, len(threads.pools), cfg.kt_share_backward_weights, model_type)
    gpu = experts_gpu.experts_device()
    tiers = chosen_tiers(cfg, list(shapes.values()), backend, gpu)
    size = sum(expert_bytes(shape) * shape.num_experts for shape in shapes.values())
    packer = Packer(cfg, backend, reason, threads, size, tiers, streamed, saved, gpu)
    logger.info(
        "kt_hf: %d layers of experts on backend %s (%s), %s, %s.",
        len(shapes), backend, reason, threads if backend != "torch" else "PyTorch's threads", describe_cpu(),
    )  # fmt: skip
    if cfg.kt_backend == "auto" and backend == "torch" and reason != FEW_CORES:
        logger.warning("kt_hf: experts are computed by PyTorch (backend torch), because %s.", reason)
    return packer


def memory_budget(model: nn.Module, config: Any, tokens: int | None, dtype: torch.dtype | None = None) -> MemoryBudget:
    """What a planned placement goes by, of a model that has its weights or is yet to get them in `dtype`."""
    text = config.get_text_config()
    rest = [p for name, p in model.named_parameters() if ".experts." not in name and not p.is_cuda]
    experts_dtype = dtype or next((p.dtype for name, p in model.named_parameters() if ".experts." in name), None)
    size = sum(p.numel() * (dtype.itemsize if dtype else p.element_size()) for p in rest)
    return MemoryBudget(
        tokens, size, getattr(text, "num_hidden_layers", 0), getattr(text, "vocab_size", 0), experts_dtype
    )
