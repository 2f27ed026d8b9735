"""`apply_kt_moe`: find a model's routed experts, take their weights, put `KTExperts` in their place."""

from __future__ import annotations

import functools
import logging
import os
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .adapters import load_adapter, open_adapter
from .adapters.save import save_native_verified
from .backends import ExpertShape, ExpertWeights, choose_backend, describe_cpu
from .config import KTConfig
from .cpu import plan_threads
from .errors import KTAMXConfigError, KTAMXError, KTAMXModelNotSupportedError
from .experts import KTExperts, LoraParamsView, kt_layers, watch_optimizers
from .packing import Packer

logger = logging.getLogger(__name__)

_SILU = ("SiLU", "SiLUActivation")
# What the families call the number of experts a token is sent to.
_TOP_K_NAMES = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k")


def apply_kt_moe(model: Any, cfg: KTConfig | None = None, adapter: str | Path | None = None) -> Any:
    """Patch a transformers MoE model in place: its routed experts are computed by a CPU backend from now on.

    Only the `experts` modules are replaced; router, shared experts and auxiliary losses stay the model's own. Their
    weights are taken over, not copied, and packed when the LoRA rank is known: at the first adapter, or at once with
    `kt_lora_rank`. The remaining parameters are frozen, for PEFT leaves that out when it meets layers of its own kind.
    Works before and after `get_peft_model`. A second call with the same settings changes nothing.

    Args:
        model: A transformers model, or a PeftModel around one.
        cfg: Settings; the defaults without.
        adapter: Folder or safetensors file of an adapter to train on, of any format that `kt_hf.adapters` reads; the
            model then comes back as a PeftModel that has it.

    Returns:
        The same model, with `_kt_wrappers` (its `KTExperts` in layer order), `_kt_cpu_infer` and `_kt_moe_lora_params`.

    Raises:
        KTAMXModelNotSupportedError: No experts that can be computed, naming what was found and why not.
        KTAMXConfigError: Settings that do not fit the model or the run (several processes, DataParallel).
        KTAMXNotAvailableError: A backend asked for by name that does not run here.
        KTAMXError: The adapter is damaged, or another base model's.
    """
    if adapter is not None:
        with open_adapter(adapter):  # a damaged one is refused before the model is touched
            pass
        return load_adapter(apply_kt_moe(model, cfg), adapter)
    cfg = cfg or KTConfig()
    _refuse_parallel(model)
    base = _base_model(model)
    if kt_layers(model):
        return _already_patched(model, base, cfg)
    from . import peft_compat

    peft_compat.install()
    found = _find_experts(model)
    shapes = [_shape(base, parent, experts, name) for name, parent, _, experts in found]
    chosen = {choose_backend(cfg.kt_backend, shape) for shape in shapes}
    backend, reason = sorted(chosen, key=lambda c: c[0] != "torch")[0]
    if cfg.kt_weight_path is not None or cfg.kt_num_gpu_experts:
        field = "kt_weight_path" if cfg.kt_weight_path is not None else "kt_num_gpu_experts"
        raise KTAMXConfigError(f"{field}={getattr(cfg, field)!r} is not supported yet: leave it out.")
    sizes = [3 * s.num_experts * s.hidden_size * s.intermediate_size * 2 for s in shapes]
    packer = Packer(cfg, backend, reason, plan_threads(cfg.kt_num_threads, cfg.kt_tp_enabled), sum(sizes), max(sizes))
    logger.info(
        "kt_hf: %d layers of experts on backend %s (%s), %s, %s.",
        len(found), backend, reason, packer.plan if backend != "torch" else "PyTorch's threads", describe_cpu(),
    )  # fmt: skip
    if cfg.kt_backend == "auto" and backend == "torch":
        logger.warning("kt_hf: experts are computed by PyTorch (backend torch), because %s.", reason)

    wrapped = peft_compat.unwrap_expert_parameters(model)
    if not any("lora_" in name for name, _ in model.named_parameters()) and not wrapped:
        model.requires_grad_(False)
    found = _find_experts(model) if wrapped else found
    layers = [
        _replace(place, shape, index, packer) for index, (place, shape) in enumerate(zip(found, shapes, strict=True))
    ]
    watch_optimizers()
    packer.on_pack = functools.partial(_show_engine, weakref.ref(base))
    base._kt_cpu_infer = None
    base._kt_wrappers = layers
    base._kt_moe_lora_params = LoraParamsView(layers)
    base._kt_config = cfg
    _guard_save(base)
    wrapped.restore(layers)
    for layer in layers:
        layer.pack()
    return model


