"""`apply_kt_moe`: find a model's routed experts, take their weights, put `KTExperts` in their place."""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .adapters import load_adapter, open_adapter
from .backends import KEPT, ExpertWeights, PackedLayerFiles
from .backends.quantizer import EXPERT_BITS
from .checkpoint.fingerprint import fingerprint
from .config import KTConfig, as_config
from .discovery import ExpertsSite, base_model, by_layer, find_experts, layer_index
from .errors import KTAMXConfigError, KTAMXError
from .experts import KTExperts, LoraParamsView, kt_layers
from .experts.calls import BY_CALL
from .experts.holders import ExpertLora
from .experts.listed import ListedExperts
from .experts.lora_tensors import watch_optimizers
from .experts.replicas import watch_steps
from .peft_compat.internals import PREFIX
from .peft_compat.saving import save_native_verified
from .peft_compat.stock_lora import unwrap_expert_parameters
from .placement.assembly import check_rank_for_low_bits, make_packer, memory_budget
from .placement.hosts import ranks_of_run
from .placement.order import Placement, as_placement, read_placement
from .placement.packer import Packer
from .ranks import Ranks, Share
from .shapes import ExpertShape
from .system.bitsandbytes_cpu import keep_trainable
from .system.parallel import refuse_parallel

logger = logging.getLogger(__name__)

# A layer's weights, of the experts that this process owns; and the fingerprint of the whole layer.
OwnedWeights = tuple[ExpertWeights | PackedLayerFiles, Tensor]


def apply_kt_moe(
    model: Any,
    cfg: KTConfig | Mapping[str, Any] | None = None,
    adapter: str | Path | None = None,
    placement: Placement | Mapping[int, Tensor] | str | Path | None = None,
    tokens_per_step: int | None = None,
) -> Any:
    """Patch a transformers MoE model in place: its routed experts are computed by a CPU backend from now on.

    Only the `experts` modules are replaced; router, shared experts and auxiliary losses stay the model's own. Their
    weights are taken over, not copied, and packed when the LoRA rank is known: at the first adapter, or at once with
    `kt_lora_rank`. The remaining parameters are frozen, for PEFT leaves that out when it meets layers of its own kind.
    Works before and after `get_peft_model`. A second call with the same settings changes nothing.

    Args:
        model: A transformers model, or a PeftModel around one.
        cfg: Settings, as a `KTConfig` or a mapping of its fields; the defaults without.
        adapter: Folder or safetensors file of an adapter to train on, of any format that `kt_hf.adapters` reads; the
            model then comes back as a PeftModel that has it.
        placement: Which experts go to the GPU first, where `kt_num_gpu_experts` or `kt_expert_placement` sends some:
            what `count_experts` gave, or the folder of an adapter that was trained so. Without it, the adapter's;
            without that, the first ones.
        tokens_per_step: Tokens of a forward in training, by which `kt_expert_placement="auto"` plans. None takes
            `kt_max_len`, or 2,048.

    Returns:
        The same model, with `_kt_wrappers` (its `KTExperts` in layer order), `_kt_cpu_infer` and `_kt_moe_lora_params`.

    Raises:
        KTAMXModelNotSupportedError: No experts that can be computed, naming what was found and why not.
        KTAMXConfigError: Settings that do not fit the model or the run (several processes, DataParallel).
        KTAMXNotAvailableError: A backend asked for by name that does not run here.
        KTAMXError: The adapter is damaged, or another base model's.
    """
    cfg = as_config(cfg)
    if not isinstance(model, nn.Module):
        load = "AutoModelForCausalLM.from_pretrained(…) loads one, load_kt_model(…) loads and patches it"
        raise KTAMXConfigError(f"model={model!r} is no model, but a {type(model).__name__}: {load}.")
    if adapter is not None:
        return _patched_with_adapter(model, cfg, adapter, placement, tokens_per_step)
    refuse_parallel(model)
    base = base_model(model)
    if kt_layers(model):
        return _already_patched(model, base, cfg)
    packer = _packer(model, base, cfg, as_placement(placement), tokens_per_step)
    lora_on_experts = unwrap_expert_parameters(model)
    if not any("lora_" in name for name, _ in model.named_parameters()) and not lora_on_experts:
        model.requires_grad_(False)
    saved = packer.saved
    layers = replace_experts(
        base,
        find_experts(model),
        packer,
        lambda site: owned_weights(site, packer, saved.layer(site.name) if saved else _take_weights(site)),
    )
    lora_on_experts.restore(layers)
    for layer in layers:
        layer.pack()
    return model


