"""What apply_kt_moe refuses, by name and leaving the model as it was, and what a patched model refuses to do."""

from __future__ import annotations

import copy
import io
import pickle
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

from kt_hf import KTAMXConfigError, KTAMXError, KTAMXModelNotSupportedError, KTConfig, apply_kt_moe
from kt_hf.experts import kt_layers
from tests.support.cases import TORCH_FP32, Case, make_config
from tests.support.helpers import MIXTRAL
from tests.support.patched import adapted_model, logits_of, patched_model, trainable

IDS = MIXTRAL.inputs()
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 32}  # fmt: skip


def one_bias() -> nn.Module:
    model = GptOssForCausalLM(GptOssConfig(**TINY, head_dim=16, num_local_experts=4, num_experts_per_tok=2))
    del model.model.layers[0].mlp.experts.down_proj_bias
    return model


def clamped() -> nn.Module:
    """Its limit is nowhere but in its code."""
    model = mixtral()
    experts = model.model.layers[0].mlp.experts
    plain = type(experts)._apply_gate
    gate = {"_apply_gate": lambda self, gu: plain(self, gu.clamp(max=100.0))}
    experts.__class__ = type("ClampedExperts", (type(experts),), gate)
    return model


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


class Steep(nn.Module):
    def forward(self, g: torch.Tensor) -> torch.Tensor:
        return g * torch.sigmoid(1.7 * g)


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
    "one bias": (one_bias, ("GptOssExperts", "model.layers.0.mlp.experts", "gate_up_proj_bias")),
    "tanh": (lambda: mixtral(hidden_act="tanh"), ("MixtralExperts", "hidden_act='tanh'", "gelu_tanh")),
    "a limit of its own": (clamped, ("ClampedExperts", "_apply_gate")),
    "a slope of its own": (changed(act_fn=Steep()), ("MixtralExperts",)),
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


def refused(model: nn.Module, words: str, **config: Any) -> None:
    with pytest.raises(KTAMXConfigError, match=words):
        apply_kt_moe(model, make_config("torch", **config))
    assert not kt_layers(model), "refused, and yet patched"


def test_settings_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = MIXTRAL()
    refused(model, "kt_num_gpu_experts=2 needs a CUDA GPU", kt_num_gpu_experts=2)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_several_processes_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(MIXTRAL(), "WORLD_SIZE=2, but RANK is not set.*torchrun --nproc_per_node 2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    refused(MIXTRAL(), "8 experts cannot be divided evenly among 3 processes.*Start 2")
    for one in ("1", ""):
        monkeypatch.setenv("WORLD_SIZE", one)
        assert kt_layers(apply_kt_moe(MIXTRAL(), make_config("torch")))


def test_several_processes_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 3)
    layers = kt_layers(apply_kt_moe(MIXTRAL(), make_config("torch")))
    assert {(layer.share.lo, layer.share.hi, layer.share.total) for layer in layers if layer.share} == {(6, 8, 8)}
    refused(MIXTRAL(), "saved experts are packed for one process", kt_weight_path="somewhere")


def test_data_parallel() -> None:
    refused(nn.DataParallel(MIXTRAL()), "DataParallel")


def test_data_parallel_replicas_are_refused() -> None:
    layer = patched_model(MIXTRAL, TORCH_FP32)._kt_wrappers[0]
    with pytest.raises(KTAMXConfigError, match=r"DataParallel.*CUDA_VISIBLE_DEVICES"):
        layer._replicate_for_data_parallel()


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
    with pytest.raises(KTAMXError, match=r"packed for the CPU operators.*kt-hf export ADAPTER OUT --to merged"):
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
