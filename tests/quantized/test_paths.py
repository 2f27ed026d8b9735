"""What must hold for every backend, once more for AMXInt8: the tests are those of the other modules."""

from __future__ import annotations

from tests.families.test_inputs import test_ids_and_layouts as test_ids_and_layouts
from tests.families.test_layer import (
    test_fresh_adapter_is_the_base as test_fresh_adapter_is_the_base,
)
from tests.families.test_layer import test_with_random_lora as test_with_random_lora
from tests.families.test_layer import test_without_adapter as test_without_adapter
from tests.families.test_order import (
    test_between_forward_and_backward_of_a_layer as test_between_forward_and_backward_of_a_layer,
)
from tests.families.test_order import (
    test_two_forwards_before_one_backward_of_a_layer as test_two_forwards_before_one_backward_of_a_layer,
)
from tests.families.test_peft import test_switching_adapters as test_switching_adapters
from tests.helpers import one_torch_thread as one_torch_thread
from tests.test_autograd import (
    test_backwards_in_any_order as test_backwards_in_any_order,
)
from tests.test_autograd_errors import test_no_tokens as test_no_tokens
from tests.test_checkpointing import (
    test_checkpointing as test_checkpointing,
)
from tests.test_checkpointing import (
    test_checkpointing_with_forwards_in_between as test_checkpointing_with_forwards_in_between,
)
from tests.test_checkpointing import (
    test_pieces_under_checkpointing as test_pieces_under_checkpointing,
)
from tests.test_experts import test_one_adapter as test_one_adapter
from tests.test_experts import test_several_active_adapters as test_several_active_adapters
from tests.test_fresh_lora import test_seen_without_a_word as test_seen_without_a_word
from tests.test_gate_overflow import test_gates_far_below_zero as test_gates_far_below_zero
from tests.test_packing import test_smaller_ranks_are_padded as test_smaller_ranks_are_padded
