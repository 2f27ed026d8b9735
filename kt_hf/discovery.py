"""Finding a model's routed experts, and telling those that can be computed from those that cannot."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .errors import KTAMXConfigError, KTAMXModelNotSupportedError
from .forms.listed_block import BlockPlan, plan_block
from .forms.listed_mlps import ExpertMlps, expert_mlps
from .forms.stacked import Form, form_of, holds_experts
from .shapes import ExpertShape

# Dtypes that expert weights may have in a model; 8 bits are dequantized to one of them.
FLOATING = (torch.bfloat16, torch.float16, torch.float32)
_SUPPORTED = "Supported are stacked experts of a known gate, with or without biases."
# What the families call the number of experts a token is sent to.
_TOP_K_NAMES = (
    "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k", "top_k_experts",
)  # fmt: skip


@dataclass
class ExpertsSite:
    """Where a layer's experts are.

    Attributes:
        name: Full name of the experts module in the model.
        parent: The module that has the experts module as a child.
        attribute: Name of the experts module in `parent`.
        experts: The experts module; None once it has been taken out, so that the site does not keep its weights.
        shape: Sizes of the layer's experts.
        form: How the module holds them, and how the model calls it.
        mlps: The experts as a list of MLPs, if they are one.
        plan: How the block around such a list is had to compute them together; None without weights.
    """

    name: str
    parent: nn.Module
    attribute: str
    experts: Any
    shape: ExpertShape
    form: Form
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
        KTAMXModelNotSupportedError: The model has no routed experts, or experts that are not stacked, or whose gate is
            not known; or its family classifies tokens and nothing else.
    """
    base = base_model(model)
    _refuse_classifiers(base)
    text = _text_config(base)
    sites: list[ExpertsSite] = []
    strange: list[str] = []
    modules = dict(model.named_modules())
    for name, module in modules.items():
        parent_name, _, attribute = name.rpartition(".")
        if holds_experts(module) and "shared" not in attribute:  # shared ones are the model's, stacked or not
            form = form_of(module, getattr(text, "hidden_act", None) or getattr(text, "hidden_activation", None))
            problem = form if isinstance(form, str) else _problem(module, weightless)
            if isinstance(form, str) or problem:
                raise KTAMXModelNotSupportedError(f"{type(module).__name__} at {name}: {problem}. {_SUPPORTED}")
            parent = modules[parent_name]
            sites.append(ExpertsSite(name, parent, attribute, module, _shape(base, parent, form, name), form))
        elif "expert" in attribute.lower() and "shared" not in name and not name.endswith("_gate"):
            mlps = expert_mlps(module)
            if mlps is not None:
                sites.append(_listed(base, name, modules[parent_name], attribute, mlps, weightless))
                continue
            strange.append(f"{name} ({type(module).__name__})")
    lists = [name for name in strange if name.endswith("(ModuleList)")]
    if sites and not lists:
        return sites
    kind, strange = type(base).__name__, lists or strange
    if strange:
        raise KTAMXModelNotSupportedError(
            f"{kind} has experts of a form that is not supported: {', '.join(strange[:3])}. Supported are the fused "
            "experts of transformers 5 (gate_up_proj and down_proj), and lists of equal MLPs of two or three Linear "
            "layers without biases and a known activation; with trust_remote_code=True leave that out, so that "
            "transformers' own class is used where it has one."
        )
    raise KTAMXModelNotSupportedError(
        f"{kind} has no routed experts: nothing to patch. Is it a mixture-of-experts model?"
    )


def _refuse_classifiers(model: Any) -> None:
    """Raise for a family whose only task is to classify tokens: transformers has no other class for it."""
    from transformers.models.auto import modeling_auto as classes

    kind = getattr(getattr(model, "config", None), "model_type", None)
    writing = (
        classes.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        classes.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        classes.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )
    if kind in classes.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES and not any(kind in names for names in writing):
        raise KTAMXModelNotSupportedError(
            f"{type(model).__name__}: {kind} is a token classifier, a family without a model that generates text. "
            "Train it with transformers and PEFT as it is."
        )


def _problem(experts: nn.Module, weightless: bool) -> str | None:
    """What is wrong with the weights of fused experts, or None."""
    weights = [p for p in experts.parameters() if p.dim() > 1]
    if weightless:
        return None
    if any(p.is_meta for p in weights):
        return "its weights are on the meta device: load the model without device_map"
    dtypes = sorted({str(p.dtype) for p in weights})
    if len(dtypes) > 1 or weights[0].dtype not in FLOATING:
        return f"weights of {' and '.join(dtypes)}; load the model in bfloat16, float16 or float32"
    return None


def _listed(
    model: Any, name: str, parent: nn.Module, attribute: str, mlps: ExpertMlps, weightless: bool
) -> ExpertsSite:
    """The site of experts that are a list of MLPs."""
    E, H, I = mlps.sizes  # noqa: E741
    shape = ExpertShape(E, _top_k(model, parent, E, name), H, I, mlps.gate)
    if (not weightless and len(mlps.dtypes) != 1) or not mlps.dtypes <= set(FLOATING):
        names = ", ".join(sorted(map(str, mlps.dtypes)))
        raise KTAMXModelNotSupportedError(
            f"{name}: weights of {names}; load the model in bfloat16, float16 or float32."
        )
    plan = None if weightless else plan_block(parent, attribute, mlps, shape.top_k, name)
    form = Form(E, H, I, mlps.gate, "listed")
    return ExpertsSite(name, parent, attribute, getattr(parent, attribute), shape, form, mlps, plan)


def _shape(model: Any, parent: nn.Module, form: Form, name: str) -> ExpertShape:
    E = form.num_experts
    top_k = _top_k(model, parent, E, name)
    return ExpertShape(E, top_k, form.hidden_size, form.intermediate_size, form.gate, form.biased)


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
    return _text_config_of(getattr(model, "config", None))


def _text_config_of(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def skeleton(config: Any, trust_remote_code: bool = False) -> Any:
    """The model of a configuration with all its parameters on the meta device: names and sizes, no memory.

    Args:
        config: The model's configuration; stays as it is.
        trust_remote_code: Whether the model's own code may be run, as transformers has it.

    Raises:
        KTAMXModelNotSupportedError: transformers has no class for it.
        KTAMXConfigError: It names no class.
    """
    import transformers
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    )

    config = copy.deepcopy(config)
    without_quantization(config)
    named = (getattr(config, "architectures", None) or [type(config).__name__])[0]
    with torch.device("meta"):
        # A checkpoint of a model that sees is loaded as one, where there is a class for its text alone too.
        seeing = named == MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type)
        scoring = named == MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(config.model_type)
        if trust_remote_code or (type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not (seeing or scoring)):
            return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        if not hasattr(transformers, named):
            raise KTAMXModelNotSupportedError(f"transformers {transformers.__version__} has no class {named}.")
        if named == type(config).__name__:
            raise KTAMXConfigError(f"This {named} names no model: its architectures must be [the model's class].")
        return getattr(transformers, named)._from_config(config)


def without_quantization(config: Any) -> None:
    """Take out of a configuration, and of its language model's, how the checkpoint is quantized."""
    for part in (config, _text_config_of(config)):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
