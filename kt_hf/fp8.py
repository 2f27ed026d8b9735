"""Block-wise FP8 weights as DeepSeek-V3 has them: float8_e4m3fn, and one scale for each block of 128 × 128."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import KTAMXConfigError, KTAMXError, KTAMXModelNotSupportedError
from .tensor_files import StoredTensor, TensorFiles, read_tensors

FP8 = torch.float8_e4m3fn
FLOATING = (torch.bfloat16, torch.float16, torch.float32)
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


@dataclass(frozen=True)
class Quantised:
    """A weight of FP8 and its scales, in the files."""

    weight: StoredTensor
    scales: StoredTensor
    block: tuple[int, int]


def check_scales(weight: StoredTensor, scales: StoredTensor | None, block: tuple[int, int]) -> Quantised:
    """An FP8 weight with its scales.

    Raises:
        KTAMXError: It has none, or they do not fit; naming file and tensor.
    """
    if weight.dtype != FP8:
        raise KTAMXError(f"{weight} is of {weight.dtype}, but has scales in {scales}; they belong to {FP8}.")
    if scales is None:
        raise KTAMXError(f"{weight} is of {FP8}, but {weight.name}{SCALE}, its scales, is missing.")
    wanted = scale_shape(weight.shape, block) if len(weight.shape) == 2 else None
    if scales.shape != wanted or scales.dtype not in FLOATING:
        raise KTAMXError(
            f"{scales} is of {scales.dtype} and has the shape {list(scales.shape)}; for a weight of the shape "
            f"{list(weight.shape)} and blocks of {block[0]} × {block[1]} it is floating and {list(wanted or ())}."
        )
    return Quantised(weight, scales, block)


def quantised_rest(files: TensorFiles, block: tuple[int, int]) -> list[Quantised]:
    """The FP8 weights of a checkpoint that are not routed experts'.

    Raises:
        KTAMXError: Scales are missing, or do not fit.
    """
    found = []
    for name, tensor in files.tensors.items():
        scales = files.tensors.get(name + SCALE)
        if "experts." not in name.replace("shared_experts.", "") and (tensor.dtype == FP8 or scales is not None):
            found.append(check_scales(tensor, scales, block))
    return found


@torch.no_grad()
def dequantise_rest(model: Any, weights: list[Quantised]) -> None:
    """Multiply the weights of a model, into which FP8 values were loaded as they are, by their scales, in place.

    Raises:
        KTAMXModelNotSupportedError: The model has no such weight: it was converted on loading.
    """
    parameters = dict(model.named_parameters())
    skipped = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    for one in weights:
        name = one.weight.name
        known = [other for other in (name, f"model.{name}", name.removeprefix("model.")) if other in parameters]
        if not known and any(pattern.search(name) for pattern in skipped):
            continue  # of layers transformers leaves out, multi-token prediction for one
        if not known or tuple(parameters[known[0]].shape) != one.weight.shape:
            raise KTAMXModelNotSupportedError(
                f"{one.weight} is of FP8, and {type(model).__name__} has no parameter of that name and shape, so its "
                "scales cannot be applied. Give the checkpoint in bfloat16."
            )
        scales = torch.empty(one.scales.shape, dtype=one.scales.dtype, device="cpu")
        read_tensors([(one.scales, scales)])
        weight = parameters[known[0]].data
        dequantise(weight, scales.to(weight.device), one.block, weight)
