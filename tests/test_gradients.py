"""Gradients of LoRA parameters: their dtype, their scaling, and the memory they are in."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn

from kt_hf.gradients import Recycled, parameter_gradients
from tests.conftest import KERNEL_BF16, KERNEL_MARKS, TORCH_BF16, Case
from tests.families.layers import forward_backward, make_inputs, random_lora, set_lora
from tests.families.patched import adapted_model
from tests.helpers import MIXTRAL

E, R, H, I = 3, 8, 20, 12  # noqa: E741
PARTS = [(0, 0, 4, 1.5), (0, 4, 3, 0.3), (2, 0, 8, 1.0), (4, 1, 2, 2.0)]


def six(dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((E, R, H), (E, I, R), (E, R, H), (E, I, R), (E, R, I), (E, H, R))
    return tuple(torch.randn(size, generator=generator).to(dtype) for size in sizes)


@pytest.mark.parametrize("memory", [None, Recycled()], ids=["new", "recycled"])
@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_slices_are_scaled_and_rounded_once(
    dtype: torch.dtype, wanted: torch.dtype, free: bool, memory: Recycled | None
) -> None:
    given = six(dtype)
    found = parameter_gradients(tuple(t.clone() for t in given), PARTS, free, memory, wanted)
    expected = []
    for index, offset, rank, scaling in PARTS:
        expected.append(given[index][:, offset : offset + rank].float())
        expected.append(given[index + 1][:, :, offset : offset + rank].float() * scaling)
    for actual, exact in zip(found, expected, strict=True):
        assert actual.is_contiguous()
        assert actual.dtype == (wanted if wanted == dtype else torch.float32)
        assert torch.equal(actual.to(wanted), exact.to(wanted))


def test_they_are_in_memory_of_their_own() -> None:
    given = six(torch.bfloat16)
    for memory in (None, Recycled()):
        found = parameter_gradients(given, PARTS, False, memory, torch.bfloat16)
        kept = [t.clone() for t in found]
        for tensor in given:
            tensor.add_(1)
        assert all(torch.equal(a, b) for a, b in zip(found, kept, strict=True))


def test_memory_comes_back_with_the_last_reference() -> None:
    memory = Recycled()
    first = memory.empty((5, 7), torch.float32)
    address, part = first.data_ptr(), first.view(-1)[3:].detach()
    del first
    assert memory.empty((5, 7), torch.float32).data_ptr() != address, "taken from a tensor that is still there"
    part.fill_(3)
    del part
    gc.collect()
    again = {memory.empty((7, 5), torch.float32).data_ptr()} | {memory.empty((5, 7), torch.float32).data_ptr()}
    assert address in again, "as many bytes, so the same memory"
    assert memory.empty((5, 7), torch.bfloat16).nbytes == 70
    assert memory.empty((0, 7), torch.float32).shape == (0, 7)


def test_memory_of_another_layout_is_not_kept() -> None:
    """Of an adapter of another rank, and after training; sizes that take turns keep theirs."""
    memory = Recycled()
    for _ in range(3):
        addresses = [memory.empty((n, 7), torch.float32).data_ptr() for n in (5, 6)]
    assert [memory.empty((n, 7), torch.float32).data_ptr() for n in (5, 6)] == addresses
    assert sum(map(len, memory._free.values())) == 2
    held = memory.empty((9, 7), torch.float32)
    assert sum(map(len, memory._free.values())) == 0
    del held
    gc.collect()
    assert sum(map(len, memory._free.values())) == 1
    memory.release()
    assert sum(map(len, memory._free.values())) == 0


def test_tensors_outlive_the_memory_they_are_of() -> None:
    memory = Recycled()
    tensor = memory.empty((4, 4), torch.float32).fill_(2)
    del memory
    gc.collect()
    assert tensor.sum() == 32


def test_gradients_accumulate_and_are_freed_as_ever() -> None:
    """What autograd keeps is ours; the next backward must not write to it."""
    memory, parameter = Recycled(), nn.Parameter(torch.zeros(4, 6))

    class Given(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, p: Tensor) -> Tensor:
            return p.sum()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            return memory.empty((4, 6), torch.float32).fill_(float(grad))

    Given.apply(parameter).backward()
    taken = parameter.grad
    assert taken is not None
    kept = taken.detach()
    (3 * Given.apply(parameter)).backward()
    assert torch.equal(parameter.grad, torch.full((4, 6), 4.0))
    parameter.grad = None
    (5 * Given.apply(parameter)).backward()
    assert torch.equal(kept, torch.full((4, 6), 4.0)), "written to while somebody holds it"
    assert torch.equal(parameter.grad, torch.full((4, 6), 5.0))


@pytest.mark.parametrize(
    "case", [pytest.param(TORCH_BF16, id="torch"), pytest.param(KERNEL_BF16, marks=KERNEL_MARKS, id="AMXBF16")]
)
def test_parameters_in_bf16_get_the_same_gradients_rounded(case: Case) -> None:
    layer = adapted_model(MIXTRAL, case)._kt_wrappers[0]
    lora = {name: value.bfloat16().float() for name, value in random_lora(MIXTRAL).items()}
    x, found = make_inputs(MIXTRAL, 37, case.dtype), {}
    for dtype in (torch.float32, torch.bfloat16):
        for parameter in layer.lora_params.values():
            parameter.data = parameter.data.to(dtype)
        set_lora(layer, lora)
        found[dtype] = forward_backward(layer, x).grads
    for name, grad in found[torch.bfloat16].items():
        assert torch.equal(grad.bfloat16(), found[torch.float32][name].bfloat16()), name
    assert all(found[torch.bfloat16][name].dtype == torch.bfloat16 for name in layer.lora_params)
