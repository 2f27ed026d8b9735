"""What of the transfers can be tried without a GPU; tests/backends/gpu/test_transfer.py has the rest."""

from __future__ import annotations

import pytest
import torch

from kt_hf.backends.finite_checks import DeferredChecks
from kt_hf.backends.transfer import pin, to_host
from kt_hf.experts.tickets import Retained


def test_to_host_into_memory_that_is_there() -> None:
    """Also what is on the CPU already: some parameters may be pinned, and come by way of the GPU, and others not."""
    given, into = [torch.randn(3, 4), torch.randn(5)], [torch.zeros(3, 4).bfloat16(), torch.zeros(5).bfloat16()]
    arrived = to_host(given, [torch.bfloat16] * 2, into).wait()
    assert [t.data_ptr() for t in arrived] == [t.data_ptr() for t in into]
    assert all(torch.equal(t, value.bfloat16()) for t, value in zip(into, given, strict=True))


def test_shared_memory_and_views_are_not_moved() -> None:
    shared, whole, plain = torch.ones(4).share_memory_(), torch.ones(8), torch.ones(4)
    parameters = [torch.nn.Parameter(t) for t in (shared, whole[:4], plain)]
    before = [p.data_ptr() for p in parameters]
    for parameter in parameters:
        pin(parameter)
    assert [p.data_ptr() == there for p, there in zip(parameters, before, strict=True)] == [True, True, False]
    assert torch.equal(parameters[2], plain)


@pytest.mark.parametrize("offset", [0, 1])
def test_inputs_are_recognised_wherever_they_lie(offset: int) -> None:
    """An odd offset forbids comparing eight bytes at a time."""
    x, ids = torch.randn(12, 4).bfloat16(), torch.arange(12).view(12, 1)
    whole = torch.rand(14, 1)
    weights = whole[offset : offset + 12]
    kept = Retained(x, ids, weights.clone(), torch.zeros(12, 4))
    assert kept.fits(x.clone(), ids.clone(), weights)
    other = x.clone()
    other[7, 2] += 1
    assert not kept.fits(other, ids, weights)
    assert not kept.fits(x, ids, weights + 1)
    assert not kept.fits(x[:11], ids[:11], weights[:11])
    assert not kept.fits(x, ids.int(), weights)


def test_the_first_that_failed_is_told_and_the_others_forgotten() -> None:
    doubts = DeferredChecks()
    for name, fine in (("a", True), ("b", False), ("c", False)):
        doubts.add(lambda passed, name=name: None if passed else ValueError(name), torch.tensor(fine))
    with pytest.raises(ValueError, match="b"):
        doubts.settle()
    doubts.settle(wait=True)
