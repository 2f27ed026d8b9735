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
from .packed import PackedExperts
from .tiered import TieredBackend

# Copied weights of a part, and the rows of the layer's `gate_up` and `down` that they come from.
_Copy = tuple[ExpertWeights, list[int]]


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
        weights: Taken over and emptied. If packing is interrupted they are whole again afterwards. Those of low bits
            stay so on the GPU, and are given so to `pack_cpu` where all of the rest are.
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
    copies: list[_Copy] = []
    parts: list[tuple[ExpertsBackend, list[int]]] = []
    for experts, is_resident in ((resident, True), (streamed, False)):
        for some in _alike(weights, experts):
            part, wide = _on_gpu(weights, shape, some, is_resident, streamer, dtype, must_lock)
            parts.append((part, some))
            if wide is not None:  # those of low bits stay as they are
                copies.append((wide, weights.rows_of(some)))
    if rest:
        weights.packed_as = _pack_rest(weights, shape, rest, copies, parts, pack_cpu)
    else:
        weights.gate_up = weights.down = torch.empty(0)
        weights.low_bit = None
        weights.packed_as = _together(parts, shape)
    return weights.packed_as


def _alike(weights: ExpertWeights, experts: Sequence[int]) -> list[list[int]]:
    """The experts, those of low bits apart from the others."""
    packed = set(weights.low_bit.experts) if weights.low_bit else set()
    split = [e for e in experts if e in packed], [e for e in experts if e not in packed]
    return [part for part in split if part]


def _on_gpu(
    weights: ExpertWeights,
    shape: ExpertShape,
    experts: list[int],
    resident: bool,
    streamer: Streamer,
    dtype: torch.dtype,
    must_lock: bool,
) -> tuple[ExpertsBackend, ExpertWeights | None]:
    """The backend of some experts, all of low bits or none; and the copies of their weights, None if of low bits."""
    part, bias = shape.part(len(experts)), weights.bias_of(experts)
    if weights.low_bit is not None and experts[0] in weights.low_bit.experts:
        low = weights.low_bit.select(experts)
        if dtype != DTYPE:  # grouped products are of bf16
            return gpu_backend(weights.wide(experts, streamer.device, dtype), part), None
        packed = HostWeights.on_gpu(low, streamer.device) if resident else HostWeights.of_packed(low, must_lock)
        return StreamedBackend(packed, part, streamer, bias), None
    if resident:
        wide = weights.wide(experts, streamer.device, dtype)
        return gpu_backend(wide, part), wide
    host = _host_weights(weights, experts, must_lock)
    gate_up, down = host.tensors
    return StreamedBackend(host, part, streamer, bias), ExpertWeights(gate_up, down)


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
    cpu_weights = _for_cpu(weights, rest, device, dtype)
    plain = [e for e in rest if not weights.low_bit or e not in weights.low_bit.experts]
    rows = weights.rows_of(plain)
    weights.gate_up = weights.down = torch.empty(0)  # released before the packed copy is made
    try:
        return _together([*parts, (pack_cpu(cpu_weights, shape.part(len(rest))), rest)], shape)
    except BaseException:  # KeyboardInterrupt among them
        if cpu_weights.packed_as is not None:
            weights.packed_as = _together([*parts, (cpu_weights.packed_as, rest)], shape)
        else:
            copies = [*copies, (cpu_weights.wide([rest.index(e) for e in plain], device, dtype), rows)]
            weights.gate_up = _joined([(copy.gate_up, rows) for copy, rows in copies], dtype, device)
            weights.down = _joined([(copy.down, rows) for copy, rows in copies], dtype, device)
        raise


def _for_cpu(weights: ExpertWeights, rest: list[int], device: torch.device, dtype: torch.dtype) -> ExpertWeights:
    """Copies of the experts `rest`, numbered from 0; if all are of low bits they stay so."""
    low = weights.low_bit
    if low is None or not set(rest) <= set(low.experts):
        return weights.wide(rest, device, dtype)
    some = low.select(rest)
    gate_up, down = (torch.empty((0, *part.shape[1:]), dtype=dtype, device=device) for part in (low.gate_up, low.down))
    packed = PackedExperts(list(range(len(rest))), some.gate_up, some.down)
    bias = None if weights.gate_up_bias is None else weights.gate_up_bias[rest]
    return ExpertWeights(gate_up, down, low_bit=packed, gate_up_bias=bias)


def _together(parts: list[tuple[ExpertsBackend, list[int]]], shape: ExpertShape) -> ExpertsBackend:
    return parts[0][0] if len(parts) == 1 else TieredBackend(parts, shape)


def _host_weights(weights: ExpertWeights, streamed: Sequence[int], must_lock: bool) -> HostWeights:
    if len(streamed) == len(weights.gate_up):
        return HostWeights.taken_over(weights, must_lock)
    return HostWeights.copied(weights, streamed, must_lock)


def _joined(pieces: Sequence[tuple[Tensor, Sequence[int]]], dtype: torch.dtype, device: torch.device) -> Tensor:
    total = sum(len(rows) for _, rows in pieces)
    whole = torch.empty((total, *pieces[0][0].shape[1:]), dtype=dtype, device=device)
    for piece, rows in pieces:
        whole[torch.tensor(list(rows), device=device)] = piece.to(device, dtype)
    return whole
