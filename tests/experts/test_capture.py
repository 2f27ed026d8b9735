"""torch.compile around a layer."""

from __future__ import annotations

import torch

from tests.support.cases import KERNEL_BF16, TORCH_FP32
from tests.support.helpers import MIXTRAL
from tests.support.layers import make_inputs, random_lora, set_lora
from tests.support.one_layer import expected_grads, layer_with
from tests.support.reference import assert_all_close


def test_compiled_graphs_leave_the_layer_out(backend: str) -> None:
    """torch.compile leaves the layer out of its graphs: no stale LoRA, no constant output, gradients as ever."""
    case = TORCH_FP32 if backend == "torch" else KERNEL_BF16
    layer, base, _ = layer_with(case)
    compiled = torch.compile(layer, backend="eager")
    for seed in range(3):
        lora = random_lora(MIXTRAL, seed)
        set_lora(layer, lora)
        x = make_inputs(MIXTRAL, 37, case.dtype, seed)
        leaves = [x.hidden.clone().requires_grad_(), x.weights.clone().requires_grad_(), *layer.lora_params.values()]
        output = compiled(leaves[0], x.ids, leaves[1])
        names = ["hidden", "weights", *layer.lora_params]
        grads = dict(zip(names, torch.autograd.grad(output, leaves, x.grad_output), strict=True))
        assert_all_close(grads, expected_grads(x, base, lora), case.grad)
    torch._dynamo.reset()
