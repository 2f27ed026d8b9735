"""Block-scaled 8-bit weights in checkpoints: FP8 or INT8, each block of rows and columns with a scale.

Known are DeepSeek-V3's block-wise FP8 and the same of INT8 (`weight_scale_inv`, blocks by the configuration), and one
scale a row (`weight_scale`, of compressed-tensors and of w8a8_int8). A weight is its value times its block's scale.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backends.packed import EIGHT_BIT, scale_
from ..discovery import FLOATING
from ..errors import KTAMXConfigError, KTAMXError, KTAMXModelNotSupportedError
from .tensor_files import StoredTensor, TensorFiles, read_tensors

# What stands after a weight's name in the name of its scales.
SCALES = ("_scale_inv", "_scale")
SCALE_PATTERN = r"_scale(?:_inv)?"
KNOWN = "bfloat16, float16, float32, or FP8 or INT8 with a scale for each block or row"
_DEFAULT_BLOCK = (128, 128)
_A_ROW = (1, sys.maxsize)
_BLOCKWISE = ("fp8", "blockwise_int8")


def block_size(config: Any) -> tuple[int, int]:
    """Rows and columns of a weight that share a scale.

    Args:
        config: The model's configuration, whose `quantization_config` tells; 128 × 128 where it has none.

    Raises:
        KTAMXConfigError: The model is quantized in another way.
    """
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return _DEFAULT_BLOCK
    method = str(getattr(_get(quantization, "quant_method"), "value", _get(quantization, "quant_method")))
    if method == "w8a8_int8":
        return _A_ROW
    if method == "compressed-tensors":
        return _compressed(quantization)
    if method not in _BLOCKWISE:
        raise KTAMXConfigError(
            f"quantization_config: quant_method={method!r} cannot be streamed. Give a checkpoint in {KNOWN} "
            f"(quant_method {', '.join(_BLOCKWISE)}, w8a8_int8 or compressed-tensors)."
        )
    return _block("weight_block_size", _get(quantization, "weight_block_size", _DEFAULT_BLOCK))


def has_8_bits(config: Any) -> bool:
    """Whether a model's weights are in 8 bits, in a way that is known, by the configuration's `quantization_config`."""
    try:
        return getattr(config, "quantization_config", None) is not None and bool(block_size(config))
    except KTAMXConfigError:
        return False


def _compressed(config: Any) -> tuple[int, int]:
    """The block of compressed-tensors: 8 bits, symmetric, a scale for each row or block, alike for all weights."""
    groups = _get(config, "config_groups")
    if _get(config, "transform_config"):
        raise KTAMXConfigError(
            "quantization_config: transform_config, rotations of weights when they are used, cannot be streamed. "
            f"Give a checkpoint in {KNOWN}."
        )
    groups, blocks = groups if isinstance(groups, Mapping) else {}, set()
    for name, group in groups.items():
        weights = _get(group, "weights") or {}
        bits, strategy = _get(weights, "num_bits"), str(_get(weights, "strategy"))
        if bits != 8 or not _get(weights, "symmetric", True) or strategy not in ("channel", "block"):
            raise KTAMXConfigError(
                f"quantization_config: {name} has weights of num_bits={bits}, strategy={strategy!r}, "
                f"symmetric={_get(weights, 'symmetric', True)}, which cannot be streamed. Give a checkpoint in {KNOWN}."
            )
        blocks.add(_A_ROW if strategy == "channel" else _block("block_structure", _get(weights, "block_structure")))
    if len(blocks) != 1:
        raise KTAMXConfigError(
            "quantization_config: config_groups names no weights, or weights quantized in several ways, which cannot "
            f"be streamed. Give a checkpoint in {KNOWN}."
        )
    return blocks.pop()


def _get(config: Any, name: str, other: Any = None) -> Any:
    return config.get(name, other) if isinstance(config, dict) else getattr(config, name, other)


def _block(name: str, block: Any) -> tuple[int, int]:
    if not isinstance(block, (list, tuple)) or len(block) != 2 or not all(isinstance(n, int) and n > 0 for n in block):
        raise KTAMXConfigError(f"quantization_config: {name}={block!r} is not two numbers, of rows and columns.")
    return int(block[0]), int(block[1])


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    """Shape of the scales of a weight; blocks at the edges may be smaller.

    Args:
        shape: Of the weight, [rows, columns].
        block: Rows and columns that share a scale.
    """
    return -(-shape[-2] // block[0]), -(-shape[-1] // block[1])


def dequantize(weight: Tensor, scales: Tensor, block: tuple[int, int], out: Tensor) -> None:
    """Multiply each block of a weight by its scale, in fp32, and round once.

    Args:
        weight: [rows, columns], in 8 bits, or cast from them to a dtype that holds its values exactly.
        scales: [rows / block rows, columns / block columns], rounded up.
        block: Rows and columns that share a scale.
        out: [rows, columns], floating, where the result goes; may be `weight`.
    """
    product = weight.float()  # a copy; of fp32 itself, which is then written in place
    scale_(product, scales.float(), block)
    out.copy_(product)


@dataclass(frozen=True)
class ScaledTensor:
    """An 8-bit weight and its scales, in the files.

    Attributes:
        weight: [rows, columns], FP8 or INT8.
        scales: One of each block, floating.
        block: Rows and columns that share a scale.
    """

    weight: StoredTensor
    scales: StoredTensor
    block: tuple[int, int]


def check_scales(weight: StoredTensor, scales: StoredTensor | None, block: tuple[int, int]) -> ScaledTensor:
    """An 8-bit weight with its scales.

    Args:
        weight: Of the checkpoint.
        scales: What the checkpoint has for it; None if nothing.
        block: Rows and columns that share a scale.

    Raises:
        KTAMXError: The weight is not in 8 bits, or its scales are missing or do not fit; naming file and tensor.
    """
    if weight.dtype not in EIGHT_BIT:
        raise KTAMXError(f"{weight} is of {weight.dtype}, but has scales in {scales}; they belong to FP8 or INT8.")
    if scales is None:
        names = " or ".join(weight.name + tail for tail in SCALES)
        raise KTAMXError(f"{weight} is of {weight.dtype}, but its scales, {names}, are missing.")
    expected = scale_shape(weight.shape, block) if len(weight.shape) == 2 else None
    if scales.shape != expected or scales.dtype not in FLOATING:
        raise KTAMXError(
            f"{scales} is of {scales.dtype} and has the shape {list(scales.shape)}; for a weight of the shape "
            f"{list(weight.shape)} and {_block_words(block)} it is floating and {list(expected or ())}."
        )
    return ScaledTensor(weight, scales, block)


def _block_words(block: tuple[int, int]) -> str:
    return "a scale for each row" if block == _A_ROW else f"blocks of {block[0]} × {block[1]}"


def quantized_rest(files: TensorFiles, block: tuple[int, int]) -> list[ScaledTensor]:
    """The 8-bit weights of a checkpoint outside the routed experts.

    Args:
        files: The checkpoint's tensors.
        block: Rows and columns that share a scale.

    Raises:
        KTAMXError: Scales are missing, or do not fit.
    """
    quantized = []
    for name, tensor in files.tensors.items():
        scales = scales_of(name, files.tensors)
        other = "experts." not in name.replace("shared_experts.", "")
        eight = tensor.dtype in EIGHT_BIT and (tensor.dtype != torch.int8 or name.endswith(".weight"))
        if other and (eight or scales is not None):
            quantized.append(check_scales(tensor, scales, block))
    return quantized


def scales_of(name: str, tensors: Mapping[str, StoredTensor]) -> StoredTensor | None:
    """The scales of a weight, None if there are none.

    Args:
        name: Of the weight. Where it does not end in `.weight`, a tensor `NAME_scale` means something else.
        tensors: Of the checkpoint, by name.
    """
    tails = SCALES if name.endswith(".weight") else SCALES[:1]
    return next((tensors[name + tail] for tail in tails if name + tail in tensors), None)


@torch.no_grad()
def dequantize_rest(model: Any, weights: list[ScaledTensor]) -> None:
    """Multiply weights of a model, into which their 8-bit values were loaded unscaled, by their scales, in place.

    Args:
        model: A transformers model in a floating dtype.
        weights: In the checkpoint.

    Raises:
        KTAMXModelNotSupportedError: The model has no such weight: it was converted on loading.
    """
    parameters = dict(model.named_parameters())
    skipped = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    for stored in weights:
        name = stored.weight.name
        known = [other for other in (name, f"model.{name}", name.removeprefix("model.")) if other in parameters]
        if not known and any(pattern.search(name) for pattern in skipped):
            continue  # of layers transformers leaves out, multi-token prediction for stored
        if not known or tuple(parameters[known[0]].shape) != stored.weight.shape:
            raise KTAMXModelNotSupportedError(
                f"{stored.weight} is of {stored.weight.dtype}, and {type(model).__name__} has no parameter of that "
                "name and shape, so its scales cannot be applied. Give the checkpoint in bfloat16."
            )
        scales = torch.empty(stored.scales.shape, dtype=stored.scales.dtype, device="cpu")
        read_tensors([(stored.scales, scales)])
        weight = parameters[known[0]].data
        dequantize(weight, scales.to(weight.device), stored.block, weight)
