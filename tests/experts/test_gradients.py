"""Gradients of LoRA parameters: their dtype, their scaling, and the memory they are in."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

from kt_hf.backends import Gradients
from kt_hf.backends.buffer_pool import BUFFER_POOL
from kt_hf.backends.transfer import flat_lora, lora_b_part, split_lora
from kt_hf.experts.lora_tensors import LoraPart, LoraTensors
from kt_hf.shapes import ExpertShape
from tests.support.cases import KERNEL_BF16, KERNEL_MARKS, TORCH_BF16, Case
from tests.support.helpers import MIXTRAL
from tests.support.layers import forward_backward, make_inputs, random_lora, set_lora
from tests.support.patched import adapted_model

E, R, H, I = 3, 8, 20, 12  # noqa: E741
PARTS = [(0, 0, 4, 1.5), (0, 4, 3, 0.3), (2, 0, 8, 1.0), (4, 1, 2, 2.0)]


def of(lora: tuple[Tensor, ...], free: bool = False) -> Gradients:
    """Gradients of which only LoRA's are looked at."""
    return Gradients(torch.empty(0), torch.empty(0), lora, free)


def parameter_gradients(
    gradients: Gradients, places: list[tuple[int, int, int, float]], dtype: torch.dtype
) -> list[Tensor]:
    """As of a layer whose parameters are of `dtype` and lie at these places: index, offset, rank, scaling."""
    lora = LoraTensors([], ExpertShape(E, 2, H, I))
    nothing = torch.nn.Parameter(torch.empty(0, dtype=dtype))
    lora.parts = [LoraPart(nothing, nothing, *place) for place in places]
    return lora.gradients(gradients)


def six(dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((E, R, H), (E, I, R), (E, R, H), (E, I, R), (E, R, I), (E, H, R))
    return tuple(torch.randn(size, generator=generator).to(dtype) for size in sizes)


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_slices_are_scaled_and_rounded_once(dtype: torch.dtype, wanted: torch.dtype, free: bool) -> None:
    given = six(dtype)
    found = parameter_gradients(of(tuple(t.clone() for t in given), free), PARTS, wanted)
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
    found = parameter_gradients(of(given), PARTS, torch.bfloat16)
    kept = [t.clone() for t in found]
    for tensor in given:
        tensor.add_(1)
    assert all(torch.equal(a, b) for a, b in zip(found, kept, strict=True))


def together(given: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor]:
    """The same in one memory, and that."""
    flat = torch.empty(sum(t.numel() for t in given), dtype=given[0].dtype)
    views = split_lora(flat, [t.shape for t in given])
    for view, value in zip(views, given, strict=True):
        view.copy_(value)
    return views, flat


@pytest.mark.parametrize("scalings", [(2.0, 2.0, 2.0), (1.5, 1.0, 2.0)])
@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16], ids=str)
def test_those_that_lie_together_are_made_in_one_pass(
    wanted: torch.dtype, free: bool, scalings: tuple[float, ...]
) -> None:
    """An operator's six gradients, for one adapter of the rank it was built for."""
    apart_ones = six(torch.bfloat16)
    given, flat = together(apart_ones)
    parts = [(2 * i, 0, R, scaling) for i, scaling in enumerate(scalings)]
    found = parameter_gradients(of(given, free), parts, wanted)
    assert flat_lora(found) is not None
    assert (found[0].data_ptr() == flat.data_ptr()) == (free and wanted == torch.bfloat16)
    for one, other in zip(found, parameter_gradients(of(apart_ones), parts, wanted), strict=True):
        assert one.dtype == wanted
        assert one.is_contiguous()
        assert torch.equal(one, other)


def test_a_part_does_not_keep_the_memory_of_all() -> None:
    given, flat = together(six(torch.float32))
    for found in parameter_gradients(of(given, True), [(0, 0, R, 2.0)], torch.float32):
        assert found.untyped_storage().nbytes() < flat.nbytes


def test_large_ones_are_made_in_memory_that_is_used_again() -> None:
    BUFFER_POOL.release()
    given = torch.ones(4, 8, 2**15, dtype=torch.bfloat16), torch.ones(4, 2**15, 8, dtype=torch.bfloat16)
    found = parameter_gradients(of(given), [(0, 0, 8, 2.0)], torch.float32)
    sizes = [tensor.nbytes for tensor in found]
    del found
    gc.collect()
    assert sorted(map(len, BUFFER_POOL._free)) == sizes
    BUFFER_POOL.release()


def test_what_does_not_lie_together_is_left_apart() -> None:
    given, flat = together(six(torch.float32))
    whole = flat_lora(given)
    assert whole is not None
    assert whole.data_ptr() == flat.data_ptr()
    assert torch.equal(whole, flat)
    assert torch.equal(lora_b_part(flat, given), torch.cat([b.flatten() for b in given[1::2]]))
    a, *others = given
    for first in (a.clone(), a.transpose(1, 2), a.view(torch.int32), others[1]):
        assert flat_lora((first, *others)) is None
    assert flat_lora((a, others[0].clone(), *others[1:])) is None


@pytest.mark.parametrize(
    "case", [pytest.param(TORCH_BF16, id="torch"), pytest.param(KERNEL_BF16, marks=KERNEL_MARKS, id="AMXBF16")]
)
def test_parameters_in_bf16_get_the_same_gradients_rounded(case: Case) -> None:
    layer = adapted_model(MIXTRAL, case)._kt_wrappers[0]
    for projection in layer.projections:
        projection.scaling["default"] = 2.0  # exact in bf16, whatever the CPU multiplies in
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
