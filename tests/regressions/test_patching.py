"""Failures others met when they put experts on the CPU."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable
from pathlib import Path

import accelerate
import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import MixtralForCausalLM

from kt_hf import KTAMXConfigError, KTAMXModelNotSupportedError, KTConfig, apply_kt_moe
from kt_hf.system.cpu import plan_threads
from tests.support.cases import TORCH_FP32, Case, make_config
from tests.support.helpers import MIXTRAL
from tests.support.models import FAMILIES, Family
from tests.support.patched import (
    adapted_model,
    fill_lora,
    gradients_of,
    logits_of,
    lora_config,
    loss_of,
    patched_model,
    trainable,
)
from tests.support.trainers import model_to_train, result, trainer_for

IDS = MIXTRAL.inputs()


def hooks(model: torch.nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if hasattr(module, "_hf_hook")]


@pytest.mark.parametrize("device_map", [None, "cpu", {"": "cpu"}], ids=str)
def test_meta_device(device_map: str | dict[str, str] | None, tmp_path: Path) -> None:
    """No hooks of a device map are left, so the Trainer can place the model itself."""
    MIXTRAL().save_pretrained(tmp_path / "model")
    model = MixtralForCausalLM.from_pretrained(tmp_path / "model", device_map=device_map)
    expected = logits_of(model, IDS)
    model = get_peft_model(apply_kt_moe(model, make_config("torch")), lora_config(MIXTRAL))
    assert not hooks(model)
    assert not [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    torch.testing.assert_close(logits_of(model, IDS), expected)
    trainer = trainer_for(model, tmp_path, max_steps=1)
    trainer.train()
    assert len(result(trainer).losses) == 1


def test_meta_device_offloaded_weights_are_refused() -> None:
    model = accelerate.cpu_offload(MIXTRAL(), execution_device="cpu")
    assert hooks(model)
    with pytest.raises(KTAMXModelNotSupportedError, match=r"meta device.*without device_map"):
        apply_kt_moe(model, KTConfig(kt_backend="torch"))


def test_gpu_experts_none(case: Case) -> None:
    config = make_config(case.backend, kt_num_gpu_experts=None)
    assert config.kt_num_gpu_experts == 0
    assert config == make_config(case.backend, kt_num_gpu_experts=0)
    model = get_peft_model(apply_kt_moe(MIXTRAL(case.dtype), config), lora_config(MIXTRAL))
    assert all(grad.any() for name, grad in gradients_of(model, loss_of(model, IDS)).items() if ".lora_B." in name)


@pytest.mark.parametrize("threads", [None, 100_000])
def test_threads_none(case: Case, threads: int | None, caplog: pytest.LogCaptureFixture) -> None:
    """None is planned; more than there are is clamped, with a warning."""
    assert KTConfig().kt_num_threads is None
    config = make_config(case.backend, kt_num_threads=threads)
    with caplog.at_level(logging.WARNING, "kt_hf"):
        model = apply_kt_moe(MIXTRAL(case.dtype), config)
    plan = model._kt_wrappers[0].factory.threads
    assert plan == plan_threads()
    assert 1 <= plan.workers < (os.cpu_count() or 1) or plan.workers == 1
    assert ("kt_num_threads=100000" in caplog.text) == (threads is not None)
    model = get_peft_model(model, lora_config(MIXTRAL))
    assert torch.isfinite(logits_of(model, IDS)).all()


@pytest.mark.parametrize("threads", [0, -1])
def test_threads_none_is_not_zero(threads: int) -> None:
    with pytest.raises(KTAMXConfigError, match=f"kt_num_threads={threads} "):
        KTConfig(kt_num_threads=threads)


def adapter_then(*steps: str) -> Callable[[Family, Case, Path], PeftModel]:
    """The steps from a stock model to one with the adapter in `folder`, in this order."""

    def build(family: Family, case: Case, folder: Path) -> PeftModel:
        model = family(case.dtype)
        for step in steps:
            if step == "patch":
                model = apply_kt_moe(model, make_config(case.backend))
            elif step == "patch and pack":
                model = apply_kt_moe(model, make_config(case.backend, kt_lora_rank=8))
            elif step == "new adapter":
                model = get_peft_model(model, lora_config(family))
            elif step == "attention adapter":
                model = get_peft_model(model, lora_config(family, target_modules=list(family.attention)))
            elif step == "load":
                model = PeftModel.from_pretrained(model, folder)
            else:
                model.load_adapter(folder, "loaded")
                model.set_adapter("loaded")
        return model

    return build


ORDERS = [
    ("patch", "load"),
    ("patch and pack", "load"),
    ("patch", "new adapter", "load another"),
    ("attention adapter", "patch", "load another"),
    ("patch", "load", "patch"),
]


@pytest.mark.parametrize("steps", ORDERS, ids=" - ".join)
def test_load_order(case: Case, steps: tuple[str, ...], tmp_path: Path) -> None:
    saver = adapted_model(MIXTRAL, case, seed=1)
    saver.save_pretrained(tmp_path)
    model = adapter_then(*steps)(MIXTRAL, case, tmp_path)
    assert torch.equal(logits_of(model, IDS), logits_of(saver, IDS))


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_load_order_adapter_before_the_patch(name: str, tmp_path: Path) -> None:
    """PEFT finds no place for the experts' tensors and drops them: that must not pass for a loaded adapter."""
    family = FAMILIES[name]
    saver = adapted_model(family, TORCH_FP32, seed=1)
    saver.save_pretrained(tmp_path)
    try:
        model = adapter_then("load", "patch")(family, TORCH_FP32, tmp_path)
    except KTAMXConfigError:
        return
    assert torch.equal(logits_of(model, family.inputs()), logits_of(saver, family.inputs()))


