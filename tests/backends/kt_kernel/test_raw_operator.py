"""`raw_operator`, which benchmarks call without the checks around it."""

from __future__ import annotations

import torch
from torch import Tensor

from kt_hf.backends import ExpertWeights
from kt_hf.backends.kt_kernel.backend import KTKernelBackend
from kt_hf.shapes import ExpertShape
from kt_hf.system.cpu import ThreadPlan
from tests.support.cases import KERNEL_MARKS

pytestmark = list(KERNEL_MARKS)
E, K, H, INNER, T = 8, 2, 64, 96, 16


def backend() -> KTKernelBackend:
    generator = torch.Generator().manual_seed(0)
    gate_up = torch.randn(E, 2 * INNER, H, generator=generator).bfloat16()
    down = torch.randn(E, H, INNER, generator=generator).bfloat16()
    plan = ThreadPlan(((0, 1),))
    return KTKernelBackend(
        ExpertWeights(gate_up, down), ExpertShape(E, K, H, INNER), 0, plan, 64, False, False, "layer 0"
    )


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(T, H, generator=generator).bfloat16()
    return x, torch.rand(T, E, generator=generator).topk(K).indices, torch.rand(T, K, generator=generator)


def test_it_computes_what_the_backend_computes() -> None:
    experts, (x, ids, weights) = backend(), inputs()
    expected, _ = experts.forward(x, ids, weights, save=False)
    out, length = torch.empty_like(x), torch.tensor([T], dtype=torch.int32)
    operator = experts.raw_operator()
    operator.forward_sft(
        length.data_ptr(), K, ids.data_ptr(), weights.data_ptr(), x.data_ptr(), out.data_ptr(), False
    )  # fmt: skip
    assert torch.equal(out, expected)


def test_the_forward_saved_before_is_forgotten() -> None:
    experts, (x, ids, weights) = backend(), inputs()
    _, saved = experts.forward(x, ids, weights, save=True)
    assert saved is not None
    assert experts.can_backward(saved)
    experts.raw_operator()
    assert not experts.can_backward(saved)
