"""What must hold for every backend, once more for MXFP4, which ends the process at a second saved forward.

The tests are those of other modules. Weights are rounded while they are packed, so numbers are near, not equal.
"""

from __future__ import annotations

import pytest
import torch

from tests.experts import test_checkpointing, test_fresh_lora, test_inputs, test_layer, test_order, test_tickets
from tests.placement import test_packer
from tests.support.cases import Case
from tests.support.low_bit_operator import missing

# test_low_bit_backend.py is the fast part.
pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing("MXFP4") is not None, reason=str(missing("MXFP4")))]

MXFP4 = Case("MXFP4", torch.bfloat16, forward=0.3, grad=0.4, same=5e-3)
TESTS = {
    test_tickets: (
        "backwards_in_any_order",
        "lora_changed_between_forward_and_backward",
        "adapters_switched_between_forward_and_backward",
        "second_backward_after_retain_graph",
    ),
    test_checkpointing: ("checkpointing", "checkpointing_with_forwards_in_between", "pieces_under_checkpointing"),
    test_inputs: ("ids_and_layouts",),
    test_layer: ("with_random_lora", "untouched_experts_get_a_gradient_of_exactly_zero", "fresh_adapter_is_the_base"),
    test_order: (
        "between_forward_and_backward_of_a_layer",
        "two_forwards_before_one_backward_of_a_layer",
        "gradient_mode_changes_no_output",
    ),
    test_fresh_lora: ("seen_without_a_word",),
    test_packer: ("smaller_ranks_are_padded",),
}


class TestMxfp4:
    @pytest.fixture
    def case(self) -> Case:
        return MXFP4


for _module, _names in TESTS.items():
    for _name in _names:
        setattr(TestMxfp4, f"test_{_name}", staticmethod(getattr(_module, f"test_{_name}")))
