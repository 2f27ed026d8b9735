"""Packing a layer's experts in up to three parts: resident on the GPU, streamed to it, and packed for the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import KTAMXConfigError
from ..shapes import ExpertShape
from .base import ExpertsBackend, ExpertWeights
from .gpu.grouped_mm import DTYPE
from .gpu.pinned_weights import HostWeights
from .gpu.resident import gpu_backend
from .gpu.streamed import StreamedBackend
from .gpu.weight_stream import Streamer
from .tiered import TieredBackend

# Copied weights of a part, and the rows of the layer's `gate_up` and `down` that they come from.
_Copy = tuple[ExpertWeights | HostWeights, list[int]]


def build_tiered(
    weights: ExpertWeights,
    shape: ExpertShape,
    resident: Sequence[int],
    streamed: Sequence[int],
    streamer: Streamer,
    dtype: torch.dtype,
    pack_cpu: Callable[[ExpertWeights, ExpertShape], ExpertsBackend],
    must_lock: bool = True,
) -> ExpertsBackend:
    """Build a layer's backend whose experts `resident` and `streamed` are computed on a GPU, and the rest on the CPU.

    Args:
        weights: Taken over and emptied. If packing is interrupted they are whole again afterwards. Those that are
            `scaled` must be the streamed ones.
        shape: The layer's sizes.
        resident: Ids of the experts whose weights are copied to the GPU, in `dtype`.
        streamed: Ids of the experts whose weights stay in host memory, none of them resident; `dtype` must be bf16
            then. If all experts are streamed, the memory of `weights` is taken over as it is.
        streamer: The model's streamer; its device is the GPU.
        dtype: The dtype of the weights on the GPU.
        pack_cpu: Builds the backend of the remaining experts around weights that it takes over.
        must_lock: Whether it is an error if the system refuses to page-lock memory.

    Raises:
        KTAMXConfigError: Experts that cannot be streamed.
        KTAMXError: The system refuses to page-lock their memory.
    """
    resident, streamed = sorted(resident), sorted(streamed)
    rest = [e for e in range(shape.num_experts) if e not in {*resident, *streamed}]
    if streamed and dtype != DTYPE:
        raise KTAMXConfigError(
            f"kt_expert_placement: experts are streamed in bfloat16, this model's are {dtype}. Load it with "
            "dtype=torch.bfloat16, or leave all experts resident or on the CPU."
        )
    assert weights.scaled is None or list(weights.scaled.experts) == streamed
    copies: list[_Copy] = []
    parts: list[tuple[ExpertsBackend, list[int]]] = []
    if resident:
        gpu_weights = _rows(weights, resident, streamer.device, dtype)
        copies.append((gpu_weights, weights.rows_of(resident)))
        parts.append((gpu_backend(gpu_weights, shape.part(len(resident))), resident))
    if streamed:
        host_weights = _host_weights(weights, streamed, must_lock)
        if weights.scaled is None:
            copies.append((host_weights, streamed))  # the scaled ones stay as they are
        bias = _bias_of(weights, streamed)
        parts.append((StreamedBackend(host_weights, shape.part(len(streamed)), streamer, bias), streamed))
    if rest:
        weights.packed_as = _pack_rest(weights, shape, rest, copies, parts, pack_cpu)
    else:
        weights.gate_up = weights.down = torch.empty(0)
        weights.packed_as = _together(parts, shape)
    return weights.packed_as


def _pack_rest(
    weights: ExpertWeights,
    shape: ExpertShape,
    rest: list[int],
    copies: list[_Copy],
    parts: list[tuple[ExpertsBackend, list[int]]],
    pack_cpu: Callable[[ExpertWeights, ExpertShape], ExpertsBackend],
) -> ExpertsBackend:
    """The layer's backend: `parts` on the GPU, and `rest` packed for the CPU; empties `weights`."""
    dtype, device = weights.gate_up.dtype, weights.gate_up.device
    cpu_weights = _rows(weights, rest, device, dtype)
    copies = [*copies, (cpu_weights, weights.rows_of(rest))]
    weights.gate_up = weights.down = torch.empty(0)  # released before the packed copy is made
    try:
        return _together([*parts, (pack_cpu(cpu_weights, shape.part(len(rest))), rest)], shape)
    except BaseException:  # KeyboardInterrupt among them
        if cpu_weights.packed_as is not None:
            weights.packed_as = _together([*parts, (cpu_weights.packed_as, rest)], shape)
        else:
            weights.gate_up = _joined([(copy.gate_up, rows) for copy, rows in copies], dtype, device)
            weights.down = _joined([(copy.down, rows) for copy, rows in copies], dtype, device)
        raise


def _together(parts: list[tuple[ExpertsBackend, list[int]]], shape: ExpertShape) -> ExpertsBackend:
    return parts[0][0] if len(parts) == 1 else TieredBackend(parts, shape)


def _host_weights(weights: ExpertWeights, streamed: Sequence[int], must_lock: bool) -> HostWeights:
    if weights.scaled is not None:
        return HostWeights.of_scaled(weights.scaled, must_lock)
    if len(streamed) == len(weights.gate_up):
        return HostWeights.taken_over(weights, must_lock)
    return HostWeights.copied(weights, streamed, must_lock)


def _rows(weights: ExpertWeights, experts: Sequence[int], device: torch.device, dtype: torch.dtype) -> ExpertWeights:
    index = torch.tensor(weights.rows_of(experts), device=weights.gate_up.device)
    gate_up, down = (t.detach().index_select(0, index).to(device, dtype) for t in (weights.gate_up, weights.down))
    bias = _bias_of(weights, experts)
    return ExpertWeights(gate_up, down, gate_up_bias=None if bias is None else bias.to(device, dtype))


def _bias_of(weights: ExpertWeights, experts: Sequence[int]) -> Tensor | None:
    """The biases of gate and up of some experts."""
    return None if weights.gate_up_bias is None else weights.gate_up_bias.detach()[list(experts)]


def _joined(pieces: Sequence[tuple[Tensor, Sequence[int]]], dtype: torch.dtype, device: torch.device) -> Tensor:
    total = sum(len(rows) for _, rows in pieces)
    whole = torch.empty((total, *pieces[0][0].shape[1:]), dtype=dtype, device=device)
    for piece, rows in pieces:
        whole[torch.tensor(list(rows), device=device)] = piece.to(device, dtype)
    return whole
