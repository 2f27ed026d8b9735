"""Copies between GPU and CPU: what arrives, when, and that nobody waits who need not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kt_hf.backends.finite_checks import DeferredChecks, all_finite
from kt_hf.backends.transfer import (
    host_empty,
    lora_to_device,
    split_lora,
    to_device,
    to_host,
    track_reads,
    wait_for_reads,
)
from kt_hf.experts import result_checks
from tests.support.cases import KERNEL_BF16, KERNEL_MARKS, TORCH_BF16, Case
from tests.support.helpers import MIXTRAL
from tests.support.layers import forward_backward, gradients, make_inputs, on_gpu, random_lora, set_lora
from tests.support.models import base_weights
from tests.support.one_layer import expected_grads
from tests.support.reference import assert_all_close
from tests.support.tiered import split_model

CASES = [pytest.param(KERNEL_BF16, marks=KERNEL_MARKS, id="AMXBF16"), pytest.param(TORCH_BF16, id="torch")]


@pytest.fixture
def no_hidden_waits() -> Iterator[None]:
    """PyTorch raises where an operation waits for the GPU without being asked to."""
    before = torch.cuda.get_sync_debug_mode()
    yield
    torch.cuda.set_sync_debug_mode(before)


def test_to_host() -> None:
    a = torch.randn(1000, 33, device="cuda")
    strided = a.t()
    here = torch.arange(5)
    first, second, third = to_host([a, strided, here], [torch.bfloat16, torch.float32, torch.int64]).wait()
    assert first.is_pinned()
    assert second.is_pinned()
    assert second.is_contiguous()
    assert torch.equal(first, a.bfloat16().cpu())
    assert torch.equal(second, strided.cpu())
    assert third.data_ptr() == here.data_ptr()  # was there already


def test_copies_wait_for_what_makes_their_source() -> None:
    """The GPU is busy for a while before it writes the values."""
    a = torch.zeros(1 << 22, device="cuda")
    torch.cuda._sleep(100_000_000)
    a += 7
    (there,) = to_host([a], [torch.bfloat16]).wait()
    assert torch.equal(there, torch.full_like(there, 7))


def test_to_device() -> None:
    for source in (torch.randn(100, 8), host_empty((100, 8), torch.float32).normal_(), torch.randn(8, 100).t()):
        for dtype in (None, torch.bfloat16):
            moved = to_device(source, torch.device("cuda"), dtype)
            assert torch.equal(moved.cpu(), source.to(dtype or source.dtype))


SIZES = [(8, 4, 300), (8, 50, 4), (8, 4, 300), (8, 50, 4), (8, 4, 50), (8, 300, 4)]


@pytest.mark.parametrize("how", ["pinned", "together", "pageable"])
def test_six_to_device(how: str) -> None:
    """Owned by somebody who writes to them again at once, while the GPU is busy yet: after a wait for pinned ones."""
    six = tuple(torch.randn(size).bfloat16() for size in SIZES)
    expected = [t.clone() for t in six]
    if how == "together":
        six = split_lora(torch.cat([six[i].flatten() for i in (0, 2, 4, 1, 3, 5)]), SIZES)
    elif how == "pinned":
        six = tuple(host_empty(size, torch.bfloat16).copy_(t) for size, t in zip(SIZES, six, strict=True))
    if how == "pinned":
        six = track_reads(six)
    torch.cuda._sleep(2_000_000_000)  # about a second
    (slept := torch.cuda.Event()).record()
    there = lora_to_device(six, torch.device("cuda"))
    assert not slept.query(), "it has waited for the GPU"
    wait_for_reads(six)
    for tensor in six:
        tensor.fill_(7)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(there, expected, strict=True))
    assert len({t.untyped_storage().data_ptr() for t in there}) == 1


def test_a_buffer_is_not_overwritten_in_flight() -> None:
    """Its owner waits, though the GPU gets to the copy late."""
    torch.zeros(1, device="cuda")
    (buffer,) = track_reads((host_empty((1 << 22,), torch.float32).fill_(1),))
    assert buffer.is_pinned()
    torch.cuda._sleep(100_000_000)
    moved = to_device(buffer, torch.device("cuda"))
    wait_for_reads([buffer])
    buffer.fill_(2)
    assert torch.equal(moved, torch.ones_like(moved))


def test_doubts_come_late_and_surely() -> None:
    doubts = DeferredChecks()

    def judged(passed: Tensor) -> ValueError | None:
        return None if passed else ValueError("NaN")

    doubts.add(judged, all_finite(torch.ones(3, device="cuda")))
    doubts.settle(wait=True)
    doubts.add(judged, all_finite(torch.tensor([1, float("nan")], device="cuda")))
    with pytest.raises(ValueError, match="NaN"):
        doubts.settle(wait=True)
    doubts.settle(wait=True)


@pytest.fixture(params=["looked through by the CPU", "by the GPU"])
def results(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who looks whether results of the CPU are finite: tiny models' are always small."""
    if request.param == "by the GPU":
        monkeypatch.setattr(result_checks, "_SMALL", 0)


@pytest.mark.parametrize("tokens", [64, 1])
@pytest.mark.parametrize("where", ["cpu", "gpu"])
@pytest.mark.parametrize("gpu", [[1, 4, 6], []], ids=["split", "all on the CPU"])
@pytest.mark.parametrize("case", CASES)
def test_nothing_waits_in_secret(
    case: Case, gpu: list[int], where: str, tokens: int, results: None, no_hidden_waits: None
) -> None:
    """Forward and backward of a layer wait by events alone, once each way."""
    model = split_model(case, gpu, kt_moe_lora_device=where).cuda()
    layer = model._kt_wrappers[0]
    set_lora(layer, {name: v.to("cuda" if where == "gpu" else "cpu") for name, v in random_lora(MIXTRAL).items()})
    x = on_gpu(make_inputs(MIXTRAL, tokens, case.dtype))
    forward_backward(layer, x)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    leaves = {"hidden": x.hidden.detach().requires_grad_(), "weights": x.weights.detach().requires_grad_()}
    output = layer(leaves["hidden"], x.ids, leaves["weights"])
    found = gradients(output, leaves | layer.lora_params, x.grad_output)
    torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(value).all() for value in found.values())


@pytest.mark.parametrize("where", ["cpu", "gpu"])
@pytest.mark.parametrize("gpu", [[1, 4, 6], []], ids=["split", "all on the CPU"])
@pytest.mark.parametrize("case", CASES)
def test_many_backwards_without_a_wait_between(case: Case, gpu: list[int], where: str, results: None) -> None:
    """Each one's gradients are its own, though the GPU lags behind and buffers are used again."""
    model = split_model(case, gpu, kt_moe_lora_device=where).cuda()
    layer, lora = model._kt_wrappers[0], random_lora(MIXTRAL)
    base = base_weights(MIXTRAL(case.dtype))[0]
    set_lora(layer, {name: v.to("cuda" if where == "gpu" else "cpu") for name, v in lora.items()})
    inputs = [make_inputs(MIXTRAL, 30 + seed, case.dtype, seed) for seed in range(6)]
    there = [on_gpu(x) for x in inputs]
    found = []
    for x in there:
        torch.cuda._sleep(2_000_000)
        found.append(forward_backward(layer, x).grads)
    for x, grads in zip(inputs, found, strict=True):
        assert_all_close({k: v.cpu() for k, v in grads.items()}, expected_grads(x, base, lora), case.grad)