def _patched_with_adapter(
    model: nn.Module,
    cfg: KTConfig,
    adapter: str | Path,
    placement: Placement | Mapping[int, Tensor] | str | Path | None,
    tokens_per_step: int | None,
) -> Any:
    with open_adapter(
        adapter, base=getattr(model, "config", None)
    ):  # a damaged one is refused before the model is touched
        pass
    if placement is None and Path(adapter).is_dir():
        placement = read_placement(adapter)
    patched = apply_kt_moe(model, cfg, placement=placement, tokens_per_step=tokens_per_step)
    return load_adapter(patched, adapter)


def _packer(model: Any, base: Any, cfg: KTConfig, placement: Placement | None, tokens: int | None) -> Packer:
    """Check that model and settings go together, and decide where each expert goes; the model stays as it is."""
    sites = find_experts(model)
    ranks = ranks_of_run(cfg, [site.shape for site in sites])
    shapes = {site.name: owned_shape(site, ranks) for site in sites}
    packer = make_packer(cfg, shapes, base.dtype, model_type=base.config.model_type, ranks=ranks)
    budget = memory_budget(model, base.config, tokens)
    packer.place(by_layer(shapes), placement, replace(budget, bits=EXPERT_BITS[cfg.kt_expert_dtype]))
    check_rank_for_low_bits(packer, list(shapes.values()))
    if packer.saved is not None:
        packer.saved.check_model(model)
    return packer


def owned_shape(site: ExpertsSite, ranks: Ranks | None) -> ExpertShape:
    """Sizes of the part of a layer that this process owns.

    Raises:
        KTAMXConfigError: The layer's experts cannot be divided evenly among the ranks.
    """
    share = share_of(site, ranks)
    return site.shape if share is None else replace(site.shape, num_experts=share.count, ranks=share.ranks)


def share_of(site: ExpertsSite, ranks: Ranks | None) -> Share | None:
    """The experts of a layer that this process owns; None for all of them.

    Raises:
        KTAMXConfigError: The layer's experts cannot be divided evenly among the ranks.
    """
    if ranks is None:
        return None
    if site.form.call == "listed":
        raise KTAMXConfigError(
            f"{site.name}: a list of experts that their block calls one by one cannot be divided among processes "
            f"(WORLD_SIZE={ranks.size}): a process without tokens for any would not meet the others. Start one."
        )
    return Share.of(ranks.owners.index, ranks.owners.size, site.shape.num_experts, site.name)


def replace_experts(
    base: Any,
    sites: Iterable[ExpertsSite],
    packer: Packer,
    weights_of: Callable[[ExpertsSite], OwnedWeights],
) -> list[KTExperts]:
    """Put `KTExperts` in the place of each experts module of a model, one after the other.

    Also sets the model's `_kt_wrappers`, `_kt_moe_lora_params`, `_kt_cpu_infer` and `_kt_config`, has its
    `save_pretrained` refuse a checkpoint without experts, and its 4-bit layers on the CPU stay trainable.

    Args:
        base: The transformers model.
        sites: Its experts modules, in layer order.
        packer: Builds the layers' backends.
        weights_of: Gives a layer's weights, which are taken over, and its fingerprint.

    Returns:
        The new layers, in the same order.
    """
    if packer.backend != "torch":
        KEPT.warn_before_another_model()
    watch_optimizers()
    if packer.ranks is not None:
        watch_steps()
    keep_trainable(base)
    packer.on_build = functools.partial(_show_engine, weakref.ref(base))
    base._kt_cpu_infer = None
    layers = [_replace(site, index, packer, weights_of(site)) for index, site in enumerate(sites)]
    base._kt_wrappers = layers
    base._kt_moe_lora_params = LoraParamsView(layers)
    base._kt_config = packer.config
    _guard_save(base)
    if packer.ranks is not None:
        before = getattr(base, "_ddp_params_and_buffers_to_ignore", ())
        base._ddp_params_and_buffers_to_ignore = OwnedNames(base, before)
    return layers


