"""Checks of the tensors that kt-kernel's operators get by address, and of which the operators check nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import KTAMXConfigError, KTAMXForwardError
from ...shapes import ExpertShape
from ..base import ExpertWeights


def check_tensor(
    tensor: Tensor, name: str, size: tuple[int, ...], dtype: torch.dtype, label: str, error: type[Exception]
) -> None:
    """Refuse a tensor whose address the operators must not get.

    Args:
        tensor: The tensor to check.
        name: What the message calls it.
        size: The shape that it must have.
        dtype: The dtype that it must have.
        label: The layer's name, for the message.
        error: The class of the exception to raise.

    Raises:
        error: The tensor has another shape or dtype, is not contiguous, or is not on the CPU.
    """
    ok = (
        tuple(tensor.shape) == size and tensor.dtype == dtype and tensor.device.type == "cpu" and tensor.is_contiguous()
    )
    if not ok:
        raise error(
            f"{label}: {name} is {tensor.dtype}, {tuple(tensor.shape)}, strides {tensor.stride()} on {tensor.device}; "
            f"the operators need {dtype}, {size}, contiguous, on the CPU."
        )


def check_inputs(x: Tensor, ids: Tensor, weights: Tensor, shape: ExpertShape, max_len: int, label: str) -> None:
    """Refuse inputs of a forward that the operators would crash on.

    Args:
        x: Hidden states, must be [T, H], bf16.
        ids: Experts of each token, must be [T, K], int64, each -1 (no expert) or below E.
        weights: Routing weights, must be [T, K], fp32.
        shape: The layer's sizes.
        max_len: The largest T that the operators were built for.
        label: The layer's name, for messages.

    Raises:
        KTAMXForwardError: A tensor of another shape, dtype or device; too many tokens; an id that is no expert's.
    """
    T, K = x.shape[0] if x.dim() == 2 else -1, shape.top_k
    check_tensor(x, "hidden_states", (T, shape.hidden_size), torch.bfloat16, label, KTAMXForwardError)
    check_tensor(ids, "top_k_index", (T, K), torch.int64, label, KTAMXForwardError)
    check_tensor(weights, "top_k_weights", (T, K), torch.float32, label, KTAMXForwardError)
    if max_len < T:
        raise KTAMXForwardError(f"{label}: {T} tokens in a call, at most kt_max_len={max_len}.")
    low, high = (int(end) for end in ids.aminmax()) if T else (-1, -1)
    if low < -1 or high >= shape.num_experts:
        raise KTAMXForwardError(
            f"{label}: top_k_index has ids from {low} to {high}; "
            f"allowed are -1 (no expert) and 0 to {shape.num_experts - 1}."
        )


def check_weights(weights: ExpertWeights, shape: ExpertShape, label: str) -> None:
    """Refuse weights to be packed that are not gate_up [E, 2I, H] and down [E, H, I] of a floating dtype.

    Args:
        weights: The weights to check.
        shape: The layer's sizes.
        label: The layer's name, for the message.

    Raises:
        KTAMXConfigError: A tensor has another shape, or is not floating.
    """
    E, H, inner = shape.num_experts, shape.hidden_size, shape.intermediate_size
    low = weights.low_bit
    if low is not None:
        sizes = low.gate_up.shape[1:], low.down.shape[1:]
        if weights.num_experts != E or sizes != ((2 * inner, H), (H, inner)):
            raise KTAMXConfigError(
                f"{label}: {weights.num_experts} experts, those of low bits {sizes[0]} and {sizes[1]}; they must "
                f"be {E} experts of {(2 * inner, H)} and {(H, inner)}."
            )
        E -= len(low.experts)
    for name, tensor, size in (
        ("gate_up_proj", weights.gate_up, (E, 2 * inner, H)),
        ("down_proj", weights.down, (E, H, inner)),
    ):
        if tuple(tensor.shape) != size or not tensor.is_floating_point():
            raise KTAMXConfigError(
                f"{label}: {name} is {tensor.dtype}, {tuple(tensor.shape)}; it must be {size}, floating."
            )
