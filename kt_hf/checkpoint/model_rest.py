"""The model without its routed experts: transformers' loader, with modules without parameters in their places."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..discovery import FLOATING, without_quantization
from ..errors import KTAMXConfigError, KTAMXModelNotSupportedError
from .dense_rest import DenseRest
from .expert_index import ExpertCheckpoint

_SWAPPING = threading.Lock()


@dataclass
class Source:
    """What is loaded: the arguments of `load_kt_model` by whom they are for.

    Attributes:
        path_or_name: Of the checkpoint.
        config: The model's configuration, a copy.
        asked: The model's dtype as it was asked for, "auto" or a floating one.
        trusted: Whether the model's own code may be run (`trust_remote_code`).
        hub: Arguments that tell where the files are.
        kwargs: The other arguments of `from_pretrained`.
        rest: bitsandbytes' configuration for linear layers outside the experts; None if they stay as they are.
    """

    path_or_name: str | Path
    config: Any
    asked: torch.dtype | str
    trusted: bool
    hub: dict[str, Any]
    kwargs: dict[str, Any]
    rest: Any = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the model will have."""
        asked = self.asked
        return asked if isinstance(asked, torch.dtype) else checked_dtype(self.config.dtype or torch.bfloat16)


def load_rest(source: Source, checkpoint: ExpertCheckpoint, outline: Any) -> Any:
    """Everything but the routed experts, by `from_pretrained`; what is of low bits is widened.

    Args:
        source: What is loaded.
        checkpoint: Its files.
        outline: The model's `skeleton`.

    Returns:
        The model with `NoExperts` in the places of its experts.

    Raises:
        KTAMXError: A weight of low bits cannot be read, before anything is loaded.
        KTAMXModelNotSupportedError: The model has no weight of the name that one of low bits has.
    """
    from transformers import AutoModelForCausalLM

    config, kwargs = source.config, source.hub | source.kwargs
    if source.trusted:
        kwargs["trust_remote_code"] = True
    loader = AutoModelForCausalLM if source.trusted else checkpoint.model_class
    rest = DenseRest(checkpoint.files, checkpoint.quantization, _left_out(checkpoint.model_class))
    rest.check(outline)
    if rest.low_bit and source.rest is not None:
        stored = next(iter(rest.low_bit.values())).first
        raise KTAMXConfigError(
            f"quantization_config: {stored} is of {stored.dtype} already. bitsandbytes quantizes weights in bfloat16, "
            "float16 or float32 alone: leave it out, these are widened."
        )
    without_quantization(config)
    if rest.low_bit:
        return _load_widened(source, checkpoint, rest)
    if source.rest is not None:
        kwargs["quantization_config"] = source.rest
    ignored = [r"\.experts\."]
    with _without_experts(checkpoint, ignored):
        model = loader.from_pretrained(str(source.path_or_name), config=config, dtype=source.asked, **kwargs)
    kept = set(_left_out(checkpoint.model_class))
    model._keys_to_ignore_on_load_unexpected = set(model._keys_to_ignore_on_load_unexpected) - (set(ignored) - kept)
    return model


def _load_widened(source: Source, checkpoint: ExpertCheckpoint, rest: DenseRest) -> Any:
    """Everything but the routed experts, some of it of low bits.

    With the configuration's quantization transformers would make modules that compute in low bits, or dequantize by
    blocks of its own reckoning, which refuses DeepSeek-V3 (576 rows in five blocks of 128). It is given a plain model's
    tensors instead, widened as they are read: the memory they are in becomes the model's.
    """
    tensors = rest.load(source.dtype)
    with _without_experts(checkpoint, []):
        model, info = checkpoint.model_class.from_pretrained(
            None,
            config=source.config,
            state_dict=tensors,
            dtype=source.dtype,
            output_loading_info=True,
            **source.kwargs,
        )
    unknown = sorted(set(info["unexpected_keys"]) & set(rest.low_bit))
    if unknown:
        stored = rest.low_bit[unknown[0]].first
        raise KTAMXModelNotSupportedError(
            f"{stored} is of {stored.dtype}, and {type(model).__name__} has no weight {unknown[0]}. Give the "
            "checkpoint in bfloat16."
        )
    model.name_or_path = model.config.name_or_path = str(source.path_or_name)
    if model.can_generate():
        from transformers import GenerationConfig

        with suppress(OSError):  # a model need not have one
            model.generation_config = GenerationConfig.from_pretrained(str(source.path_or_name), **source.hub)
    return model


def _left_out(model_class: Any) -> list[str]:
    """Patterns of names that a class of transformers leaves out of a checkpoint, multi-token prediction's mostly."""
    return list(model_class._keys_to_ignore_on_load_unexpected or ())


class NoExperts(nn.Module):
    """In the place of a layer's experts while the rest of the model is loaded."""

    _is_hf_initialized = True  # there is nothing to initialize, which the model's _init_weights would try
    # What some of those reach for all the same: of no element.
    gate_up_proj = down_proj = gate_proj = up_proj = torch.empty(0)

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()


@contextmanager
def _without_experts(checkpoint: ExpertCheckpoint, ignored: list[str]) -> Iterator[None]:
    """Models made in this context have `NoExperts`, and do not miss what the checkpoint has for them.

    Classes in transformers' modules are swapped, for the whole process: a thread that makes a model of the same family
    meanwhile, other than by `load_kt_model`, gets one without experts.
    """
    model_class: Any = checkpoint.model_class
    with _SWAPPING:
        # A list or None; the lock stands for a class that has none of its own.
        ignored_before = vars(model_class).get("_keys_to_ignore_on_load_unexpected", _SWAPPING)
        try:
            for kind in checkpoint.expert_classes:
                setattr(sys.modules[kind.__module__], kind.__name__, NoExperts)
            inherited = model_class._keys_to_ignore_on_load_unexpected or ()
            model_class._keys_to_ignore_on_load_unexpected = [*inherited, *ignored]
            yield
        finally:
            for kind in checkpoint.expert_classes:
                setattr(sys.modules[kind.__module__], kind.__name__, kind)
            if ignored_before is _SWAPPING:
                del model_class._keys_to_ignore_on_load_unexpected
            else:
                model_class._keys_to_ignore_on_load_unexpected = ignored_before


def checked_dtype(dtype: torch.dtype | str) -> Any:
    """A dtype by its name, or "auto"; KTAMXConfigError for one that experts cannot have."""
    checked = getattr(torch, dtype, None) if isinstance(dtype, str) and dtype != "auto" else dtype
    if checked != "auto" and checked not in FLOATING:
        raise KTAMXConfigError(f"dtype={dtype}: give bfloat16, float16 or float32, which experts can have.")
    return checked
