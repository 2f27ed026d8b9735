"""Gradients of the LoRA parameters, from those a backend gives for its padded, scaled tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from .backends.recycled import empty
from .backends.transfer import apart, joined


def parameter_gradients(
    gradients: tuple[Tensor, ...],
    parts: list[tuple[int, int, int, float]],
    free: bool = False,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Gradients of A and B of each part, from the six of the padded backend tensors.

    Their memory is their own, one for all of them perhaps. They are in fp32, unless the six are of the parameters'
    dtype: nothing is to be gained then, for the scaling is multiplied in fp32 anyway and rounded.

    Args:
        gradients: Six tensors [E, r, in] and [E, out, r], which the backend may overwrite later.
        parts: Of each adapter and projection: index of A among the six, first row, rank, scaling (folded into B).
        free: The six are memory that nobody else uses: what is in the right dtype need not be copied.
        dtype: Of the parameters.
    """
    target = dtype if gradients[0].dtype == dtype else torch.float32
    held = joined(gradients)
    whole = len(parts) == 3 and all(rank == gradients[index].shape[1] for index, _, rank, _ in parts)
    if held is not gradients and whole and not (free and held[0].dtype == target):  # in one pass
        flat = empty(tuple(held[0].shape), target, held[0].device).copy_(held[0])
        gradients, free = apart(flat, [tensor.shape for tensor in gradients]), True
    made: list[Tensor] = []
    for index, offset, rank, scaling in parts:
        for narrow in (gradients[index][:, offset : offset + rank], gradients[index + 1][:, :, offset : offset + rank]):
            if free and narrow.dtype == target and narrow.is_contiguous():
                made.append(narrow)
            else:
                made.append(empty(tuple(narrow.shape), target, narrow.device).copy_(narrow))
        if scaling != 1.0:
            made[-1].mul_(scaling)
    return made
