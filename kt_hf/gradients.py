"""fp32 gradients of the LoRA parameters, from those a backend gives for its padded, scaled tensors."""

from __future__ import annotations

import torch
from torch import Tensor


class GradientMemory:
    """fp32 memory for the LoRA gradients of a layer, used again once nothing else refers to it.

    An optimizer frees gradients each step and the system hands the pages back one fault at a time, which cost more than
    writing them: 5 of 28 ms of a DeepSeek-V2-Lite layer's backward on 15 threads.
    """

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Tensor, int]] = {}

    def like(self, slot: int, gradient: Tensor) -> Tensor:
        """Memory of the gradient's size, [E, …] fp32, contiguous; not cleared."""
        # Private: how many tensors share a storage. Without it, memory is taken anew each time.
        count = getattr(torch._C, "_storage_Use_Count", None)
        if slot in self._kept and count is not None:
            kept, alone = self._kept[slot]
            fits = kept.shape == gradient.shape and kept.device == gradient.device
            if fits and count(kept.untyped_storage()._cdata) == alone:
                return kept.detach()
        kept = torch.empty(gradient.shape, dtype=torch.float32, device=gradient.device)
        if count is not None:
            self._kept[slot] = kept, count(kept.untyped_storage()._cdata)
        return kept.detach()  # a tensor of its own, so that autograd makes it `grad` without a copy


def parameter_gradients(
    gradients: tuple[Tensor, ...], parts: list[tuple[int, int, int, float]], memory: GradientMemory
) -> list[Tensor]:
    """Gradients of A and B of each part, fp32 and their own memory, from the six of the padded backend tensors."""
    made: list[Tensor] = []
    for index, offset, rank, scaling in parts:
        a = gradients[index][:, offset : offset + rank]
        b = gradients[index + 1][:, :, offset : offset + rank]
        made.append(memory.like(len(made), a).copy_(a))
        made.append(memory.like(len(made), b).copy_(b))
        if scaling != 1.0:
            made[-1].mul_(scaling)
    return made
