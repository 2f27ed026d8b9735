"""What a model gives to a layer of experts, looked at before anything is computed."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import KTAMXForwardError
from ..shapes import ExpertShape


def check_inputs(label: str, shape: ExpertShape, x: Tensor, ids: Tensor, weights: Tensor) -> None:
    """Refuse inputs of a forward that have a wrong shape or dtype.

    Args:
        label: The layer's name, for the message.
        shape: Its sizes.
        x: Hidden states, to be [T, H], floating.
        ids: To be [T, K] integers, K at most the model's.
        weights: To be [T, K], floating.

    Raises:
        KTAMXForwardError: Naming what is wrong.
    """
    problem = None
    if x.dim() != 2 or x.shape[1] != shape.hidden_size or not x.is_floating_point():
        problem = f"hidden_states is {x.dtype}, {tuple(x.shape)}; it must be floating, [T, {shape.hidden_size}]"
    elif ids.shape != weights.shape or ids.dim() != 2 or ids.shape[0] != x.shape[0]:
        problem = (
            f"top_k_index is {tuple(ids.shape)} and top_k_weights {tuple(weights.shape)}; both must be "
            f"[{x.shape[0]}, K]"
        )
    elif ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool or not weights.is_floating_point():
        problem = f"top_k_index is {ids.dtype}, top_k_weights {weights.dtype}; they must be integer and floating"
    elif ids.shape[1] > shape.top_k:
        problem = (
            f"top_k_index sends a token to {ids.shape[1]} experts, but the model's config says {shape.top_k} "
            "(num_experts_per_tok): set it before apply_kt_moe"
        )
    elif x.is_cuda and torch.cuda.is_current_stream_capturing():
        problem = "experts on the CPU cannot be captured in a CUDA graph: switch CUDA graphs off"
    if problem:
        raise KTAMXForwardError(f"{label}: {problem}.")


def within(ids: Tensor, count: int) -> bool:
    """Whether ids on the CPU are each in [0, count) or -1."""
    low, high = map(int, ids.aminmax()) if ids.numel() else (-1, -1)
    return low >= -1 and high < count


def prepared(
    x: Tensor, ids: Tensor, weights: Tensor, shape: ExpertShape, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """A layer's inputs as a backend takes them, on the devices they are on.

    Ids of no expert become -1, columns that are missing to K are filled with -1 and weight 0.

    Args:
        x: [T, H], any floating dtype.
        ids: [T, at most K] integers.
        weights: [T, at most K], floating.
        shape: The layer's sizes.
        dtype: The backend's.
    """
    ids = ids.detach().to(torch.int64)
    if ids.is_cuda or not within(ids, shape.num_experts):
        ids = ids.masked_fill((ids < 0) | (ids >= shape.num_experts), -1)
    weights = weights.detach().to(torch.float32)
    missing = shape.top_k - ids.shape[1]
    if missing > 0:
        ids = torch.nn.functional.pad(ids, (0, missing), value=-1)
        weights = torch.nn.functional.pad(weights, (0, missing))
    return x.detach().to(dtype).contiguous(), ids.contiguous(), weights.contiguous()
