"""Gradients of LoRA parameters: their dtype, their scaling, and the memory they are in."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

from kt_hf.backends.recycled import RECYCLED
from kt_hf.backends.transfer import apart, joined
from kt_hf.gradients import parameter_gradients
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


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_slices_are_scaled_and_rounded_once(dtype: torch.dtype, wanted: torch.dtype, free: bool) -> None:
    given = six(dtype)
    found = parameter_gradients(tuple(t.clone() for t in given), PARTS, free, wanted)
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
    found = parameter_gradients(given, PARTS, False, torch.bfloat16)
    kept = [t.clone() for t in found]
    for tensor in given:
        tensor.add_(1)
    assert all(torch.equal(a, b) for a, b in zip(found, kept, strict=True))


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16], ids=str)
def test_those_that_lie_together_are_made_in_one_pass(wanted: torch.dtype, free: bool) -> None:
    """An operator's six gradients, for one adapter of the rank it was built for."""
    apart_ones = six(torch.bfloat16)
    flat = torch.cat([t.flatten() for t in apart_ones])
    given = apart(flat, [t.shape for t in apart_ones])
    parts = [(0, 0, R, 1.5), (2, 0, R, 1.0), (4, 0, R, 2.0)]
    found = parameter_gradients(given, parts, free, wanted)
    assert joined(found) is not found, "one memory"
    assert (found[0].data_ptr() == flat.data_ptr()) == (free and wanted == torch.bfloat16)
    for one, other in zip(found, parameter_gradients(apart_ones, parts, False, wanted), strict=True):
        assert one.dtype == wanted
        assert one.is_contiguous()
        assert torch.equal(one, other)


def test_large_ones_are_made_in_memory_that_is_used_again() -> None:
    RECYCLED.release()
    given = torch.ones(4, 8, 2**15, dtype=torch.bfloat16), torch.ones(4, 2**15, 8, dtype=torch.bfloat16)
    found = parameter_gradients(given, [(0, 0, 8, 2.0)])
    sizes = [tensor.nbytes for tensor in found]
    del found
    gc.collect()
    assert sorted(map(len, RECYCLED._free)) == sizes
    RECYCLED.release()


def test_what_does_not_lie_together_is_left_apart() -> None:
    flat = torch.arange(24.0)
    a, b, c = apart(flat, [(2, 3), (4,), (2, 7)])
    assert torch.equal(joined([a, b, c])[0], flat)
    assert torch.equal(joined([b, c])[0], flat[6:])
    for given in ([a, c], [b, a], [a, b.clone()], [a.t(), b], [a, b.view(torch.int32)]):
        assert joined(given) is given


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
