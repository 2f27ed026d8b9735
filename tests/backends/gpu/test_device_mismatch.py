"""Failures others met with the model on a GPU and the experts on the CPU."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from kt_hf import KTAMXError, apply_kt_moe
from tests.support.cases import KERNEL_BF16, TORCH_BF16, TORCH_FP32, Case, make_config
from tests.support.helpers import MIXTRAL
from tests.support.layers import RANK, SCALING, forward_backward, on_gpu, random_lora, set_lora
from tests.support.models import base_weights
from tests.support.one_layer import inputs
from tests.support.patched import (
    adapted_model,
    fill_lora,
    gradients_of,
    logits_of,
    lora_config,
    loss_of,
    patched_model,
)
from tests.support.reference import assert_all_close, assert_close, experts_forward_backward

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

CASES = {"torch": TORCH_FP32, "AMXBF16": KERNEL_BF16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_device_mismatch(backend: str, dtype: torch.dtype) -> None:
    """Output and gradients are on the input's device and of its dtype, wherever the experts are computed."""
    case = CASES[backend]
    base, lora = base_weights(MIXTRAL(case.dtype))[0], random_lora(MIXTRAL)
    layer = adapted_model(MIXTRAL, case)._kt_wrappers[0]
    set_lora(layer, lora)
    x = inputs(Case(backend, dtype, 0, 0, 0))
    actual = forward_backward(layer, on_gpu(x))
    expected = experts_forward_backward(*x, base, lora, SCALING)
    assert (actual.output.device.type, actual.output.dtype) == ("cuda", dtype)
    assert actual.grads["hidden"].device.type == actual.grads["weights"].device.type == "cuda"
    rounding = 0 if dtype is torch.float32 else 0.01
    assert_close(actual.output, expected.output, case.forward + rounding, "output")
    assert_all_close({k: v.cpu() for k, v in actual.grads.items()}, expected.grads, case.grad + rounding)


def test_device_mismatch_in_a_model(backend: str) -> None:
    """Attention on the GPU, experts on the CPU, packed before or after the move: as all on the CPU."""
    case = TORCH_BF16 if backend == "torch" else KERNEL_BF16
    ids = MIXTRAL.inputs()
    here = adapted_model(MIXTRAL, case, seed=1)
    expected, grads = logits_of(here, ids), gradients_of(here, loss_of(here, ids))
    for rank in (None, RANK):
        model = get_peft_model(patched_model(MIXTRAL, case, kt_lora_rank=rank), lora_config(MIXTRAL)).cuda()
        fill_lora(model, seed=1)
        assert_close(logits_of(model, ids.cuda()), expected, 0.06, "logits")
        there = {name: grad.cpu() for name, grad in gradients_of(model, loss_of(model, ids.cuda())).items()}
        assert_all_close(there, grads, 0.12)


@pytest.mark.parametrize("where", ["cpu", "gpu"])
def test_grad_on_gpu(backend: str, where: str) -> None:
    """The kernel's buffers are CPU memory, wherever the parameters are; gradients are where the parameters are."""
    case = CASES[backend]
    base, lora = base_weights(MIXTRAL(case.dtype))[0], random_lora(MIXTRAL)
    model = adapted_model(MIXTRAL, case, kt_moe_lora_device=where).cuda()
    layer = model._kt_wrappers[0]
    device = "cuda" if where == "gpu" else "cpu"
    assert {parameter.device.type for parameter in layer.lora_params.values()} == {device}
    set_lora(layer, {name: value.to(device) for name, value in lora.items()})
    x = inputs(case)
    actual = forward_backward(layer, on_gpu(x))
    assert {actual.grads[name].device.type for name in lora} == {device}
    assert {tensor.device.type for tensor in layer._runner.backend.lora_copy()} == {"cpu"}
    assert {tensor.device.type for tensor in getattr(layer._runner.backend, "_grads", ())} <= {"cpu"}
    expected = experts_forward_backward(*x, base, lora, SCALING)
    assert_all_close({name: grad.cpu() for name, grad in actual.grads.items()}, expected.grads, case.grad)


def test_cuda_graph_capture_is_refused_in_words(backend: str) -> None:
    """A captured graph would replay the copies and not the experts."""
    model = apply_kt_moe(MIXTRAL(torch.bfloat16), make_config(backend, kt_lora_rank=RANK))
    layer, x = model._kt_wrappers[0], on_gpu(inputs(TORCH_BF16))
    with torch.no_grad():
        layer(x.hidden, x.ids, x.weights)
        torch.cuda.synchronize()
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with torch.cuda.stream(stream):
            graph.capture_begin()
            try:
                with pytest.raises(KTAMXError, match="graph"):
                    layer(x.hidden, x.ids, x.weights)
            finally:
                graph.capture_end()


def test_cuda_graph_of_torch_compile(backend: str) -> None:
    """reduce-overhead captures what it compiles: the experts must stay outside, and new LoRA values be seen."""
    model = adapted_model(MIXTRAL, TORCH_BF16 if backend == "torch" else KERNEL_BF16).cuda()
    compiled = torch.compile(model, mode="reduce-overhead")
    ids = MIXTRAL.inputs().cuda()
    for seed in range(4):
        fill_lora(model, seed=seed)
        assert_close(logits_of(compiled, ids).clone(), logits_of(model, ids), 0.06, f"logits, values {seed}")
