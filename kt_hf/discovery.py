"""Finding a model's routed experts, and telling those that can be computed from those that cannot."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .errors import KTAMXModelNotSupportedError
from .listed.block import BlockPlan, plan_block
from .listed.mlps import ExpertMlps, expert_mlps
from .shapes import ExpertShape

# Dtypes that expert weights may have in a model; 8 bits are dequantized to one of them.
FLOATING = (torch.bfloat16, torch.float16, torch.float32)
_SILU = ("SiLU", "SiLUActivation")
# What the families call the number of experts a token is sent to.
_TOP_K_NAMES = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k")


@dataclass
class ExpertsSite:
    """Where a layer's experts are.

    Attributes:
        name: Full name of the experts module in the model.
        parent: The module that has the experts module as a child.
        attribute: Name of the experts module in `parent`.
        experts: The experts module; None once it has been taken out, so that the site does not keep its weights.
        shape: Sizes of the layer's experts.
        mlps: The experts as a list of MLPs, if they are one.
        plan: How the block around such a list is had to compute them together; None without weights.
    """

    name: str
    parent: nn.Module
    attribute: str
    experts: Any
    shape: ExpertShape
    mlps: ExpertMlps | None = None
    plan: BlockPlan | None = None


def layer_index(name: str, fallback: int) -> int:
    """Index of a layer, by the number in its name.

    Args:
        name: Of a module, dotted.
        fallback: The index if the name has no number, or several.
    """
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return numbers[0] if len(numbers) == 1 else fallback


def by_layer(shapes: Mapping[str, ExpertShape]) -> dict[int, ExpertShape]:
    """Sizes of the experts by layer index, from those by the names of the experts modules, in the model's order."""
    return {layer_index(name, i): shape for i, (name, shape) in enumerate(shapes.items())}


def base_model(model: Any) -> Any:
    """The model inside a PeftModel."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def find_experts(model: nn.Module, weightless: bool = False) -> list[ExpertsSite]:
    """Each layer's routed experts, in the order of the layers.

    Args:
        model: A transformers model, or a PeftModel around one.
        weightless: The model is a `skeleton`: its parameters are on the meta device.

    Raises:
        KTAMXModelNotSupportedError: The model has no routed experts, or experts that are not fused, have a bias, or
            another activation than SiLU.
    """
    base = base_model(model)
    text = _text_config(base)
    sites: list[ExpertsSite] = []
    strange: list[str] = []
    modules = dict(model.named_modules())
    for name, module in modules.items():
        parent_name, _, attribute = name.rpartition(".")
        if _is_fused(module) and "shared" not in attribute:  # shared ones are the model's, stacked or not
            problem = _problem(module, text, weightless)
            if problem:
                raise KTAMXModelNotSupportedError(
                    f"{type(module).__name__} at {name}: {problem}. Supported are fused experts with a gated SiLU, "
                    "without biases."
                )
            parent = modules[parent_name]
            sites.append(ExpertsSite(name, parent, attribute, module, _shape(base, parent, module, name)))
        elif "expert" in attribute.lower() and "shared" not in name and not name.endswith("_gate"):
            mlps = expert_mlps(module)
            if mlps is not None:
                sites.append(_listed(base, name, modules[parent_name], attribute, mlps, weightless))
                continue
            strange.append(f"{name} ({type(module).__name__})")
    if sites:
        return sites
    kind = type(base).__name__
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
    """Whether a module holds stacked matrices of experts, one of which a router would choose."""
    parameters = dict(module.named_parameters(recurse=False))
    return any(p.dim() == 3 for n, p in parameters.items() if n in ("gate_up_proj", "down_proj", "up_proj"))


def _problem(experts: nn.Module, text_config: Any, weightless: bool) -> str | None:
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
    act_fn = getattr(experts, "act_fn", None)
    activation = _SILU[0] if act_fn is nn.functional.silu else type(act_fn).__name__
    named = getattr(text_config, "hidden_act", None) or getattr(text_config, "hidden_activation", None)
    if type(experts).__module__.startswith("liger_kernel."):  # its class is for SiLU alone, and names none
        activation = _SILU[0]
    if activation not in _SILU:
        return f"activation {activation} (hidden_act={named!r}) instead of SiLU"
    gate_up, down = parameters["gate_up_proj"], parameters["down_proj"]
    E, H, I = down.shape  # noqa: E741
    if tuple(gate_up.shape) != (E, 2 * I, H):
        return f"gate_up_proj {tuple(gate_up.shape)} does not go with down_proj {tuple(down.shape)}"
    if weightless:
        return None
    if gate_up.is_meta or down.is_meta:
        return "its weights are on the meta device: load the model without device_map"
    if gate_up.dtype not in FLOATING or gate_up.dtype != down.dtype:
        return f"weights of {gate_up.dtype} and {down.dtype}; load the model in bfloat16, float16 or float32"
    return None


def _listed(
    model: Any, name: str, parent: nn.Module, attribute: str, mlps: ExpertMlps, weightless: bool
) -> ExpertsSite:
    """The site of experts that are a list of MLPs."""
    E, H, I = mlps.sizes  # noqa: E741
    shape = ExpertShape(E, _top_k(model, parent, E, name), H, I, mlps.gate)
    if not weightless and len(mlps.dtypes) != 1 or not mlps.dtypes <= set(FLOATING):
        names = ", ".join(sorted(map(str, mlps.dtypes)))
        raise KTAMXModelNotSupportedError(
            f"{name}: weights of {names}; load the model in bfloat16, float16 or float32."
        )
    plan = None if weightless else plan_block(parent, attribute, mlps, shape.top_k, name)
    return ExpertsSite(name, parent, attribute, getattr(parent, attribute), shape, mlps, plan)


def _shape(model: Any, parent: nn.Module, experts: Any, name: str) -> ExpertShape:
    E, H, I = experts.down_proj.shape  # noqa: E741
    return ExpertShape(E, _top_k(model, parent, E, name), H, I)


def _top_k(model: Any, parent: nn.Module, experts: int, name: str) -> int:
    sources = (parent, getattr(parent, "gate", None), getattr(parent, "router", None), _text_config(model))
    value = top_k_of(sources, experts)
    if value is None:
        raise KTAMXModelNotSupportedError(
            f"{name}: the model's config does not tell how many experts a token is sent to ({', '.join(_TOP_K_NAMES)})."
        )
    return value


def top_k_of(sources: Iterable[Any], experts: int) -> int | None:
    """The number of experts a token is sent to, by the first source that has it under one of its usual names.

    Args:
        sources: Modules or configurations, the nearest to the experts first; None among them is passed over.
        experts: Experts of the layer, which the number cannot exceed.
    """
    for source in sources:
        for field in _TOP_K_NAMES:
            value = getattr(source, field, None)
            if isinstance(value, int) and 1 <= value <= experts:
                return value
    return None


def _text_config(model: Any) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def skeleton(config: Any, trust_remote_code: bool = False) -> Any:
    """The model of a configuration with all its parameters on the meta device: names and sizes, no memory.

    Args:
        config: The model's configuration; stays as it is.
        trust_remote_code: Whether the model's own code may be run, as transformers has it.

    Raises:
        KTAMXModelNotSupportedError: transformers has no class for it.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    named = (getattr(config, "architectures", None) or [type(config).__name__])[0]
    with torch.device("meta"):
        if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or trust_remote_code:
            return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        if not hasattr(transformers, named):
            raise KTAMXModelNotSupportedError(f"transformers {transformers.__version__} has no class {named}.")
        return getattr(transformers, named)._from_config(config)