class OwnedNames:
    """Names of the parameters that DDP must leave alone: LoRA of experts that one rank owns, and another does not have.

    Read when DDP is built, so that adapters made meanwhile are among them (TRL's `ref`); with and without what PEFT
    puts before a name, for DDP may be given the model or the PeftModel around it.

    Args:
        model: The patched transformers model; held weakly.
        others: Names that somebody else wants to be left alone.
    """

    def __init__(self, model: nn.Module, others: Iterable[str] = ()) -> None:
        self._model = weakref.ref(model)
        self._others = tuple(others)

    def __iter__(self) -> Iterator[str]:
        yield from self._others
        model = self._model()
        for name, module in model.named_modules() if model is not None else ():
            if isinstance(module, ExpertLora):
                yield f"{name}.weight"
                yield f"{PREFIX}{name}.weight"


def owned_weights(site: ExpertsSite, packer: Packer, weights: ExpertWeights | PackedLayerFiles) -> OwnedWeights:
    """The part of a layer's weights that this process owns, and the fingerprint of all.

    Args:
        site: The layer.
        packer: That will build its backend.
        weights: Of all experts.
    """
    mark, share = fingerprint(weights, packer.config.kt_expert_dtype), share_of(site, packer.ranks)
    if share is None:
        return weights, mark
    assert isinstance(weights, ExpertWeights)
    return weights.part(share.experts), mark


def _take_weights(site: ExpertsSite) -> ExpertWeights:
    if site.mlps is not None:
        return ExpertWeights(*site.mlps.stacked())
    gate_up, down, gate_up_bias, down_bias = site.form.taken(site.experts)
    return ExpertWeights(gate_up, down, gate_up_bias=gate_up_bias, down_bias=down_bias)


def _replace(site: ExpertsSite, index: int, packer: Packer, owned: OwnedWeights) -> KTExperts:
    """Put `KTExperts` in the place of one experts module, and let go of the module."""
    weights, mark = packer.stored(owned[0]), owned[1]
    kind, more = BY_CALL[site.form.call], dict[str, Any]()
    if site.form.call == "normed":
        more["post_expert_norm"] = site.experts.post_expert_norm
    ranks, share, label = packer.ranks, share_of(site, packer.ranks), site.name
    layer = kind(weights, site.shape, layer_index(label, index), label, packer, mark, share, ranks, **more)
    layer.train(site.experts.training)
    setattr(site.parent, site.attribute, layer)
    if site.plan is not None and isinstance(layer, ListedExperts):
        site.plan.install(site.parent, layer.calls)
        if site.plan.evaluates:
            _warn_of_evaluation(type(site.parent).__name__)
    site.experts = None  # its weights are released as they are packed
    if packer.config.kt_lora_rank is not None:
        layer.pack()
    return layer


@functools.cache
def _warn_of_evaluation(block: str) -> None:
    """Say once for a class of blocks what is lost by running it as in evaluation."""
    logger.warning(
        "kt_hf: %s computes its experts without gradients in training, so it is run as in evaluation: what it adds in "
        "training alone, an auxiliary loss of its router for one, is left out.", block,
    )  # fmt: skip


def _already_patched(model: Any, base: Any, cfg: KTConfig) -> Any:
    before = getattr(base, "_kt_config", None)
    if before != cfg:
        raise KTAMXConfigError(f"The model is patched already, with {before}. Load it anew to patch it with {cfg}.")
    logger.info("kt_hf: the model is patched already.")
    return model


def _show_engine(base: weakref.ref[Any], built: Any) -> None:
    model = base()
    if model is not None:
        model._kt_cpu_infer = getattr(built, "engine", None)


def _guard_save(base: Any) -> None:
    """`save_pretrained` of a patched model would write a checkpoint without expert weights and say nothing."""
    if not hasattr(base, "save_pretrained"):
        return
    reference = weakref.ref(base)  # a strong one would keep the weights of a deleted model until garbage is collected

    def save_pretrained(*args: Any, **kwargs: Any) -> Any:
        model: Any = reference()
        if getattr(model, "_hf_peft_config_loaded", False):  # model.add_adapter: what is saved is the adapter
            return save_native_verified(type(model).save_pretrained, model, *args, **kwargs)
        raise KTAMXError(
            "A patched model without an adapter cannot be saved: its experts are packed and would be missing from the "
            "checkpoint. Train with a LoRA adapter (get_peft_model or the trainer's peft_config, from kt_lora_config) "
            "and save that; the base model is where you loaded it from."
        )

    base.save_pretrained = save_pretrained
