"""apply_kt_moe: what it replaces, when, twice, after PEFT; and what it refuses by name, leaving the model as it was."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from kt_hf import (
    KTAMXConfigError,
    KTAMXError,
    KTAMXModelNotSupportedError,
    KTConfig,
    KTExperts,
    apply_kt_moe,
    kt_lora_config,
)
from kt_hf.experts import kt_layers
from tests.conftest import TORCH_FP32, Case, make_config
from tests.families.layers import RANK
from tests.families.patched import (
    adapted_model,
    fill_lora,
    gradients_of,
    logits_of,
    lora_config,
    loss_of,
    patched_model,
    trainable,
)
from tests.helpers import MIXTRAL
from tests.helpers import one_torch_thread as one_torch_thread
from tests.models import FAMILIES, expert_modules
from tests.reference import LORA_NAMES, assert_close

IDS = MIXTRAL.inputs()
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 32}  # fmt: skip


# -- what is there afterwards


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
    assert {name: value.shape for name, value in model.state_dict().items()} == {n: v.shape for n, v in rest.items()}
    assert all(torch.equal(value, rest[name]) for name, value in model.state_dict().items())
    assert not trainable(model)
    assert all(isinstance(module, KTExperts) for module in expert_modules(model).values())


def test_layers_in_order(case: Case) -> None:
    family = FAMILIES["qwen3_moe"]
    model = patched_model(family, case)
    assert model._kt_wrappers == kt_layers(model) == list(expert_modules(model).values())
    assert tuple(layer.layer_idx for layer in model._kt_wrappers) == family.moe_layers
    assert [layer.label for layer in model._kt_wrappers] == [f"model.layers.{i}.mlp.experts" for i in family.moe_layers]


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


# -- the weights


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
get_peft_model(MixtralForCausalLM(MixtralConfig(**{**sizes, "hidden_size": 32, "num_hidden_layers": 1}, vocab_size=8,
    num_attention_heads=4, num_key_value_heads=2)), kt_lora_config(model))  # what it imports is not counted
before = memory("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
settings = dict(kt_backend=sys.argv[1], kt_num_threads=1, kt_share_backward_weights=True)
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


# -- after PEFT


def test_after_an_attention_adapter(case: Case, tmp_path: Path) -> None:
    config = lora_config(MIXTRAL, target_modules=list(MIXTRAL.attention))
    model = get_peft_model(MIXTRAL(case.dtype), config)
    fill_lora(model, seed=1)
    before, names = logits_of(model, IDS), set(trainable(model))
    assert apply_kt_moe(model, make_config(case.backend)) is model
    assert set(trainable(model)) == names
    assert_close(logits_of(model, IDS), before, 10 * case.same, "logits")
    model.save_pretrained(tmp_path)
    expected = logits_of(model, IDS)
    assert torch.equal(logits_of(PeftModel.from_pretrained(patched_model(MIXTRAL, case), tmp_path), IDS), expected)
    model.add_adapter("later", lora_config(MIXTRAL))
    model.set_adapter("later")
    assert len([name for name in trainable(model) if ".experts." in name]) == 12


STOCK = {
    "mixtral": (FAMILIES["mixtral"], {"target_modules": ["q_proj", "w1", "w2", "w3"]}),
    "qwen3_moe": (FAMILIES["qwen3_moe"], {}),
    "deepseek_v2": (FAMILIES["deepseek_v2"], {}),
    "target_parameters": (
        FAMILIES["qwen2_moe"],
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
    "down alone": (
        FAMILIES["mixtral"],
        {"target_modules": ["v_proj"], "target_parameters": ["experts.down_proj"], "use_rslora": True},
    ),
}


@pytest.mark.parametrize("filled", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("name", STOCK)
def test_after_stock_peft_wrapped_the_fused_experts(name: str, filled: bool, case: Case, tmp_path: Path) -> None:
    family, settings = STOCK[name]
    ids = family.inputs()
    model = get_peft_model(family(case.dtype), lora_config(family, **settings))
    base = logits_of(model, ids)
    assert not all(hasattr(module, "gate_up_proj") for module in expert_modules(model).values()), "not wrapped at all"
    if filled:
        fill_lora(model, seed=1)
    before = logits_of(model, ids)
    assert torch.equal(before, base) != filled

    apply_kt_moe(model, make_config(case.backend))
    after = logits_of(model, ids)
    assert_close(after, before, 10 * case.same, "logits after patching")
    gradients = gradients_of(model, loss_of(model, ids))
    experts = [name for name in gradients if ".experts." in name and ".lora_B." in name]
    assert len(experts) == (2 if name == "down alone" else 6)
    assert all(gradients[name].any() for name in experts)
    if not filled and name != "target_parameters":
        layer = model._kt_wrappers[0]
        assert {p.r["default"] for p in layer.projections if p.r} == {RANK}, "a fresh adapter has the config's rank"

    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(patched_model(family, case), tmp_path)
    assert torch.equal(logits_of(again, ids), after)
    assert not again.peft_config["default"].target_parameters


def test_two_stock_adapters_are_both_taken_over() -> None:
    settings = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    model = get_peft_model(MIXTRAL(), lora_config(MIXTRAL, **settings))
    model.add_adapter("other", lora_config(MIXTRAL, r=4, **settings))
    fill_lora(model, seed=1)
    before = {}
    for adapter in ("default", "other"):
        model.set_adapter(adapter)
        before[adapter] = logits_of(model, IDS)
    apply_kt_moe(model, make_config("torch"))
    assert_close(logits_of(model, IDS), before["other"], 1e-4, "the active adapter")
    assert all(".other." in name for name in trainable(model))
    model.set_adapter("default")
    assert_close(logits_of(model, IDS), before["default"], 1e-4, "the other")


def test_transformers_own_adapters(case: Case, tmp_path: Path) -> None:
    model = patched_model(MIXTRAL, case)
    model.add_adapter(lora_config(MIXTRAL))
    fill_lora(model, seed=1)
    expected = logits_of(model, IDS)
    model.save_pretrained(tmp_path)
    again = patched_model(MIXTRAL, case)
    assert not torch.equal(logits_of(again, IDS), expected)
    again.load_adapter(str(tmp_path))
    assert torch.equal(logits_of(again, IDS), expected)


# -- models that cannot be patched


def gpt_oss() -> nn.Module:
    return GptOssForCausalLM(GptOssConfig(**TINY, head_dim=16, num_local_experts=4, num_experts_per_tok=2))


def mixtral(**settings: Any) -> nn.Module:
    return MixtralForCausalLM(MixtralConfig(**TINY, num_local_experts=4, **settings))


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return mixtral()


class OldMoe(nn.Module):
    """Experts as transformers 4 and hub code have them."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))