def _replace(place: list[Any], shape: ExpertShape, index: int, packer: Packer) -> KTExperts:
    """Put `KTExperts` in the place of one experts module, and let go of the module."""
    name, parent, attribute, experts = place
    weights = ExpertWeights(experts.gate_up_proj.detach(), experts.down_proj.detach())
    layer = KTExperts(weights, shape, _layer_index(name, index), name, packer)
    layer.train(experts.training)
    setattr(parent, attribute, layer)
    place.clear()
    del experts  # its weights are released as they are packed
    if packer.config.kt_lora_rank is not None:
        layer.pack()
    return layer


def _refuse_parallel(model: nn.Module) -> None:
    if isinstance(model, nn.DataParallel):
        raise KTAMXConfigError("nn.DataParallel cannot hold experts that live on the CPU: pass the model inside it.")
    world = int(os.environ.get("WORLD_SIZE") or 1)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        world = max(world, torch.distributed.get_world_size())
    if world > 1:
        raise KTAMXConfigError(
            f"WORLD_SIZE={world}: experts on the CPU cannot be shared by several processes yet. Start one process "
            "(accelerate launch --num_processes 1, or plain python)."
        )


def _base_model(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _already_patched(model: Any, base: Any, cfg: KTConfig) -> Any:
    before = getattr(base, "_kt_config", None)
    if before != cfg:
        raise KTAMXConfigError(f"The model is patched already, with {before}. Load it anew to patch it with {cfg}.")
    logger.info("kt_hf: the model is patched already.")
    return model


def _find_experts(model: nn.Module) -> list[list[Any]]:
    """[full name, parent, attribute, experts module] of each layer's routed experts, in order.

    Raises:
        KTAMXModelNotSupportedError: None, or one that is not plain.
    """
    text = _text_config(_base_model(model))
    found: list[list[Any]] = []
    strange: list[str] = []
    modules = dict(model.named_modules())
    for name, module in modules.items():
        parent_name, _, attribute = name.rpartition(".")
        if _is_fused(module):
            problem = _problem(module, text)
            if problem:
                raise KTAMXModelNotSupportedError(
                    f"{type(module).__name__} at {name}: {problem}. Supported are fused experts with a gated SiLU, "
                    "without biases."
                )
            found.append([name, modules[parent_name], attribute, module])
        elif "expert" in attribute.lower() and "shared" not in name and not name.endswith("_gate"):
            strange.append(f"{name} ({type(module).__name__})")
    if found:
        return found
    kind = type(_base_model(model)).__name__
    if strange:
        raise KTAMXModelNotSupportedError(
            f"{kind} has experts of a form that is not supported: {', '.join(strange[:3])}. Supported are the fused "
            "experts of transformers 5 (gate_up_proj and down_proj); with trust_remote_code=True leave that out, so "
            "that transformers' own class is used."
        )
    raise KTAMXModelNotSupportedError(
        f"{kind} has no routed experts: nothing to patch. Is it a mixture-of-experts model?"
    )


def _is_fused(module: nn.Module) -> bool:
    parameters = dict(module.named_parameters(recurse=False))
    return any(p.dim() == 3 for n, p in parameters.items() if n in ("gate_up_proj", "down_proj", "up_proj"))


def _problem(experts: nn.Module, text_config: Any) -> str | None:
    """Why these fused experts are not plain, or None. Decided by the module's attributes, not by the family's name."""
    from transformers.integrations import moe

    parameters = dict(experts.named_parameters(recurse=False))
    if set(parameters) != {"gate_up_proj", "down_proj"}:
        return f"parameters {sorted(parameters)} instead of gate_up_proj and down_proj alone"
    flags = {"has_bias": False, "is_transposed": False, "is_concatenated": True, "has_gate": True,
             "has_post_expert_norm": False, "_is_expert_parallel": False}  # fmt: skip
    for flag, plain in flags.items():
        if getattr(experts, flag, plain) != plain:
            return f"{flag}={getattr(experts, flag)}"
    default_gate = getattr(moe, "_default_apply_gate", None)
    gate = getattr(type(experts), "_apply_gate", default_gate)
    if gate is not default_gate:
        return "a gate of its own (_apply_gate)"
    activation = type(getattr(experts, "act_fn", None)).__name__
    named = getattr(text_config, "hidden_act", None) or getattr(text_config, "hidden_activation", None)
    if activation not in _SILU:
        return f"activation {activation} (hidden_act={named!r}) instead of SiLU"
    gate_up, down = parameters["gate_up_proj"], parameters["down_proj"]
    E, H, I = down.shape  # noqa: E741
    if tuple(gate_up.shape) != (E, 2 * I, H):
        return f"gate_up_proj {tuple(gate_up.shape)} does not go with down_proj {tuple(down.shape)}"
    if gate_up.is_meta or down.is_meta:
        return "its weights are on the meta device: load the model without device_map"
    if gate_up.dtype not in (torch.bfloat16, torch.float16, torch.float32) or gate_up.dtype != down.dtype:
        return f"weights of {gate_up.dtype} and {down.dtype}; load the model in bfloat16, float16 or float32"
    return None


def _shape(model: Any, parent: nn.Module, experts: Any, name: str) -> ExpertShape:
    E, H, I = experts.down_proj.shape  # noqa: E741
    return ExpertShape(E, _top_k(model, parent, E, name), H, I)


def _top_k(model: Any, parent: nn.Module, experts: int, name: str) -> int:
    text = _text_config(model)
    for source in (parent, getattr(parent, "gate", None), getattr(parent, "router", None), text):
        for field in _TOP_K_NAMES:
            value = getattr(source, field, None)
            if isinstance(value, int) and 1 <= value <= experts:
                return value
    raise KTAMXModelNotSupportedError(
        f"{name}: the model's config does not tell how many experts a token is sent to ({', '.join(_TOP_K_NAMES)})."
    )


def _text_config(model: Any) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _layer_index(name: str, fallback: int) -> int:
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return numbers[0] if len(numbers) == 1 else fallback


def _show_engine(base: weakref.ref[Any], built: Any) -> None:
    model = base()
    if model is not None:
        model._kt_cpu_infer = getattr(built, "engine", None)


def _guard_save(base: Any) -> None:
    """`save_pretrained` of a patched model would write a checkpoint without expert weights and say nothing."""
    if not hasattr(base, "save_pretrained"):
        return
    itself = weakref.ref(base)  # a strong one would keep the weights of a deleted model until garbage is collected

    def save_pretrained(*args: Any, **kwargs: Any) -> Any:
        model: Any = itself()
        if getattr(model, "_hf_peft_config_loaded", False):  # model.add_adapter: what is saved is the adapter
            return save_native_verified(type(model).save_pretrained, model, *args, **kwargs)
        raise KTAMXError(
            "A patched model without an adapter cannot be saved: its experts are packed and would be missing from the "
            "checkpoint. Train with a LoRA adapter (get_peft_model or the trainer's peft_config, from kt_lora_config) "
            "and save that; the base model is where you loaded it from."
        )

    base.save_pretrained = save_pretrained
