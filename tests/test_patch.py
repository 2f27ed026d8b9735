"""apply_kt_moe: what it replaces, what it leaves, what becomes of the weights, and a second call."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import subprocess
import sys
import weakref
from pathlib import Path

import accelerate
import pytest
import torch
from peft import get_peft_model
from transformers import MixtralForCausalLM

from kt_hf import KTAMXConfigError, KTAMXModelNotSupportedError, KTConfig, KTExperts, apply_kt_moe
from kt_hf.experts import kt_layers
from kt_hf.system.cpu import cpu_features, plan_threads
from tests.support.cases import TORCH_FP32, Case, make_config
from tests.support.helpers import MIXTRAL
from tests.support.models import FAMILIES, Family, expert_modules
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
from tests.support.reference import LORA_NAMES
from tests.support.trainers import model_to_train, result, trainer_for

IDS = MIXTRAL.inputs()


def test_a_second_call_changes_nothing(case: Case) -> None:
    model = patched_model(MIXTRAL, case)
    layers, names, logits = model._kt_wrappers, [name for name, _ in model.named_modules()], logits_of(model, IDS)
    assert apply_kt_moe(model, make_config(case.backend)) is model
    assert model._kt_wrappers is layers
    assert [name for name, _ in model.named_modules()] == names
    assert torch.equal(logits_of(model, IDS), logits)
    adapted = get_peft_model(model, lora_config(MIXTRAL))
    assert apply_kt_moe(adapted, make_config(case.backend)) is adapted
    assert adapted._kt_wrappers is layers


@pytest.mark.parametrize("adapt", [False, True], ids=["model", "peft model"])
def test_another_config_is_refused(case: Case, adapt: bool) -> None:
    model = adapted_model(MIXTRAL, case) if adapt else patched_model(MIXTRAL, case)
    with pytest.raises(KTAMXConfigError, match="patched already") as error:
        apply_kt_moe(model, make_config(case.backend, kt_max_len=77))
    assert "kt_max_len=77" in str(error.value)
    assert "kt_max_len=None" in str(error.value)


def test_only_the_experts_are_replaced(case: Case) -> None:
    stock, model = MIXTRAL(case.dtype), patched_model(MIXTRAL, case)
    rest = {name: value for name, value in stock.state_dict().items() if ".experts." not in name}
    state = model.state_dict()
    marks = [state.pop(name) for name in list(state) if name.endswith(".experts.base_fingerprint")]
    assert len(marks) == len(model._kt_wrappers)
    assert {name: value.shape for name, value in state.items()} == {n: v.shape for n, v in rest.items()}
    assert all(torch.equal(value, rest[name]) for name, value in state.items())
    assert not trainable(model)
    assert all(isinstance(module, KTExperts) for module in expert_modules(model).values())


def test_layers_in_order(case: Case) -> None:
    family = FAMILIES["qwen3_moe"]
    model = patched_model(family, case)
    assert model._kt_wrappers == kt_layers(model) == list(expert_modules(model).values())
    assert tuple(layer.layer_idx for layer in model._kt_wrappers) == family.moe_layers
    assert [layer.label for layer in model._kt_wrappers] == [f"model.layers.{i}.mlp.experts" for i in family.moe_layers]


def test_layers_of_wrappers_that_hold_a_model_twice() -> None:
    """As a value head's wrapper that has the model and its backbone: each layer once, whichever is met first."""
    model = patched_model(MIXTRAL, TORCH_FP32)
    layers = model._kt_wrappers
    for names in (("whole", "again"), ("whole", "backbone"), ("backbone", "whole")):
        parts = {"whole": model, "again": torch.nn.Sequential(model), "backbone": model.model}
        wrapper = torch.nn.ModuleDict({name: parts[name] for name in names})
        wrapper.add_module("itself", torch.nn.ModuleList([wrapper]))
        assert kt_layers(wrapper) == layers
    assert kt_layers(model) is not layers


def test_layers_that_were_taken_out_are_not_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    model = patched_model(MIXTRAL, TORCH_FP32)
    layers = list(model._kt_wrappers)
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Module, "children", lambda _: pytest.fail("a patched model knows its layers"))
        assert kt_layers(model) == layers
    model.model.layers = model.model.layers[1:]
    assert kt_layers(model) == layers[1:]
    del model.model.layers[0]
    assert kt_layers(model) == []


def test_lora_parameters_follow_the_adapters(case: Case) -> None:
    model = patched_model(MIXTRAL, case)
    params = model._kt_moe_lora_params
    assert params == {}
    assert len(params) == 0
    adapted = get_peft_model(model, lora_config(MIXTRAL, target_modules=["q_proj", "gate_proj"]))
    assert adapted._kt_moe_lora_params is params
    assert {layer: set(names) for layer, names in params.items()} == {i: {"gate_lora_a", "gate_lora_b"} for i in (0, 1)}
    adapted.add_adapter("other", lora_config(MIXTRAL))
    adapted.set_adapter("other")
    assert [set(params[layer]) for layer in (0, 1)] == [set(LORA_NAMES)] * 2
    assert params[1]["up_lora_b"] is adapted._kt_wrappers[1].up_proj.lora_B["other"].weight
    with adapted.disable_adapter():
        assert params == {}
    adapted.delete_adapter("other")
    adapted.set_adapter("default")
    assert set(params[0]) == {"gate_lora_a", "gate_lora_b"}


def test_training_mode_is_kept() -> None:
    for mode in (True, False):
        model = apply_kt_moe(MIXTRAL().train(mode), make_config("torch"))
        assert all(layer.training is mode for layer in model._kt_wrappers)


