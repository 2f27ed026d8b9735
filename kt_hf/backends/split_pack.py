"""Packing a layer's experts in two parts: the chosen ones on the GPU, the others as the CPU's backend has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .base import ExpertsBackend, ExpertShape, ExpertWeights
from .split import SplitBackend
from .torch_cuda import gpu_backend


def pack_split(
    weights: ExpertWeights,
    shape: ExpertShape,
    gpu: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    pack_cpu: Callable[[ExpertWeights, ExpertShape], ExpertsBackend],
) -> ExpertsBackend:
    """A layer's backend whose experts `gpu` are computed on `device` in `dtype`, and the others by `pack_cpu`'s.

    Args:
        weights: Taken over and emptied. If packing is interrupted they are whole again afterwards.
        shape: Of the layer.
        gpu: Ids of one expert or more.
        device: The GPU.
        dtype: Of the GPU's weights.
        pack_cpu: Builds the backend of the rest around weights that it takes over.
    """
    chosen = sorted(gpu)
    rest = [e for e in range(shape.num_experts) if e not in set(chosen)]
    source, where = weights.gate_up.dtype, weights.gate_up.device
    there = _rows(weights, chosen, device, dtype)
    backend: ExpertsBackend = gpu_backend(there, _held(shape, chosen))
    if not rest:
        weights.gate_up = weights.down = torch.empty(0)
        weights.taken_by = backend
        return backend
    here = _rows(weights, rest, where, source)
    weights.gate_up = weights.down = torch.empty(0)  # released before the packed copy is made
    try:
        backend = SplitBackend([(backend, chosen), (pack_cpu(here, _held(shape, rest)), rest)], shape)
    except BaseException:  # KeyboardInterrupt among them
        if here.taken_by is not None:
            weights.taken_by = SplitBackend([(backend, chosen), (here.taken_by, rest)], shape)
        else:
            weights.gate_up = _joined([(there.gate_up, chosen), (here.gate_up, rest)], source, where)
            weights.down = _joined([(there.down, chosen), (here.down, rest)], source, where)
        raise
    weights.taken_by = backend
    return backend


def _held(shape: ExpertShape, experts: Sequence[int]) -> ExpertShape:
    return ExpertShape(len(experts), shape.top_k, shape.hidden_size, shape.intermediate_size)


def _rows(weights: ExpertWeights, experts: Sequence[int], device: torch.device, dtype: torch.dtype) -> ExpertWeights:
    index = torch.tensor(list(experts), device=weights.gate_up.device)
    gate_up, down = (t.detach().index_select(0, index).to(device, dtype) for t in (weights.gate_up, weights.down))
    return ExpertWeights(gate_up, down)


def _joined(pieces: Sequence[tuple[Tensor, Sequence[int]]], dtype: torch.dtype, device: torch.device) -> Tensor:
    total = sum(len(experts) for _, experts in pieces)
    whole = torch.empty((total, *pieces[0][0].shape[1:]), dtype=dtype, device=device)
    for piece, experts in pieces:
        whole[torch.tensor(list(experts), device=device)] = piece.to(device, dtype)
    return whole
