"""Triton's kernels compiled before something is timed: a second or two each, the first time on a machine."""

from __future__ import annotations

import torch

from ...shapes import ExpertShape
from ..base import ExpertWeights
from . import kernels
from .grouped_mm import DTYPE, aligned
from .resident import GroupedBackend
from .rows import Addends, Rows


def warm_up(shape: ExpertShape, device: torch.device, rank: int) -> None:
    """Compute one expert of a layer's sizes with few, with more and with many rows, forward and backward.

    Triton compiles its kernels by sizes, rank and the rows of a tile when they are launched first, and keeps them on
    the disk. Nothing happens where it does not run.

    Args:
        shape: The layer's sizes.
        device: The GPU.
        rank: Of the LoRA; 0 is without.
    """
    if not (aligned(shape) and kernels.triton_runs(device)):
        return
    K, H, I = shape.top_k, shape.hidden_size, shape.intermediate_size  # noqa: E741
    gate_up, down = (torch.zeros(1, *size, dtype=DTYPE, device=device) for size in ((shape.up_rows, H), (H, I)))
    bias = gate_up[:, :, 0] if shape.biased else None
    one = GroupedBackend(ExpertWeights(gate_up, down, gate_up_bias=bias), shape.part(1))
    if rank:
        one.set_lora(tuple(torch.zeros(size, device=device) for size in one.shape.lora_shapes(rank)))
    for rows in (1, 17, 257):  # one each of the tiles that `grouped_product` has
        tokens = -(-rows // K)
        x = torch.zeros(tokens, H, dtype=DTYPE, device=device)
        ids = torch.zeros(tokens, K, dtype=torch.int64, device=device)
        even = torch.ones(tokens, K, device=device)
        _, saved = one.forward(x, ids, even, save=True)
        assert saved is not None
        one.backward(saved, x)
    numbers = torch.zeros(1, dtype=torch.int16, device=device)
    sorted_rows, values = Rows.by_expert(ids, even, numbers), torch.zeros(tokens * K, H, dtype=DTYPE, device=device)
    for weighted in (True, False):  # what streamed experts need besides
        sorted_rows.keep(Addends(values, values if rank else None), weighted, values.clone())
    sorted_rows.sum_by_token(Addends(values, None), weighted=False)
