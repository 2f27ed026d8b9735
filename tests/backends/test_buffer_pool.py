"""Memory that large tensors of a step take turns in."""

from __future__ import annotations

import gc
import random

import pytest
import torch
from torch import Tensor, nn

from kt_hf.backends.buffer_pool import BufferPool

MIB = 2**20


def held(memory: BufferPool) -> list[int]:
    gc.collect()
    return sorted(len(block) // MIB for block in memory._free)


def of(memory: BufferPool, mib: int) -> Tensor:
    return memory.empty((mib, MIB), torch.uint8)


def test_memory_comes_back_with_the_last_reference() -> None:
    memory = BufferPool()
    first = of(memory, 2)
    address, part = first.data_ptr(), first.view(-1)[3:].detach()
    del first
    assert of(memory, 2).data_ptr() != address, "taken from a tensor that is still there"
    part.fill_(3)
    del part
    gc.collect()
    two = of(memory, 2), memory.empty((MIB // 2,), torch.float32)
    assert address in {tensor.data_ptr() for tensor in two}
    assert two[1].shape == (MIB // 2,)
    assert two[1].dtype == torch.float32


def test_the_smallest_that_fits_is_taken() -> None:
    memory = BufferPool()
    tensors = [of(memory, n) for n in (8, 2, 4)]
    addresses = [tensor.data_ptr() for tensor in tensors]
    tensors.clear()
    assert held(memory) == [2, 4, 8]
    assert of(memory, 3).data_ptr() == addresses[2]


def test_a_new_block_takes_the_place_of_one_that_is_too_small() -> None:
    memory = BufferPool()
    for n in (2, 3, 5, 4):
        of(memory, n)
        assert len(held(memory)) == 1
    assert held(memory) == [5]


def test_no_more_is_held_than_blocks_were_in_use_at_once() -> None:
    memory, generator = BufferPool(), random.Random(0)
    for _ in range(200):
        length = generator.randint(1, 6)
        step = [of(memory, factor * length) for factor in (1, 3, 2, 1)]
        generator.shuffle(step)
        while step:
            step.pop()
    assert len(held(memory)) == 4
    assert max(held(memory)) <= 18
    memory.release()
    assert held(memory) == []


@pytest.mark.parametrize("size", [(0, 7), (5, 7)])
def test_small_tensors_are_left_to_the_c_library(size: tuple[int, int]) -> None:
    memory = BufferPool()
    assert memory.empty(size, torch.bfloat16).shape == size
    assert held(memory) == []


def test_tensors_outlive_the_memory_they_are_of() -> None:
    memory = BufferPool()
    tensor = of(memory, 1).fill_(2)
    del memory
    gc.collect()
    assert tensor.sum() == 2 * MIB


def test_gradients_accumulate_and_are_freed_as_ever() -> None:
    """What autograd keeps is ours; the next backward must not write to it."""
    memory, parameter = BufferPool(), nn.Parameter(torch.zeros(512, 1024))

    class Given(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, p: Tensor) -> Tensor:
            return p.sum()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            return memory.empty((512, 1024), torch.float32).fill_(float(grad))

    Given.apply(parameter).backward()
    taken = parameter.grad
    assert taken is not None
    kept = taken.detach()
    (3 * Given.apply(parameter)).backward()
    assert (parameter.grad == 4).all()
    parameter.grad = None
    (5 * Given.apply(parameter)).backward()
    assert (kept == 4).all(), "written to while somebody holds it"
    assert (parameter.grad == 5).all()
