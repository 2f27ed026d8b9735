"""fp32 gradients of the LoRA parameters, from those a backend gives for its padded, scaled tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def parameter_gradients(gradients: tuple[Tensor, ...], parts: list[tuple[int, int, int, float]]) -> list[Tensor]:
    """Gradients of A and B of each part, fp32 and in memory of their own, from the six of the padded backend tensors.

    Args:
        gradients: Six tensors [E, r, in] and [E, out, r], which the backend may overwrite later.
        parts: Of each adapter and projection: index of A among the six, first row, rank, scaling (folded into B).
    """
    made: list[Tensor] = []
    for index, offset, rank, scaling in parts:
        made.append(gradients[index][:, offset : offset + rank].to(torch.float32, copy=True))
        made.append(gradients[index + 1][:, :, offset : offset + rank].to(torch.float32, copy=True))
        if scaling != 1.0:
            made[-1].mul_(scaling)
    return made