def changed(**attributes: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = mixtral()
        for name, value in attributes.items():
            setattr(model.model.layers[0].mlp.experts, name, value)
        return model

    return build


class OwnGate(MixtralForCausalLM):
    def __init__(self) -> None:
        super().__init__(MixtralConfig(**TINY, num_local_experts=4))
        experts = self.model.layers[0].mlp.experts
        experts.__class__ = type("OwnGateExperts", (type(experts),), {"_apply_gate": lambda self, x: x})


def half_integer() -> nn.Module:
    model = mixtral()
    experts = model.model.layers[0].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.detach().to(torch.float64))
    return model


UNSUPPORTED: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "dense Llama": (lambda: LlamaForCausalLM(LlamaConfig(**TINY)), ("LlamaForCausalLM", "no routed experts")),
    "gpt_oss": (gpt_oss, ("GptOssExperts", "model.layers.0.mlp.experts", "gate_up_proj_bias")),
    "gelu": (lambda: mixtral(hidden_act="gelu"), ("MixtralExperts", "GELU", "hidden_act='gelu'")),
    "ModuleList": (OldMoe, ("OldMoe", "experts (ModuleList)", "trust_remote_code")),
    "meta": (on_meta, ("MixtralExperts", "meta device", "device_map")),
    "transposed": (changed(is_transposed=True), ("MixtralExperts", "is_transposed=True")),
    "interleaved": (changed(is_concatenated=False), ("is_concatenated=False",)),
    "without gate": (changed(has_gate=False), ("has_gate=False",)),
    "expert parallel": (changed(_is_expert_parallel=True), ("_is_expert_parallel=True",)),
    "another parameter": (changed(scale=nn.Parameter(torch.ones(3))), ("'scale'",)),
    "own gate": (OwnGate, ("OwnGateExperts", "_apply_gate")),
    "other sizes": (changed(down_proj=nn.Parameter(torch.randn(4, 64, 95))), ("(4, 192, 64)", "(4, 64, 95)")),
    "other dtypes": (half_integer, ("float32", "float64")),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_models_are_refused_by_name(name: str) -> None:
    build, words = UNSUPPORTED[name]
    model = build()
    modules = dict(model.named_modules())
    with pytest.raises(KTAMXModelNotSupportedError) as error:
        apply_kt_moe(model, KTConfig(kt_backend="torch"))
    assert not [word for word in words if word not in str(error.value)], str(error.value)
    assert isinstance(error.value, ValueError)
    assert dict(model.named_modules()) == modules, "refused, and yet changed"


