"""The parts on the GPU are launched while the operators compute; what goes wrong there leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.conftest import KERNEL_BF16, KERNEL_MARKS, TORCH_BF16, Case
from tests.families.layers import forward_backward
from tests.one_layer import inputs
from tests.reference import assert_all_close, assert_close, experts_forward_backward
from tests.split.models import tiered_layer

TIERS = [1, 4], [0, 6]


def told(call: Any, what: Callable[[str], None], tier: str) -> Any:
    def calling(*args: Any) -> Any:
        what(tier)
        result = call(*args)
        what(f"{tier} done")
        return result

    return calling


def watched(layer: Any, name: str, what: Callable[[str], None]) -> None:
    """Call `what` with a tier's name when its backend's method begins, and again, with "done", when it ends."""
    for tier, part in zip(("resident", "streamed", "cpu"), layer._runner.backend.parts, strict=True):
        method = f"{name}_counted" if (name, tier) == ("forward", "streamed") else name
        method = f"{name}_beside" if hasattr(part.backend, f"{name}_beside") else method
        setattr(part.backend, method, told(getattr(part.backend, method), what, tier))


@pytest.mark.parametrize(("case", "beside"), [pytest.param(KERNEL_BF16, True, marks=KERNEL_MARKS), (TORCH_BF16, False)])
@pytest.mark.parametrize("name", ["forward", "backward"])
def test_the_order_of_launches(case: Case, beside: bool, name: str) -> None:
    """Here the resident experts are on the CPU too; a test on a GPU has them launched with the streamed ones."""
    layer, _, _ = tiered_layer(case, *TIERS)
    seen: list[str] = []
    watched(layer, name, seen.append)
    forward_backward(layer, inputs(case))
    resident, streamed = ["resident", "resident done"], ["streamed", "streamed done"]
    expected = [*resident, "cpu", *streamed, "cpu done"] if beside else [*streamed, *resident, "cpu", "cpu done"]
    assert seen == expected


@pytest.mark.parametrize("case", [pytest.param(KERNEL_BF16, marks=KERNEL_MARKS), TORCH_BF16])
@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError], ids=lambda error: error.__name__)
@pytest.mark.parametrize("name", ["forward", "backward"])
def test_a_launch_that_fails(case: Case, name: str, error: type[BaseException]) -> None:
    """The operators are waited for, and the next step is right."""
    layer, base, lora = tiered_layer(case, *TIERS)
    x, failing = inputs(case), ["streamed"]

    def fail_once(tier: str) -> None:
        if tier in failing:
            failing.clear()
            raise error("in the middle")

    watched(layer, name, fail_once)
    with pytest.raises(error, match="in the middle"):
        forward_backward(layer, x)
    actual, expected = forward_backward(layer, x), experts_forward_backward(*x, base, lora, 1.5)
    assert_close(actual.output, expected.output, case.forward, "output")
    assert_all_close(actual.grads, expected.grads, case.grad)
