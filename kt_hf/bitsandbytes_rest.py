"""The linear layers outside the routed experts in 4 or 8 bits, by bitsandbytes: QLoRA of the whole model.

Attention, shared experts and dense MLPs, which LoRA can be on. Never routers, whose choice of experts would change, nor
the head, whose logits would. bitsandbytes leaves routed experts alone, for they are no linear layers; they have
`kt_expert_dtype` and `kt_backend`.
"""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import torch
from torch import nn

from .errors import KTAMXConfigError, KTAMXNotAvailableError
from .lora import linear_targets

# Bytes of a weight: codes, and of 4 bits a scale for 64, in fp32 or in 8 bits again ("double"); of 8 bits one a row.
_BYTES = {(4, False): 0.5 + 4 / 64, (4, True): 0.5 + 1 / 64, (8, False): 1.0, (8, True): 1.0}


def linear_bytes(bits: int, double: bool = True) -> float:
    """Memory of a weight that bitsandbytes has quantized, its part of the scales included.

    Args:
        bits: 4 or 8.
        double: Whether the scales of 4 bits are quantized too.
    """
    return _BYTES[bits, double]


def bits_and_bytes(bits: int, kind: str = "nf4", double: bool = True, dtype: torch.dtype = torch.bfloat16) -> Any:
    """transformers' `BitsAndBytesConfig` for `load_kt_model`.

    Args:
        bits: 4 or 8.
        kind: Of 4 bits: nf4 or fp4.
        double: Of 4 bits: whether scales are quantized too.
        dtype: What is multiplied in.

    Raises:
        KTAMXNotAvailableError: bitsandbytes is not installed.
    """
    check_installed()
    from transformers import BitsAndBytesConfig

    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double, bnb_4bit_compute_dtype=dtype
    )


def check_installed() -> None:
    """KTAMXNotAvailableError if bitsandbytes is not."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise KTAMXNotAvailableError(
            "Linear layers in 4 or 8 bits (quantization_bit, quantization_config) need bitsandbytes: pip install "
            "bitsandbytes"
        )


def for_rest(config: Any, outline: nn.Module, packed_already: bool) -> Any:
    """A copy of the user's configuration that leaves out routers and head.

    Args:
        config: A `BitsAndBytesConfig` of 4 or 8 bits, or a mapping of its fields.
        outline: The model, on the meta device too.
        packed_already: Whether the checkpoint has other weights than experts in low bits.

    Raises:
        KTAMXConfigError: It is something else, or the weights are in low bits already.
        KTAMXNotAvailableError: bitsandbytes is not installed.
    """
    from transformers import BitsAndBytesConfig

    made = BitsAndBytesConfig(**config) if isinstance(config, dict) else copy.deepcopy(config)
    if not isinstance(made, BitsAndBytesConfig) or not (made.load_in_4bit or made.load_in_8bit):
        raise KTAMXConfigError(
            f"quantization_config={type(config).__name__}: load_kt_model takes transformers' BitsAndBytesConfig with "
            "load_in_4bit or load_in_8bit, for the linear layers outside the experts."
        )
    check_installed()
    if packed_already:
        raise KTAMXConfigError(
            "quantization_config: the checkpoint's linear layers are in low bits already. Leave it out, and they are "
            "widened; or give a checkpoint in bfloat16."
        )
    wanted = set(linear_targets(outline))
    others = [name for name, m in outline.named_modules() if isinstance(m, nn.Linear) and name not in wanted]
    made.llm_int8_skip_modules = sorted({*(made.llm_int8_skip_modules or ()), *others, "lm_head"})
    return made


def saved_bytes(config: Any, outline: nn.Module, width: int) -> int:
    """Bytes that the linear layers take less than in their own dtype.

    Args:
        config: What `for_rest` gave.
        outline: The model, on the meta device too.
        width: Bytes of a weight in its own dtype.
    """
    skipped = set(config.llm_int8_skip_modules)
    weights: list[Any] = [outline.get_submodule(name).weight for name in linear_targets(outline) if name not in skipped]
    sizes = [weight.numel() for weight in weights]
    one = linear_bytes(4 if config.load_in_4bit else 8, bool(config.bnb_4bit_use_double_quant))
    return int(sum(sizes) * (width - one))
