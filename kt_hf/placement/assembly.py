"""From settings and a model's sizes to the `Packer` that builds its layers' backends."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..backends import FEW_CORES, OPERATORS, choose_backend, describe_cpu
from ..backends.packed import PackedMatrices
from ..backends.quantizer import refuse_indivisible
from ..backends.registry import keeps_packed
from ..config import KTConfig
from ..errors import KTAMXConfigError
from ..experts import kt_layers
from ..quantized import for_run
from ..ranks import Ranks
from ..shapes import ExpertShape, expert_bytes
from ..system import gpu as experts_gpu
from ..system.cpu import cpu_features, plan_threads
from .choice import hint
from .expert_memory import resident_bytes
from .memory_model import MemoryBudget, inner_bytes
from .packer import Packer
from .tiers import Tiers, asked_for, check_tiers

logger = logging.getLogger(__name__)


def chosen_tiers(
    config: KTConfig, shapes: Sequence[ExpertShape], backend: str, gpu: torch.device | None
) -> Tiers | None:
    """How many experts of each layer are in which tier, as the settings say.

    Args:
        config: The settings.
        shapes: Of the model's layers.
        backend: What computes the experts on the CPU.
        gpu: The GPU for experts, if there is one.

    Returns:
        The tiers; None if they are to be planned.

    Raises:
        KTAMXConfigError: There is no GPU for them, or the numbers do not fit the layers or the other settings.
    """
    tiers = asked_for(config, shapes, gpu is not None)
    if tiers is not None:
        check_tiers(tiers, config, shapes, backend != "torch", gpu is not None)
    return tiers


def packer_of(model: nn.Module) -> Packer | None:
    """The `Packer` that built the backends of a patched model; None for a model that is not patched."""
    layers = kt_layers(model)
    factory = layers[0].factory if layers else None
    return factory if isinstance(factory, Packer) else None


def make_packer(
    cfg: KTConfig,
    shapes: Mapping[str, ExpertShape],
    dtype: torch.dtype,
    streamed: bool = False,
    model_type: str | None = None,
    ranks: Ranks | None = None,
    stored: Sequence[PackedMatrices] = (),
    tokens: int | None = None,
) -> Packer:
    """Choose the backend for layers of these shapes, and log which.

    Args:
        cfg: Settings.
        shapes: Of all layers, by the names of their experts modules; of the experts that this process owns.
        dtype: The model's.
        streamed: Whether the weights are read as they are packed, so that they are not in memory yet.
        model_type: Of the model's configuration; saved weights (`kt_weight_path`) of another are refused.
        ranks: The processes that the experts are divided among; None in a run of one.
        stored: How the checkpoint stores experts of low bits that can stay so: a matrix of each kind.
        tokens: Of a forward in training; None if unknown.

    Raises:
        KTAMXConfigError: Settings or saved weights that do not fit the model.
        KTAMXNotAvailableError: A backend asked for by name that does not run here.
        KTAMXError: Saved weights of which a file is missing or damaged.
    """
    for name, shape in shapes.items():
        refuse_indivisible(cfg.kt_expert_dtype, shape, name)
    threads = plan_threads(cfg.kt_num_threads, cfg.kt_tp_enabled)
    saved = None
    if cfg.kt_weight_path is not None and ranks is None:
        saved = for_run(cfg.kt_weight_path, cfg.kt_backend, cfg.kt_lora_rank)
    workers = threads.workers if cfg.kt_num_threads is None else None
    chosen = {
        choose_backend(cfg.kt_backend, shape, len(threads.pools), workers, dtype, cfg.kt_lora_rank, stored, tokens)
        for shape in shapes.values()
    }
    backend, reason = sorted(chosen, key=lambda c: c[0] != "torch")[0]
    if saved is not None:
        saved.check(shapes, backend, len(threads.pools), cfg.kt_share_backward_weights, model_type)
    gpu = experts_gpu.experts_device()
    tiers = _tiers_of_rank(cfg, list(shapes.values()), backend, gpu, ranks)
    size = sum(expert_bytes(shape) * shape.num_experts for shape in shapes.values())
    if gpu is not None and tiers == Tiers() and (line := hint(cfg, list(shapes.values()), cfg.kt_max_len or 2048)):
        logger.info("kt_hf: %s.", line)
    if gpu is not None and tiers != Tiers():
        experts_gpu.let_segments_grow(gpu)
    packer = Packer(cfg, backend, reason, threads, size, tiers, streamed, saved, gpu)
    packer.ranks = ranks
    packer.keeps_on_cpu = keeps_packed(backend, stored)
    _log_choice(packer, len(shapes))
    _log_slow_dtype(packer, dtype)
    return packer


def _tiers_of_rank(
    cfg: KTConfig, shapes: Sequence[ExpertShape], backend: str, gpu: torch.device | None, ranks: Ranks | None
) -> Tiers | None:
    """The tiers of the experts that this process owns: the settings are of a whole layer, as in a run of one process.

    Raises:
        KTAMXConfigError: As `chosen_tiers`; saved experts in a run of several processes.
    """
    if ranks is None:
        return chosen_tiers(cfg, shapes, backend, gpu)
    if cfg.kt_weight_path is not None:
        raise KTAMXConfigError(
            f"kt_weight_path={cfg.kt_weight_path}: saved experts are packed for one process, and there are "
            f"{ranks.size} (WORLD_SIZE). Leave it out: they are packed from the model's own weights."
        )
    whole = [replace(shape, num_experts=shape.num_experts * shape.ranks, ranks=1) for shape in shapes]
    tiers = chosen_tiers(cfg, whole, backend, gpu)
    if tiers is None:
        return None
    return tiers.of_rank(ranks.owners.size)


def _log_choice(packer: Packer, layers: int) -> None:
    cfg, backend, gpu = packer.config, packer.backend, packer.gpu
    if cfg.kt_expert_dtype != "bf16":
        where = gpu if gpu is not None and gpu.type == "cuda" else "the CPU, which takes a minute for each 1 B weights"
        logger.info("kt_hf: experts are quantized to %s on %s.", cfg.kt_expert_dtype, where)
        if packer.tiers == Tiers():
            logger.warning("kt_hf: the CPU computes experts of %s widened: no memory is saved.", cfg.kt_expert_dtype)
    fixed = OPERATORS[backend].shares_backward if backend in OPERATORS else None
    if fixed is not None and cfg.kt_share_backward_weights == (not fixed):
        logger.warning("kt_share_backward_weights=%s is ignored: %s cannot choose.", not fixed, backend)
    logger.info(
        "kt_hf: %d layers of experts on backend %s (%s), %s, %s.",
        layers, backend, packer.reason, packer.threads if backend != "torch" else "PyTorch's threads", describe_cpu(),
    )  # fmt: skip
    if cfg.kt_backend == "auto" and backend == "torch" and packer.reason != FEW_CORES:
        logger.warning("kt_hf: experts are computed by PyTorch (backend torch), because %s.", packer.reason)


def _log_slow_dtype(packer: Packer, dtype: torch.dtype) -> None:
    """Say that 16 bits are slow where PyTorch has to emulate their products (6 to 8 times fp32's time, torch 2.9)."""
    cpu = cpu_features()
    if packer.backend != "torch" or packer.gpu is not None or cpu.amx or cpu.avx512_bf16 or dtype == torch.float32:
        return
    logger.warning(
        "kt_hf: this CPU has no 16-bit products (AVX512-BF16, AMX), and a model in %s takes several times as long on "
        'it as one in float32. Load it with dtype="float32" if the memory suffices.',
        str(dtype).removeprefix("torch."),
    )


def check_rank_for_low_bits(packer: Packer, shapes: Sequence[ExpertShape]) -> None:
    """Refuse `kt_expert_dtype` where the operators are to pack experts at once, and the LoRA rank is not known.

    Args:
        packer: That has placed the experts.
        shapes: Of the layers.

    Raises:
        KTAMXConfigError: `kt_lora_rank` is missing.
    """
    config, tiers = packer.config, packer.tiers or Tiers()
    on_cpu = tiers.resident_layers < len(shapes) and any(tiers.on_cpu(shape.num_experts) for shape in shapes)
    if config.kt_expert_dtype != "bf16" and config.kt_lora_rank is None and packer.backend != "torch" and on_cpu:
        raise KTAMXConfigError(
            f"kt_lora_rank=None: with kt_expert_dtype={config.kt_expert_dtype!r} experts are packed for "
            f"{packer.backend} at once, which takes the LoRA rank. Give KTConfig(kt_lora_rank=...), the adapter's rank "
            "or more; 0 for inference."
        )


# What the run that loads a model knows of its steps, and a script that patches one does not tell.
_STEP: ContextVar[Mapping[str, Any]] = ContextVar("step", default={})  # noqa: B039


@contextlib.contextmanager
def training_as(budget: MemoryBudget) -> Iterator[None]:
    """While this is open, models are placed for a run with this budget's loss, checkpointing and the like.

    Args:
        budget: That of the run; the model's sizes in it are not used.
    """
    names = ("loss", "checkpointing", "offloading", "accumulating", "other_lora", "lora_layers")
    token = _STEP.set({name: getattr(budget, name) for name in names})
    try:
        yield
    finally:
        _STEP.reset(token)


def memory_budget(model: nn.Module, config: Any, tokens: int | None, dtype: torch.dtype | None = None) -> MemoryBudget:
    """Everything but expert weights that must fit on the GPU beside a planned placement.

    Nobody has told how the model will be trained, unless `training_as` has: it is taken to be a trainer that has the
    model compute its loss from all logits, and checkpoints.

    Args:
        model: With its weights, or on the meta device.
        config: The model's configuration.
        tokens: Of a forward in training; None if unknown.
        dtype: The dtype that a model without weights will have; None takes those of its parameters.
    """
    text = config.get_text_config()
    rest = [p for name, p in model.named_parameters() if ".experts." not in name and not p.is_cuda]
    experts_dtype = dtype or next((p.dtype for name, p in model.named_parameters() if ".experts." in name), None)
    size = sum(p.numel() * (dtype.itemsize if dtype else p.element_size()) for p in rest)
    layers = getattr(text, "num_hidden_layers", 0)
    inner = inner_bytes(getattr(text, "hidden_size", 0), linear_widths(model), layers)
    budget = MemoryBudget(tokens, size, layers, getattr(text, "vocab_size", 0), experts_dtype, inner_bytes=inner)
    return replace(budget, **_STEP.get())


def settle_step(model: nn.Module, tokens: int | None, **step: Any) -> None:
    """Choose again the device of the experts' LoRA, and whether their forward is kept for the recompute.

    Now a trainer says how steps are computed. Only `auto` is asked again: what seemed to lack room may have it by the
    loss that is really used, and longer steps may leave none. Before an optimizer is made for the parameters.

    Args:
        model: With adapters, and on the GPU as far as it goes there.
        tokens: Of a forward in training; None if unknown.
        **step: Fields of `MemoryBudget`: `loss`, `checkpointing`, `offloading`, `accumulating`.
    """
    packer, layers = packer_of(model), kt_layers(model)
    ranks = [rank for layer in layers for projection in layer.projections for rank in projection.r.values()]
    how = (tokens, max(ranks, default=0), *step.values())
    if packer is None or not ranks or packer.lora.settled == how:
        return
    lora, tiers = packer.lora.open, packer.tiers or Tiers()
    if not lora and not (packer.config.kt_expert_activations == "auto" and tiers.need_gpu):
        return
    packer.lora.settled = how
    if packer.promotion is not None:  # what an interrupted run has left on the GPU is not what LoRA lacks
        packer.promotion.release()
    config: Any = next(module.config for module in model.modules() if hasattr(module, "config"))
    before = packer.lora.budget
    budget = memory_budget(model, config, max(tokens or 0, before.tokens or 0) or None)
    others = [p for name, p in model.named_parameters() if p.requires_grad and ".experts." not in name]
    other_lora = sum(p.numel() for p in others)
    budget = replace(budget, **step, other_lora=other_lora, lora_layers=before.lora_layers, bits=before.bits)
    present = sum(p.nbytes for layer in layers for p in layer.parameters() if p.is_cuda)
    if all(layer.packed for layer in layers):
        largest = max((layer.owned_shape for layer in layers), key=expert_bytes)
        present += resident_bytes(largest, tiers, len(layers), budget.bits)
    packer.choose_again({layer.layer_idx: layer.owned_shape for layer in layers}, budget, max(ranks), present)
    for layer in layers:
        layer.keep_activations(packer.retains(layer.layer_idx))
        if not lora:
            continue
        on_gpu = packer.lora.on_gpu(max(ranks), layer.layer_idx)
        for projection in layer.projections:
            projection.place_lora(packer.gpu_device if on_gpu else None)


def linear_widths(model: nn.Module) -> list[tuple[int, int]]:
    """(inputs, outputs) of each linear layer in the model's layers but those of routed experts and adapters.

    Args:
        model: With its weights, or on the meta device.
    """
    layer, other = re.compile(r"\.layers\.\d+\."), re.compile(r"\.experts\.|\.lora_")
    return [
        (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and layer.search(name) and not other.search(name + ".")
    ]
