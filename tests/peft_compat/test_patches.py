"""What the shim relies on in PEFT (a failure here means that PEFT changed it), and that it reaches no other model."""

from __future__ import annotations

import inspect
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import tuners_utils
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.lora.layer import ParamWrapper
from peft.utils import save_and_load
from peft.utils import transformers_weight_conversion as conversion
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file

from kt_hf import KTAMXError
from kt_hf.adapters import MANIFEST
from kt_hf.peft_compat import patches as peft_compat
from tests.support.cases import TORCH_FP32, Case
from tests.support.helpers import MIXTRAL
from tests.support.models import FAMILIES, expert_modules
from tests.support.patched import adapted_model, fill_lora, logits_of, lora_config, patched_model, trainable
from tests.support.reference import relative_error

QWEN3 = FAMILIES["qwen3_moe"]
CONFIG, STATE = "convert_peft_config_for_transformers", "convert_peft_adapter_state_dict_for_transformers"


@pytest.fixture(autouse=True)
def _installed() -> None:
    peft_compat.install()


def stock_model(filled: bool = False) -> PeftModel:
    model = get_peft_model(QWEN3(), lora_config(QWEN3))
    if filled:
        fill_lora(model, seed=1)
    return model


# -- what it relies on


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (lambda: getattr(conversion, CONFIG).__wrapped__, ["peft_config", "model"]),
        (lambda: getattr(conversion, STATE).__wrapped__, ["model", "peft_config", "adapter_state_dict"]),
        (lambda: LoraModel.inject_adapter.__wrapped__, ["self", "model"]),
    ],
    ids=[CONFIG, STATE, "inject_adapter"],
)
def test_first_arguments(function: object, names: list[str]) -> None:
    assert list(inspect.signature(function()).parameters)[: len(names)] == names


@pytest.mark.parametrize(("module", "name"), [(tuners_utils, CONFIG), (save_and_load, STATE)])
def test_conversions_are_looked_up_when_called(module: object, name: str) -> None:
    """Were one imported at the top of a module, replacing it in its own would not reach that caller."""
    assert not hasattr(module, name)


