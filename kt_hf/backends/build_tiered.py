"""Packing a layer's experts in up to three parts: on the GPU, streamed to it, and as the CPU's backend has them."""

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


def build_tiered(
    weights: ExpertWeights,
    shape: ExpertShape,
    resident: Sequence[int],
    streamed: Sequence[int],
    streamer: Streamer,
    dtype: torch.dtype,
    pack_cpu: Callable[[ExpertWeights, ExpertShape], ExpertsBackend],
) -> ExpertsBackend:
    """A layer's backend whose experts `resident` and `streamed` are computed on a GPU, and the others by `pack_cpu`'s.

    Args:
        weights: Taken over and emptied. If packing is interrupted they are whole again afterwards. Those that are
            `scaled` must be the streamed ones.
        shape: Of the layer.
        resident: Ids of the experts that are in the GPU's memory in `dtype`.
        streamed: Ids, others than these, of those whose weights stay in host memory; `dtype` must be bf16 then. If
            they are all, their memory is taken over as it is.
        streamer: Of the model, and with it the GPU.
        dtype: Of the GPU's weights.
        pack_cpu: Builds the backend of the rest around weights that it takes over.

    Raises:
        KTAMXConfigError: Experts that cannot be streamed.
        KTAMXError: The system refuses to page-lock their memory.
    """
    resident, streamed = sorted(resident), sorted(streamed)
    rest = [e for e in range(shape.num_experts) if e not in {*resident, *streamed}]
    source, where = weights.gate_up.dtype, weights.gate_up.device
    if streamed and dtype != DTYPE:
        raise KTAMXConfigError(
            f"kt_expert_placement: experts are streamed in bfloat16, this model's are {dtype}. Load it with "
            "dtype=torch.bfloat16, or leave all experts resident or on the CPU."
        )
    assert weights.scaled is None or list(weights.scaled.experts) == streamed
    held: list[tuple[ExpertWeights | HostWeights, list[int]]] = []  # with their places in `weights`
    parts: list[tuple[ExpertsBackend, list[int]]] = []
    if resident:
        there = _rows(weights, resident, streamer.device, dtype)
        held.append((there, weights.rows_of(resident)))
        parts.append((gpu_backend(there, _held(shape, resident)), resident))
    if streamed:
        host = _host_weights(weights, streamed)
        if weights.scaled is None:
            held.append((host, streamed))  # the scaled ones stay as they are
        parts.append((StreamedBackend(host, _held(shape, streamed), streamer), streamed))
    if not rest:
        weights.gate_up = weights.down = torch.empty(0)
        weights.packed_as = _together(parts, shape)
        return weights.packed_as
    here = _rows(weights, rest, where, source)
    held.append((here, weights.rows_of(rest)))
    weights.gate_up = weights.down = torch.empty(0)  # released before the packed copy is made
    try:
        backend = _together([*parts, (pack_cpu(here, _held(shape, rest)), rest)], shape)
    except BaseException:  # KeyboardInterrupt among them
        if here.packed_as is not None:
            weights.packed_as = _together([*parts, (here.packed_as, rest)], shape)
        else:
            weights.gate_up = _joined([(one.gate_up, places) for one, places in held], source, where)
            weights.down = _joined([(one.down, places) for one, places in held], source, where)
        raise
    weights.packed_as = backend
    return backend


def _together(parts: list[tuple[ExpertsBackend, list[int]]], shape: ExpertShape) -> ExpertsBackend:
    return parts[0][0] if len(parts) == 1 else TieredBackend(parts, shape)


def _held(shape: ExpertShape, experts: Sequence[int]) -> ExpertShape:
    return ExpertShape(len(experts), shape.top_k, shape.hidden_size, shape.intermediate_size)


def _host_weights(weights: ExpertWeights, streamed: Sequence[int]) -> HostWeights:
    if weights.scaled is not None:
        return HostWeights.of_scaled(weights.scaled)
    whole = len(streamed) == len(weights.gate_up)
    return HostWeights.taken_over(weights) if whole else HostWeights.copied(weights, streamed)


def _rows(weights: ExpertWeights, experts: Sequence[int], device: torch.device, dtype: torch.dtype) -> ExpertWeights:
    index = torch.tensor(weights.rows_of(experts), device=weights.gate_up.device)
    gate_up, down = (t.detach().index_select(0, index).to(device, dtype) for t in (weights.gate_up, weights.down))
    return ExpertWeights(gate_up, down)


def _joined(pieces: Sequence[tuple[Tensor, Sequence[int]]], dtype: torch.dtype, device: torch.device) -> Tensor:
    total = sum(len(places) for _, places in pieces)
    whole = torch.empty((total, *pieces[0][0].shape[1:]), dtype=dtype, device=device)
    for piece, places in pieces:
        whole[torch.tensor(list(places), device=device)] = piece.to(device, dtype)
    return whole
