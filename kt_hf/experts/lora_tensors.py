"""Gradients of the LoRA parameters, from those a backend gives for its padded, scaled tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import Gradients
from ..backends.buffer_pool import empty
from ..backends.transfer import apart, b_of, joined

# Of a projection and adapter: index of A among the six, first row, rank, scaling.
LoraPart = tuple[int, int, int, float]


def parameter_gradients(gradients: Gradients, parts: list[LoraPart], dtype: torch.dtype) -> list[Tensor]:
    """Gradients of A and B of each part, from the six of the padded backend tensors.

    Their memory is their own, one for all of them perhaps. They are in fp32, unless the six are of the parameters'
    dtype: nothing is to be gained then, for the scaling is multiplied in fp32 anyway and rounded.

    Args:
        gradients: With LoRA's: six tensors [E, r, in] and [E, out, r].
        parts: Of each adapter and projection; the scaling is folded into B.
        dtype: Of the parameters.
    """
    six = gradients.lora
    target = dtype if six[0].dtype == dtype else torch.float32
    free = gradients.lora_is_free and six[0].dtype == target
    if len(parts) == 3 and all(rank == six[0].shape[1] for _, _, rank, _ in parts):
        return _of_one_adapter(six, [part[3] for part in parts], target, free)
    free = free and joined(six) is None  # a part of their memory would keep all of it
    made: list[Tensor] = []
    for index, offset, rank, scaling in parts:
        for narrow in (six[index][:, offset : offset + rank], six[index + 1][:, :, offset : offset + rank]):
            if free and narrow.is_contiguous():
                made.append(narrow)
            else:
                made.append(empty(tuple(narrow.shape), target, narrow.device).copy_(narrow))
        if scaling != 1.0:
            made[-1].mul_(scaling)
    return made


def _of_one_adapter(six: tuple[Tensor, ...], scalings: list[float], target: torch.dtype, free: bool) -> list[Tensor]:
    """Of one adapter of the backend's rank on all projections: in as few passes as can be."""
    flat = joined(six)
    if free and all(tensor.is_contiguous() for tensor in six):
        made = six
    elif flat is None:
        made = tuple(empty(tuple(tensor.shape), target, tensor.device).copy_(tensor) for tensor in six)
    else:
        flat = empty(tuple(flat.shape), target, flat.device).copy_(flat)
        made = apart(flat, [tensor.shape for tensor in six])
    if flat is not None and len(set(scalings)) == 1:
        _scale(b_of(flat, six), scalings[0])
    else:
        for b, scaling in zip(made[1::2], scalings, strict=True):
            _scale(b, scaling)
    return list(made)


def _scale(b: Tensor, scaling: float) -> None:
    if scaling != 1.0:
        b.mul_(scaling)
