"""Failures others met with adapters: lost, without effect, of the wrong rank, cast, in files that do not read."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from kt_hf import KTAMXError
from kt_hf.callback import check_saved_experts
from tests.support.cases import KERNEL_BF16, TORCH_FP32, Case
from tests.support.helpers import MIXTRAL
from tests.support.layers import (
    ALPHA,
    forward,
    forward_backward,
    gradients,
    make_inputs,
    random_lora,
    set_lora,
)
from tests.support.models import EXPERT_PROJECTIONS, base_weights
from tests.support.one_layer import expected_grads, inputs, layer_with
from tests.support.patched import adapted_model, fill_lora, logits_of, lora_config, patched_model
from tests.support.reference import assert_all_close, assert_close, experts_forward_backward
from tests.support.trainers import model_to_train, trainer_for

IDS = MIXTRAL.inputs()
ADAPTER = "adapter_model.safetensors"


def test_lora_no_effect(case: Case, tmp_path: Path) -> None:
    """An adapter on the experts alone: without effect until it is trained, with effect once loaded."""
    base = logits_of(patched_model(MIXTRAL, case, kt_lora_rank=8), IDS)
    config = lora_config(MIXTRAL, target_modules=list(EXPERT_PROJECTIONS))
    model = get_peft_model(patched_model(MIXTRAL, case), config)
    assert torch.equal(logits_of(model, IDS), base)
    fill_lora(model, seed=1)
    expected = logits_of(model, IDS)
    model.save_pretrained(tmp_path)
    loaded = logits_of(PeftModel.from_pretrained(patched_model(MIXTRAL, case), tmp_path), IDS)
    assert torch.equal(loaded, expected)
    assert (loaded - base).abs().mean() > 0.05 * base.abs().mean()


@pytest.mark.parametrize("rank", [1, 2, 3, 8, 20, 64, 256])
def test_rank_lost(case: Case, rank: int) -> None:
    base = base_weights(MIXTRAL(case.dtype))[1]
    model = get_peft_model(patched_model(MIXTRAL, case), lora_config(MIXTRAL, r=rank))
    layer = model._kt_wrappers[1]
    # Of equal effect at each rank.
    lora = {name: value * rank**-0.25 for name, value in random_lora(MIXTRAL, rank=rank).items()}
    assert {parameter.shape for parameter in layer.lora_params.values()} == {value.shape for value in lora.values()}
    set_lora(layer, lora)
    x = inputs(case)
    actual, expected = forward_backward(layer, x), experts_forward_backward(*x, base, lora, ALPHA / rank)
    assert layer._runner.backend.rank == rank
    assert layer._runner.backend.max_rank in (None, rank)
    assert_close(actual.output, expected.output, case.forward, "output")
    assert_all_close(actual.grads, expected.grads, case.grad)


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="descriptors are counted in Linux's /proc")
def test_safe_open_close(backend: str, tmp_path: Path) -> None:
    """Patching, packing, training, saving, checking and loading leave no file open."""
    case, counts = TORCH_FP32 if backend == "torch" else KERNEL_BF16, []
    for _ in range(3):
        model = model_to_train(case)
        trainer_for(model, tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
        check_saved_experts(model, tmp_path / "checkpoint-1" / ADAPTER)
        PeftModel.from_pretrained(patched_model(MIXTRAL, case), tmp_path / "checkpoint-1")
        counts.append(descriptors())
    assert len(set(counts[1:])) == 1, counts


def test_header_too_large(tmp_path: Path) -> None:
    """Every file called .safetensors is one; a pickle under that name is an error, also for the check after a save."""
    model = model_to_train(TORCH_FP32)
    trainer_for(model, tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    files = list(tmp_path.rglob("*.safetensors"))
    assert files
    for file in files:
        with safe_open(file, framework="pt") as opened:
            assert opened.keys()
    state = {name: value.clone() for name, value in load_file(files[0]).items()}
    torch.save(state, files[0])
    with pytest.raises(SafetensorError):
        check_saved_experts(model, files[0])
    with pytest.raises(KTAMXError, match="is longer"):
        PeftModel.from_pretrained(patched_model(MIXTRAL, TORCH_FP32), files[0].parent)


CASTS: dict[str, Callable[[nn.Module], Any]] = {
    "half": lambda module: module.half(),
    "float": lambda module: module.float(),
    "double": lambda module: module.double(),
    "bfloat16": lambda module: module.to(torch.bfloat16),
    "to cpu": lambda module: module.to("cpu", torch.float16),
    "half and back": lambda module: module.half().float(),
    "apply": lambda module: module._apply(lambda tensor: tensor * 0),
}


@pytest.mark.parametrize("whole", [True, False], ids=["model", "layer"])
@pytest.mark.parametrize("name", CASTS)
def test_fp32_upcast(case: Case, name: str, whole: bool) -> None:
    """Casts change no result to the bit, nor the parameters, also between a forward and its backward."""
    model = adapted_model(MIXTRAL, case, seed=1)
    layer, x = model._kt_wrappers[0], inputs(case)
    before = forward_backward(layer, x)
    tensors = {key: value.data_ptr() for key, value in layer.lora_params.items()}
    output, leaves = forward(layer, x)
    CASTS[name](model if whole else layer)
    assert {key: value.data_ptr() for key, value in layer.lora_params.items()} == tensors
    assert {value.dtype for value in layer.lora_params.values()} == {torch.float32}
    for result in (forward_backward(layer, x).grads, gradients(output, leaves, x.grad_output)):
        assert [key for key, grad in before.grads.items() if not torch.equal(result[key], grad)] == []
    assert torch.equal(forward_backward(layer, x).output, before.output)


def test_fp32_upcast_of_the_data_itself(case: Case) -> None:
    """As trainers cast adapters of quantised models: the parameter takes the dtype, the results follow its values."""
    layer, base, lora = layer_with(case)
    x = inputs(case)
    forward_backward(layer, x)
    for parameter in layer.lora_params.values():
        parameter.data = parameter.data.to(torch.bfloat16)
    actual = forward_backward(layer, x)
    rounded = {name: value.to(torch.bfloat16).float() for name, value in lora.items()}
    assert {actual.grads[name].dtype for name in lora} == {torch.bfloat16}
    assert_all_close(actual.grads, expected_grads(x, base, rounded), max(case.grad, 1e-2))


def test_fp32_upcast_by_peft(case: Case) -> None:
    layer, x = (model := adapted_model(MIXTRAL, case, seed=1))._kt_wrappers[0], inputs(case)
    expected = forward_backward(layer, x).output
    model.base_model._cast_adapter_dtype(adapter_name="default", autocast_adapter_dtype=True)
    assert torch.equal(forward_backward(layer, x).output, expected)
    tiny = make_inputs(MIXTRAL, 1, case.dtype)
    with torch.autocast("cpu", torch.bfloat16):
        inside = forward_backward(layer, tiny).output
    assert torch.equal(inside, forward_backward(layer, tiny).output)
