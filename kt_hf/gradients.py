"""fp32 gradients of the LoRA parameters, from those a backend gives for its padded, scaled tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def parameter_gradients(
    gradients: tuple[Tensor, ...], parts: list[tuple[int, int, int, float]], free: bool = False
) -> list[Tensor]:
    """Gradients of A and B of each part, fp32 and in memory of their own, from the six of the padded backend tensors.

    Args:
        gradients: Six tensors [E, r, in] and [E, out, r], which the backend may overwrite later.
        parts: Of each adapter and projection: index of A among the six, first row, rank, scaling (folded into B).
        free: The six are memory that nobody else uses: what is in fp32 already need not be copied.
    """
    made: list[Tensor] = []
    for index, offset, rank, scaling in parts:
        for narrow in (gradients[index][:, offset : offset + rank], gradients[index + 1][:, :, offset : offset + rank]):
            wide = narrow.to(torch.float32, copy=not (free and narrow.is_contiguous()))
            made.append(wide.contiguous())
        if scaling != 1.0:
            made[-1].mul_(scaling)
    return made