def test_model_that_does_not_tell_its_top_k_is_refused() -> None:
    model = mixtral()
    block = model.model.layers[0].mlp
    model.config, block.top_k, block.gate.top_k = SimpleNamespace(hidden_act="silu"), None, None
    with pytest.raises(KTAMXModelNotSupportedError, match="how many experts a token is sent to"):
        apply_kt_moe(model, KTConfig(kt_backend="torch"))


# -- runs that cannot work


def refused(model: nn.Module, words: str, **config: Any) -> None:
    with pytest.raises(KTAMXConfigError, match=words):
        apply_kt_moe(model, make_config("torch", **config))
    assert not kt_layers(model), "refused, and yet patched"


@pytest.mark.parametrize(("name", "value"), [("kt_weight_path", "weights"), ("kt_num_gpu_experts", 2)])
def test_settings_not_supported_yet(name: str, value: Any) -> None:
    model = MIXTRAL()
    refused(model, f"{name}={value!r} is not supported yet", **{name: value})
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_several_processes_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(MIXTRAL(), "WORLD_SIZE=2.*num_processes 1")
    for one in ("1", ""):
        monkeypatch.setenv("WORLD_SIZE", one)
        assert kt_layers(apply_kt_moe(MIXTRAL(), make_config("torch")))


def test_several_processes_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    refused(MIXTRAL(), "WORLD_SIZE=4")


def test_data_parallel() -> None:
    refused(nn.DataParallel(MIXTRAL()), "DataParallel")


def test_data_parallel_replicas_are_refused() -> None:
    layer = patched_model(MIXTRAL, TORCH_FP32)._kt_wrappers[0]
    with pytest.raises(KTAMXConfigError, match=r"DataParallel.*CUDA_VISIBLE_DEVICES"):
        layer._replicate_for_data_parallel()


# -- what a patched model cannot do


def test_save_of_the_bare_model_is_refused(tmp_path: Path) -> None:
    """It would write a checkpoint without experts; also from inside a PeftModel."""
    for model in (patched_model(MIXTRAL, TORCH_FP32), adapted_model(MIXTRAL, TORCH_FP32).get_base_model()):
        with pytest.raises(KTAMXError, match=r"cannot be saved.*get_peft_model"):
            model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("adapt", [False, True], ids=["model", "peft model"])
def test_copies_are_refused(case: Case, adapt: bool) -> None:
    model = adapted_model(MIXTRAL, case) if adapt else patched_model(MIXTRAL, case)
    expected = logits_of(model, IDS)
    with pytest.raises(KTAMXError, match=r"cannot be deep-copied.*ref_model=None"):
        copy.deepcopy(model)
    with pytest.raises(KTAMXError, match=r"cannot be pickled.*save_pretrained"):
        pickle.dumps(model._kt_wrappers[0])
    with pytest.raises(KTAMXError, match="cannot be pickled"):
        torch.save(model, io.BytesIO())
    assert torch.equal(logits_of(model, IDS), expected)


MERGES: dict[str, Callable[[PeftModel], Any]] = {
    "merge_and_unload": lambda model: model.merge_and_unload(),
    "unload": lambda model: model.unload(),
    "merge_adapter": lambda model: model.merge_adapter(),
}


@pytest.mark.parametrize("name", MERGES)
def test_merging_is_refused_in_words(name: str, case: Case) -> None:
    with pytest.raises(KTAMXError, match=r"packed for the CPU operators.*without apply_kt_moe, and merge there"):
        MERGES[name](adapted_model(MIXTRAL, case, seed=1))


@pytest.mark.parametrize("name", MERGES)
def test_refused_merging_leaves_the_model_whole(name: str) -> None:
    model = adapted_model(MIXTRAL, TORCH_FP32, seed=1)
    parameters, logits = set(trainable(model)), logits_of(model, IDS)
    with pytest.raises(KTAMXError):
        MERGES[name](model)
    assert set(trainable(model)) == parameters, "part of the adapter is gone"
    assert not [name for name, module in model.named_modules() if getattr(module, "merged", False)]
    assert torch.equal(logits_of(model, IDS), logits)


def test_projections_are_not_called_by_themselves() -> None:
    layer = patched_model(MIXTRAL, TORCH_FP32)._kt_wrappers[0]
    with pytest.raises(KTAMXError, match="KTExperts computes the three together"):
        layer.gate_proj(torch.randn(1, 64))


def test_target_parameters_of_a_patched_model_are_refused() -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    with pytest.raises(KTAMXConfigError, match=r"target_parameters=.*gate_up_proj.*target_modules"):
        get_peft_model(patched_model(MIXTRAL, TORCH_FP32), config)
    with_experts = kt_lora_config(patched_model(MIXTRAL, TORCH_FP32))
    assert not with_experts.target_parameters
