"""Whether an adapter fits a model, name by name, before PEFT touches either."""

from __future__ import annotations

from typing import Any

from ..errors import KTAMXError
from ..experts.layer import kt_layers
from ..peft_compat.internals import (
    PREFIX,
    base_model,
    base_parameter,
    plain_module_name,
    saved_names,
    saved_whole_names,
    whole_modules,
    whole_with_retrained_tokens,
)
from .adapter import Adapter, token_rows
from .whole import whole_shapes


def check_fits(adapter: Adapter, model: Any, name: str | None = None) -> None:
    """Every LoRA tensor has its place in the model, and every expert LoRA tensor of the model is in the adapter.

    Args:
        adapter: Of format kt.
        model: A patched model.
        name: The model's adapter to compare with, None to compare with the sizes of its experts only.

    Raises:
        KTAMXError: Naming the first that does not fit.
    """
    layers = {layer.label.removeprefix(PREFIX): layer for layer in kt_layers(model)}
    for module, one in adapter.experts.items():
        layer = layers.get(one.experts)
        if layer is None:
            raise KTAMXError(f"{adapter.where}: {module} has no place in this model: another base model's adapter?")
        shape = layer.shape
        sizes = (shape.hidden_size, shape.intermediate_size)
        into, out = sizes if one.name != "down_proj" else sizes[::-1]
        expected = (shape.num_experts, one.rank, into), (shape.num_experts, out, one.rank)
        if (one.a.shape, one.b.shape) != expected:
            raise KTAMXError(
                f"{adapter.where}: {module} is {one.a.shape} and {one.b.shape}; this model needs {expected[0]} and "
                f"{expected[1]}: another base model's adapter?"
            )
    missing = [f"{e}.{name}" for e in layers for name in adapter.targeted(e) if f"{e}.{name}" not in adapter.experts]
    if missing:
        raise KTAMXError(
            f"{adapter.where} has no LoRA for {missing[0]} ({len(missing)} projections of experts missing)."
        )
    _check_others_fit(adapter, model)
    if name is None:
        return
    wholes = whole_shapes(model)
    expected_shapes = {key: wholes.get(id(p), tuple(p.shape)) for key, p in saved_names(model, name).items()}
    shapes = {key: tensor.shape for key, tensor in adapter.tensors() if ".lora_" in key}
    for key in sorted(expected_shapes.keys() | shapes.keys()):
        if expected_shapes.get(key) != shapes.get(key):
            raise KTAMXError(
                f"{adapter.where}: {key} is {shapes.get(key, 'missing')}, in the model "
                f"{expected_shapes.get(key, 'not')}."
            )
    # PEFT looks each of them up.
    lacking = sorted(saved_whole_names(model, name).keys() - {key for key, _ in adapter.tensors()})
    if lacking:
        raise KTAMXError(
            f"{adapter.where}: {lacking[0]} is missing ({len(lacking)} in all), which the model trains as a whole "
            "(modules_to_save, trainable_token_indices). Leave that out, or start from an adapter that has it."
        )


def _check_others_fit(adapter: Adapter, model: Any) -> None:
    """Every whole parameter and every retrained token has its place, and none that PEFT will ask for is missing."""
    modules = adapter.other_modules()
    for module, tensors in modules.items():
        for parameter, value in tensors.whole.items():
            _check_parameter(adapter, model, module, parameter, value.shape)
        rows = token_rows(adapter.config, module) or []
        if tensors.tokens is not None:
            shape = (max([*rows, 0]) + 1, tensors.tokens.shape[1])
            _check_parameter(adapter, model, module, "weight", shape, "retrained rows of ")
    names = tuple(adapter.config.get("modules_to_save") or ())
    held = {f"{module}.{parameter}" for module, tensors in modules.items() for parameter in tensors.whole}
    for module, parameters in whole_modules(model, names).items():
        missing = sorted({f"{module}.{parameter}" for parameter in parameters} - held)
        if missing:
            raise KTAMXError(
                f"{adapter.where}: modules_to_save={list(names)} is of {module} too, and {missing[0]} is missing."
            )


def _check_parameter(
    adapter: Adapter, model: Any, module: str, parameter: str, shape: tuple[int, ...], what: str = ""
) -> None:
    value = base_parameter(model, module, parameter)
    if value is None:
        raise KTAMXError(
            f"{adapter.where}: {module}.{parameter} has no place in this model: another base model's adapter?"
        )
    now = tuple(value.shape)
    rows_alone = len(now) == len(shape) == 2 and now[1] == shape[1]
    if now == shape or (what and rows_alone and now[0] >= shape[0]):
        return
    fix = "another base model's adapter?"
    if rows_alone:  # embeddings of another vocabulary
        fix = f"call model.resize_token_embeddings({shape[0]}) before, as for the training." if not what else fix
    raise KTAMXError(f"{adapter.where}: {what}{module}.{parameter} is {shape}, in the model {now}: {fix}")


def check_embeddings(adapter: Adapter, model: Any) -> None:
    """Refuse what PEFT does not save of resized embeddings, and what it cannot compute.

    Args:
        adapter: What would be saved now.
        model: A patched model with that adapter.

    Raises:
        KTAMXError: The rows that were added to one of them would be lost; or retrained tokens of a tied head that is
            trained as a whole too.
    """
    for name in whole_with_retrained_tokens(model):
        raise KTAMXError(
            f"trainable_token_indices and modules_to_save are both of {name}, which is tied: PEFT cannot compute that. "
            "Leave one of the two out."
        )
    base = base_model(model)
    names = {id(module): name for name, module in base.named_modules()}
    before = _vocabulary(adapter.config.get("base_model_name_or_path"))
    now = int(base.get_input_embeddings().weight.shape[0])
    text = base.config.get_text_config()
    if before is None or before == now or getattr(text, "tie_word_embeddings", False):
        return
    whole = {name for name, module in adapter.other_modules().items() if "weight" in module.whole}
    for module in (base.get_input_embeddings(), base.get_output_embeddings()):
        name = plain_module_name(names.get(id(module), ""))
        if name and name not in whole:
            raise KTAMXError(
                f"the vocabulary was resized from {before} to {now}, and with these settings PEFT does not save {name}"
                ", whose new rows would be lost. Train it too (modules_to_save), or leave the other embeddings out of "
                "target_modules."
            )


def _vocabulary(base: Any) -> int | None:
    """Size of the vocabulary of the base model as it was saved; None if it is not known without a network."""
    from transformers import AutoConfig

    try:
        return (
            int(AutoConfig.from_pretrained(base, local_files_only=True).get_text_config().vocab_size) if base else None
        )
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
