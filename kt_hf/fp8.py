"""Block-wise FP8 weights as DeepSeek-V3 has them: float8_e4m3fn, and one scale for each block of 128 × 128."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .errors import KTAMXConfigError

FP8 = torch.float8_e4m3fn
# What stands after a weight's name in the name of its scales. A weight is its FP8 value times its block's scale.
SCALE = "_scale_inv"
_DEFAULT_BLOCK = (128, 128)


def block_size(config: Any) -> tuple[int, int]:
    """Rows and columns that share a scale, by the model's `quantization_config`; 128 × 128 where it has none.

    Raises:
        KTAMXConfigError: The model is quantised in another way.
    """
    found = getattr(config, "quantization_config", None)
    if found is None:
        return _DEFAULT_BLOCK
    get = found.get if isinstance(found, dict) else lambda name, other=None: getattr(found, name, other)
    method = str(getattr(get("quant_method"), "value", get("quant_method")))
    if method != "fp8":
        raise KTAMXConfigError(
            f"quantization_config: quant_method={method!r} cannot be streamed. Give a checkpoint in bfloat16, float16, "
            "float32 or block-wise FP8 (quant_method fp8)."
        )
    block = get("weight_block_size", _DEFAULT_BLOCK)
    if not isinstance(block, (list, tuple)) or len(block) != 2 or not all(isinstance(n, int) and n > 0 for n in block):
        raise KTAMXConfigError(
            f"quantization_config: weight_block_size={block!r} is not two numbers, of rows and columns."
        )
    return int(block[0]), int(block[1])


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    """Shape of the scales of a weight [rows, columns]; blocks at the edges may be smaller."""
    return -(-shape[-2] // block[0]), -(-shape[-1] // block[1])


def dequantise(weight: Tensor, scales: Tensor, block: tuple[int, int], out: Tensor) -> None:
    """out = weight × its block's scale, computed in fp32 and rounded once.

    Args:
        weight: [rows, columns], in FP8, or cast from it to a dtype that holds its values exactly.
        scales: [rows / block rows, columns / block columns], rounded up.
        out: [rows, columns], floating; may be `weight`.
    """
    columns = scales.float().repeat_interleave(block[1], 1)[:, : weight.shape[1]]
    product = weight.float()  # a copy; of fp32 itself, which is then written in place
    for index, factors in enumerate(columns):
        product[index * block[0] : (index + 1) * block[0]] *= factors
    out.copy_(product)