@pytest.mark.parametrize("targets", [None, "all-linear"], ids=["names", "all-linear"])
def test_empty_experts_nan(case: Case, targets: str | None) -> None:
    """No module holds an empty or meta weight that PEFT could wrap, nor does PEFT make one."""
    family = FAMILIES["deepseek_v2"]
    settings = {} if targets is None else {"target_modules": targets}
    model = patched_model(family, case)
    for adapt in (False, True):
        model = get_peft_model(model, lora_config(family, **settings)) if adapt else model
        tensors = dict(itertools.chain(model.named_parameters(), model.named_buffers()))
        assert not [name for name, tensor in tensors.items() if tensor.numel() == 0 or tensor.is_meta]
        assert not [name for name in tensors if name.endswith((".experts.gate_up_proj", ".experts.down_proj"))]
    fill_lora(model, seed=1)
    assert torch.isfinite(logits_of(model, family.inputs())).all()
    assert all(torch.isfinite(grad).all() for grad in gradients_of(model, loss_of(model, family.inputs())).values())
    assert trainable(model)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_router_shape(family: Family, case: Case, tmp_path: Path) -> None:
    """Routers are called by the model, once a forward, and never by this package."""
    model = family(case.dtype)
    calls: list[str] = []
    for index in family.moe_layers:
        router = model.model.layers[index].mlp.gate
        router.register_forward_hook(lambda *_, index=index: calls.append(index))
    model = get_peft_model(apply_kt_moe(model, make_config(case.backend)), lora_config(family))
    for layer in model._kt_wrappers:
        layer.update_lora_pointers()
    assert calls == []
    loss = loss_of(model, family.inputs())
    assert tuple(calls) == family.moe_layers
    loss.backward()
    assert tuple(calls) == family.moe_layers


def test_router_shape_nor_by_the_callback(tmp_path: Path) -> None:
    model = model_to_train(TORCH_FP32)
    calls: list[int] = []
    model.base_model.model.model.layers[0].mlp.gate.register_forward_hook(lambda *_: calls.append(1))
    trainer_for(model, tmp_path, max_steps=2, save_strategy="steps", save_steps=1).train()
    assert len(calls) == 2