def test_old_modules_and_parameters_die(case: Case) -> None:
    model = MIXTRAL(case.dtype)
    old = [weakref.ref(thing) for module in expert_modules(model).values() for thing in (module, *module.parameters())]
    assert len(old) == 6
    apply_kt_moe(model, make_config(case.backend))
    assert [ref() for ref in old] == [None] * 6
    packed = [weakref.ref(layer._unpacked.gate_up) for layer in model._kt_wrappers]
    get_peft_model(model, lora_config(MIXTRAL))
    assert all((ref() is None) == (case.backend != "torch") for ref in packed)


PEAK = """
import sys, torch
from peft import get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM
from kt_hf import KTConfig, apply_kt_moe, kt_lora_config

def memory(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1024

sizes = dict(hidden_size=512, intermediate_size=2048, num_local_experts=8, num_hidden_layers=8)
config = MixtralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, vocab_size=64)
with torch.device("meta"):
    model = MixtralForCausalLM(config).bfloat16()
model.to_empty(device="cpu")
for tensor in [*model.parameters(), *model.buffers()]:
    tensor.data.fill_(0.01)
settings = dict(kt_backend=sys.argv[1], kt_num_threads=1, kt_share_backward_weights=True)
small = MixtralForCausalLM(MixtralConfig(**{**sizes, "hidden_size": 32, "num_hidden_layers": 1}, vocab_size=8,
    num_attention_heads=4, num_key_value_heads=2)).bfloat16()
small = apply_kt_moe(small, KTConfig(**settings))
small = get_peft_model(small, kt_lora_config(small, lora_rank=4))  # what is imported and started is not counted
before = memory("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
model = apply_kt_moe(model, KTConfig(**settings))
model = get_peft_model(model, kt_lora_config(model, lora_rank=4))
assert all(layer.packed and layer.backend_name == sys.argv[1] for layer in model._kt_wrappers)
print("MiB", before, memory("VmHWM"))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
def test_peak_memory_of_patching_and_packing(backend: str) -> None:
    """The model, and one layer on top (AMXBF16: two, for the operators' pool of backward weights stays)."""
    layer = 3 * 8 * 512 * 2048 * 2 / 2**20
    done = subprocess.run([sys.executable, "-c", PEAK, backend], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    before, peak = map(float, done.stdout.rpartition("MiB")[2].split())
    assert before > 8 * layer
    assert peak - before <= (1 if backend == "torch" else 2) * layer


def hooks(model: torch.nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if hasattr(module, "_hf_hook")]


@pytest.mark.parametrize("device_map", [None, "cpu", {"": "cpu"}], ids=str)
def test_no_hooks_of_a_device_map_are_left(device_map: str | dict[str, str] | None, tmp_path: Path) -> None:
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


def test_offloaded_weights_are_refused() -> None:
    model = accelerate.cpu_offload(MIXTRAL(), execution_device="cpu")
    assert hooks(model)
    with pytest.raises(KTAMXModelNotSupportedError, match=r"meta device.*without device_map"):
        apply_kt_moe(model, KTConfig(kt_backend="torch"))


def test_no_number_of_gpu_experts_is_not_set(case: Case) -> None:
    """Where there is no GPU, or a backend is written, all of them are on the CPU then."""
    config = make_config(case.backend, kt_num_gpu_experts=None)
    assert config.kt_num_gpu_experts is None
    assert config == make_config(case.backend)
    model = get_peft_model(apply_kt_moe(MIXTRAL(case.dtype), config), lora_config(MIXTRAL))
    assert all(grad.any() for name, grad in gradients_of(model, loss_of(model, IDS)).items() if ".lora_B." in name)


@pytest.mark.parametrize("threads", [None, 100_000])
def test_threads_are_planned_or_clamped(case: Case, threads: int | None, caplog: pytest.LogCaptureFixture) -> None:
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
def test_no_threads_are_refused(threads: int) -> None:
    with pytest.raises(KTAMXConfigError, match=f"kt_num_threads={threads} "):
        KTConfig(kt_num_threads=threads)


@pytest.mark.parametrize("targets", [None, "all-linear"], ids=["names", "all-linear"])
def test_no_empty_weight_is_left_to_wrap(case: Case, targets: str | None) -> None:
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
def test_routers_are_called_by_the_model_alone(family: Family, case: Case, tmp_path: Path) -> None:
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


def test_routers_are_not_called_by_the_callback(tmp_path: Path) -> None:
    model = model_to_train(TORCH_FP32)
    calls: list[int] = []
    model.base_model.model.model.layers[0].mlp.gate.register_forward_hook(lambda *_: calls.append(1))
    trainer_for(model, tmp_path, max_steps=2, save_strategy="steps", save_steps=1).train()
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("dtype", "avx512_bf16", "told"),
    [(torch.bfloat16, False, True), (torch.bfloat16, True, False), (torch.float32, False, False)],
)
def test_16_bits_on_a_cpu_without_their_products_are_told(
    dtype: torch.dtype, avx512_bf16: bool, told: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = dataclasses.replace(cpu_features(), amx=False, avx512_bf16=avx512_bf16)
    monkeypatch.setattr("kt_hf.placement.assembly.cpu_features", lambda: cpu)
    with caplog.at_level(logging.WARNING, "kt_hf"):
        apply_kt_moe(MIXTRAL(dtype), KTConfig(kt_backend="torch", kt_num_gpu_experts=0))
    assert ('dtype="float32"' in caplog.text) == told
