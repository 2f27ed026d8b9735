"""What a backend gives back of the LoRA it holds, and parts that are no whole layer."""

from __future__ import annotations

import pytest
import torch

from kt_hf.backends import ExpertWeights, TorchBackend
from kt_hf.backends.tiered import TieredBackend
from kt_hf.shapes import ExpertShape

SHAPE = ExpertShape(4, 2, 16, 12)


def backend(shape: ExpertShape) -> TorchBackend:
    E, H, I = shape.num_experts, shape.hidden_size, shape.intermediate_size  # noqa: E741
    return TorchBackend(ExpertWeights(torch.randn(E, 2 * I, H), torch.randn(E, H, I)), shape)


@pytest.mark.parametrize("rank", [4, 64])
def test_a_copy_is_what_was_set(rank: int) -> None:
    """B of gate and up lie together for small ranks, apart for large ones."""
    held, tensors = backend(SHAPE), tuple(torch.randn(size) for size in SHAPE.lora_shapes(rank))
    held.set_lora(tensors)
    assert all(torch.equal(copy, tensor) for copy, tensor in zip(held.lora_copy(), tensors, strict=True))


@pytest.mark.parametrize("experts", [([0, 1], [2]), ([0, 1], [1, 2, 3]), ([0, 1], [2, 4])])
def test_parts_hold_each_expert_once(experts: tuple[list[int], ...]) -> None:
    parts = [(backend(ExpertShape(len(ids), 2, 16, 12)), ids) for ids in experts]
    with pytest.raises(ValueError, match="are not those of a layer of 4"):
        TieredBackend(parts, SHAPE)