def test_conversions_are_called(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    called = []

    def watch(name: str) -> None:
        original = getattr(conversion, name)

        def watched(*args: object, **kwargs: object) -> object:
            called.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(conversion, name, watched)

    for name in (CONFIG, STATE):
        watch(name)
    model = stock_model()
    assert called == [CONFIG]
    model.save_pretrained(tmp_path)
    called.clear()
    PeftModel.from_pretrained(QWEN3(), tmp_path)
    assert called == [CONFIG, STATE]


def test_wrappers_of_fused_experts() -> None:
    """The attributes that are read, the order of nesting, and the layout of A and B, against PEFT's own product."""
    wrapper = next(iter(expert_modules(stock_model(filled=True)).values()))
    seen = {}
    while isinstance(wrapper, ParamWrapper):
        a, b = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
        rank, experts = wrapper.r["default"], a.shape[0] // wrapper.r["default"]
        delta = torch.einsum("erk,oer->eok", a.view(experts, rank, -1), b.view(-1, rank, experts).transpose(1, 2))
        delta = delta * wrapper.scaling["default"]
        seen[wrapper.parameter_name] = relative_error(delta, wrapper.get_delta_weight("default"))
        assert wrapper.lora_alpha["default"] / rank == wrapper.scaling["default"]
        innermost = wrapper.get_base_layer()
        wrapper = wrapper.base_layer
    assert set(seen) == {"gate_up_proj", "down_proj"}
    assert max(seen.values()) < 1e-5
    assert innermost is wrapper
    assert {name for name, _ in wrapper.named_parameters()} == set(seen)


def test_a_layer_of_its_own_kind_is_updated_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT gives an existing LoraLayer the adapter through update_layer, with these arguments."""
    layer = patched_model(MIXTRAL, TORCH_FP32)
    calls = []
    original = type(layer._kt_wrappers[0].gate_proj).update_layer

    def update_layer(self: LoraLayer, adapter_name: str, r: int, lora_alpha: int, **kwargs: object) -> None:
        calls.append((adapter_name, r, lora_alpha, type(kwargs["config"]), kwargs["target_name"]))
        original(self, adapter_name, r, lora_alpha, **kwargs)

    monkeypatch.setattr(type(layer._kt_wrappers[0].gate_proj), "update_layer", update_layer)
    get_peft_model(layer, lora_config(MIXTRAL, rank_pattern={"down_proj": 4}, alpha_pattern={"gate_proj": 3}))
    experts = "model.layers.0.mlp.experts"
    assert calls[:3] == [
        ("default", 8, 3, LoraConfig, f"{experts}.gate_proj"),
        ("default", 8, 12, LoraConfig, f"{experts}.up_proj"),
        ("default", 4, 12, LoraConfig, f"{experts}.down_proj"),
    ]
    assert len(calls) == 6


def test_without_the_shim_a_patched_model_loses_its_expert_lora(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, PEFT leaves such models alone by itself, and half of the shim can go."""
    model = patched_model(QWEN3, TORCH_FP32)
    monkeypatch.setattr(conversion, CONFIG, getattr(conversion, CONFIG).__wrapped__)
    try:
        model = get_peft_model(model, lora_config(QWEN3))
    except ValueError:
        return
    assert not [name for name in trainable(model) if ".experts." in name]


# -- patched models alone


def test_installed_once() -> None:
    before = [getattr(conversion, CONFIG), getattr(conversion, STATE), LoraModel.inject_adapter]
    peft_compat.install()
    assert before == [getattr(conversion, CONFIG), getattr(conversion, STATE), LoraModel.inject_adapter]
    assert not any(hasattr(function.__wrapped__, "_kt_hf") for function in before)


def test_patched_model_keeps_its_targets() -> None:
    model = get_peft_model(patched_model(QWEN3, TORCH_FP32), lora_config(QWEN3))
    config = model.peft_config["default"]
    assert config.target_modules == set(QWEN3.target_modules)
    assert not config.target_parameters
    assert not config.rank_pattern
    assert len([name for name in trainable(model) if ".experts." in name]) == 12


def test_unpatched_model_is_converted_as_ever() -> None:
    patched_model(QWEN3, TORCH_FP32)
    model = stock_model()
    assert all(isinstance(module, ParamWrapper) for module in expert_modules(model).values())
    config = lora_config(QWEN3)
    getattr(conversion, CONFIG).__wrapped__(config, QWEN3(), None)
    ours = model.peft_config["default"]
    assert (ours.target_modules, ours.target_parameters) == (config.target_modules, config.target_parameters)
    assert ours.target_parameters
    assert ours.rank_pattern == config.rank_pattern != {}


def test_unpatched_adapters_keys_are_converted_as_ever() -> None:
    """Keys of transformers 4, an entry for each expert, become those of the fused ones."""
    model, rank = stock_model(), 8
    old = {}
    for expert in range(QWEN3.num_experts):
        for name in ("gate_proj", "up_proj", "down_proj"):
            into, out = (32, 128) if name == "down_proj" else (128, 32)
            key = f"base_model.model.model.layers.0.mlp.experts.{expert}.{name}"
            old |= {f"{key}.lora_A.weight": torch.randn(rank, into), f"{key}.lora_B.weight": torch.randn(out, rank)}
    args = (model, model.peft_config["default"])
    made = getattr(conversion, STATE)(*args, dict(old))
    expected = getattr(conversion, STATE).__wrapped__(*args, dict(old))
    assert set(made) == set(expected)
    assert not set(made) & set(old)
    assert all(torch.equal(made[key], expected[key]) for key in made)


def test_unpatched_model_saves_and_loads_as_ever(tmp_path: Path) -> None:
    model = stock_model(filled=True)
    model.save_pretrained(tmp_path)
    patched_model(QWEN3, TORCH_FP32)
    again = PeftModel.from_pretrained(QWEN3(), tmp_path)
    assert torch.equal(logits_of(again, QWEN3.inputs()), logits_of(model, QWEN3.inputs()))


# -- PEFT's other ways to load


@pytest.fixture
def saved(case: Case, tmp_path: Path) -> tuple[Path, torch.Tensor]:
    model = adapted_model(MIXTRAL, case, seed=9)
    model.save_pretrained(tmp_path)
    return tmp_path, logits_of(model, MIXTRAL.inputs())


def test_hotswap(case: Case, saved: tuple[Path, torch.Tensor]) -> None:
    model = adapted_model(MIXTRAL, case, seed=3)
    assert not torch.equal(logits_of(model, MIXTRAL.inputs()), saved[1])
    hotswap_adapter(model, str(saved[0]), "default")
    assert torch.equal(logits_of(model, MIXTRAL.inputs()), saved[1])


def test_low_memory_loading(case: Case, saved: tuple[Path, torch.Tensor]) -> None:
    """PEFT rounds attention's LoRA to the model's dtype on this way; the experts' arrives as it was saved."""
    model = PeftModel.from_pretrained(patched_model(MIXTRAL, case), saved[0], low_cpu_mem_usage=True)
    there = {name.replace(".default", ""): value for name, value in model.named_parameters() if ".experts." in name}
    wanted = {name: value for name, value in load_file(saved[0] / "adapter_model.safetensors").items() if name in there}
    assert len(wanted) == len(there) == 12
    assert all(torch.equal(there[name], wanted[name]) for name in wanted)
    if case.dtype is torch.float32:
        assert torch.equal(logits_of(model, MIXTRAL.inputs()), saved[1])


def test_state_dict_loading(case: Case, saved: tuple[Path, torch.Tensor]) -> None:
    model = adapted_model(MIXTRAL, case)
    peft.set_peft_model_state_dict(model, load_file(saved[0] / "adapter_model.safetensors"))
    assert torch.equal(logits_of(model, MIXTRAL.inputs()), saved[1])


def test_adapter_of_other_sizes_does_not_load(case: Case, saved: tuple[Path, torch.Tensor]) -> None:
    file = saved[0] / "adapter_model.safetensors"
    tensors = {name: value.clone() for name, value in load_file(file).items()}
    key = "base_model.model.model.layers.1.mlp.experts.up_proj.lora_A.weight"
    save_file({**tensors, key: tensors[key][:4].contiguous()}, file)
    with pytest.raises(KTAMXError, match="truncated"):
        PeftModel.from_pretrained(patched_model(MIXTRAL, case), saved[0])
    (saved[0] / MANIFEST).unlink()
    with pytest.raises(KTAMXError, match=r"layers\.1\.mlp\.experts\.up_proj has lora_A"):
        PeftModel.from_pretrained(patched_model(MIXTRAL, case), saved[0])


def test_regex_and_all_linear_reach_what_they_name() -> None:
    model = patched_model(QWEN3, TORCH_FP32)
    model = get_peft_model(model, lora_config(QWEN3, target_modules=r".*experts\.(gate|up)_proj"))
    assert len(trainable(model)) == 8
    model = get_peft_model(patched_model(QWEN3, TORCH_FP32), lora_config(QWEN3, target_modules="all-linear"))
    assert [name for name in trainable(model) if ".self_attn.q_proj." in name]
    assert not [name for name in trainable(model) if ".mlp.gate." in name]
