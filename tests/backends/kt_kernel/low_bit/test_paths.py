"""What must hold for every backend, once more for AMXInt8 and AMXInt4: the tests are those of other modules."""

from __future__ import annotations

from typing import Any

import pytest

from tests.backends.kt_kernel import test_gate_overflow
from tests.experts import (
    test_adapters,
    test_checkpointing,
    test_errors,
    test_fresh_lora,
    test_inputs,
    test_layer,
    test_order,
    test_tickets,
)
from tests.peft_compat import test_peft
from tests.placement import test_packer
from tests.support.cases import KERNEL_MARKS, Case
from tests.support.low_bit import INT4, INT8

pytestmark = list(KERNEL_MARKS)

BOTH = {
    test_tickets: ("backwards_in_any_order", "lora_changed_between_forward_and_backward"),
    test_checkpointing: ("checkpointing_with_forwards_in_between", "pieces_under_checkpointing"),
    test_gate_overflow: ("calls_of_every_kind",),
    test_inputs: ("ids_and_layouts",),
    test_layer: ("with_random_lora", "untouched_experts_get_a_gradient_of_exactly_zero", "fresh_adapter_is_the_base"),
    test_packer: ("smaller_ranks_are_padded",),
}
INT8_ALONE = {
    test_tickets: (
        "adapters_switched_between_forward_and_backward",
        "second_backward_after_retain_graph",
        "accumulated_gradients_keep_their_memory",
    ),
    test_errors: ("no_tokens",),
    test_checkpointing: ("checkpointing",),
    test_adapters: ("one_adapter", "several_active_adapters", "adapters_added_switched_and_deleted"),
    test_fresh_lora: ("seen_without_a_word",),
    # A single token's routing gradient may cancel to nothing beside INT4's error.
    test_layer: ("without_adapter",),
    test_order: (
        "between_forward_and_backward_of_a_layer",
        "two_forwards_before_one_backward_of_a_layer",
        "gradient_mode_changes_no_output",
    ),
    test_peft: ("disabled_adapter_is_the_base_to_the_bit", "switching_adapters"),
}


def _of(names: dict[Any, tuple[str, ...]]) -> dict[str, Any]:
    return {f"test_{name}": getattr(module, f"test_{name}") for module, them in names.items() for name in them}


class TestInt8:
    @pytest.fixture
    def case(self) -> Case:
        return INT8


class TestInt4:
    @pytest.fixture
    def case(self) -> Case:
        return INT4


for _name, _test in (_of(BOTH) | _of(INT8_ALONE)).items():
    setattr(TestInt8, _name, staticmethod(_test))
for _name, _test in _of(BOTH).items():
    setattr(TestInt4, _name, staticmethod(_test))


@pytest.mark.parametrize("case", [INT8, INT4], ids=str)
@pytest.mark.parametrize("least", [-88.2, -1e3])
def test_gates_far_below_zero(case: Case, least: float) -> None:
    """The products with packed weights that mend such tokens are of the same arithmetic as the rest."""
    test_gate_overflow.test_gates_far_below_zero(case, [0, 1, 17, 36], least)
