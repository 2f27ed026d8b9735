"""`load_kt_model` gives what `from_pretrained` and `apply_kt_moe` give, to the bit."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from kt_hf import KTAMXError, KTExperts, apply_kt_moe, load_kt_model
from tests.support.cases import KERNEL_MARKS, Case, make_config
from tests.support.checkpoints import saved
from tests.support.helpers import MIXTRAL
from tests.support.layers import RANK
from tests.support.models import FAMILIES, Family
from tests.support.patched import fill_lora, gradients_of, logits_of, lora_config, loss_of

DIFFERENT_OBJECTS = {"_modules", "_kt_wrappers", "_kt_cpu_infer", "save_pretrained", "config", "generation_config"}


def both(folder: Path, case: Case, **settings: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The model patched after loading, and the streamed one."""
    config = make_config(case.backend, **{"kt_lora_rank": RANK, **settings})
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=case.dtype)
    return apply_kt_moe(stock, config), load_kt_model(folder, config, dtype=case.dtype)


@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
def test_numbers(family: Family, case: Case, sharded: bool, tmp_path: Path) -> None:
    """Logits, and the gradients of a training step, those of expert LoRA among them."""
    expected, actual = both(saved(family, tmp_path, case.dtype, sharded), case)
    ids = family.inputs()
    assert torch.equal(logits_of(actual, ids), logits_of(expected, ids))
    gradients = []
    for model in (expected, actual):
        adapted = get_peft_model(model, lora_config(family))
        fill_lora(adapted, seed=1)
        gradients.append(gradients_of(adapted, loss_of(adapted, ids)))
    assert any(".experts." in name for name in gradients[0])
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradients[1][name], gradient), name


def test_everything_else(family: Family, case: Case, tmp_path: Path) -> None:
    """Modules, parameters, buffers, configurations, attributes, mode, what is trained and what saving does."""
    expected, actual = both(saved(family, tmp_path, case.dtype), case)
    assert type(actual) is type(expected)
    assert {n: type(m) for n, m in actual.named_modules()} == {n: type(m) for n, m in expected.named_modules()}
    assert not actual.training
    assert [m.training for m in actual.modules()] == [m.training for m in expected.modules()]
    for which in ("named_parameters", "named_buffers"):
        one, other = dict(getattr(expected, which)()), dict(getattr(actual, which)())
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            assert torch.equal(other[name], tensor), name
            assert (other[name].dtype, other[name].requires_grad) == (tensor.dtype, tensor.requires_grad), name
    assert actual.config.to_dict() == expected.config.to_dict()
    assert actual.generation_config.to_dict() == expected.generation_config.to_dict()
    assert actual.name_or_path == expected.name_or_path
    assert vars(actual).keys() == vars(expected).keys()
    for name in vars(expected).keys() - DIFFERENT_OBJECTS:
        assert repr(vars(actual)[name]) == repr(vars(expected)[name]), name
    for one, other in zip(expected._kt_wrappers, actual._kt_wrappers, strict=True):
        for name in ("label", "layer_idx", "shape", "lora_dtype", "backend_name", "packed"):
            assert getattr(other, name) == getattr(one, name), name
    assert (actual._kt_cpu_infer is None) == (case.backend == "torch")
    assert actual._kt_cpu_infer is expected._kt_cpu_infer
    with pytest.raises(KTAMXError, match="cannot be saved"):
        actual.save_pretrained(tmp_path / "again")


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    model = MIXTRAL(torch.bfloat16)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path)
    loaded = load_kt_model(tmp_path, make_config("torch"))
    stock = apply_kt_moe(AutoModelForCausalLM.from_pretrained(tmp_path), make_config("torch"))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(logits_of(loaded, MIXTRAL.inputs()), logits_of(stock, MIXTRAL.inputs()))


def test_torch_needs_no_rank(family: Family, tmp_path: Path) -> None:
    """As after apply_kt_moe, an adapter of any rank comes later."""
    model = load_kt_model(saved(family, tmp_path), make_config("torch"))
    adapted = get_peft_model(model, lora_config(family, r=5))
    assert adapted._kt_wrappers[0].lora_params["gate_lora_a"].shape[1] == 5


def test_arguments_of_from_pretrained_arrive(family: Family, tmp_path: Path) -> None:
    saved(family, tmp_path)
    model = load_kt_model(tmp_path, make_config("torch"), attn_implementation="eager", use_cache=False)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", use_cache=False)
    assert model.config._attn_implementation == "eager"
    assert model.config.use_cache is False
    assert model.config.to_dict() == stock.config.to_dict()


def test_a_configuration_may_be_given(family: Family, tmp_path: Path) -> None:
    config = AutoModelForCausalLM.from_pretrained(saved(family, tmp_path)).config
    before = config.to_dict()
    model = load_kt_model(str(tmp_path), make_config("torch"), config=config, dtype="float32")
    assert config.to_dict() == before
    assert (model.dtype, model._kt_wrappers[0].lora_dtype) == (torch.float32, torch.float32)


def test_the_family_is_left_as_it_was(family: Family, tmp_path: Path) -> None:
    """transformers' classes are other people's as well; also after a failure in the middle."""
    before = AutoModelForCausalLM.from_pretrained(saved(family, tmp_path))
    names = {name: type(module) for name, module in before.named_modules()}
    ignored = type(before)._keys_to_ignore_on_load_unexpected
    load_kt_model(tmp_path, make_config("torch"))
    with pytest.raises(TypeError):
        load_kt_model(tmp_path, make_config("torch"), not_an_argument=1)
    after = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {name: type(module) for name, module in after.named_modules()} == names
    assert type(before)._keys_to_ignore_on_load_unexpected == ignored
    assert torch.equal(logits_of(after, family.inputs()), logits_of(before, family.inputs()))


def test_layers_are_read_one_ahead(
    family: Family, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At no time are there weights of more than two layers that are not packed."""
    from kt_hf.checkpoint import ExpertCheckpoint
    from kt_hf.placement.packer import Packer

    order: list[str] = []
    read, pack = ExpertCheckpoint.read, Packer.build

    def watched_read(self: Any, layer: str, *rest: Any) -> Any:
        order.append(f"read {layer}")
        return read(self, layer, *rest)

    def watched_pack(self: Any, weights: Any, shape: Any, rank: int, label: str, layer: int = 0) -> Any:
        made = pack(self, weights, shape, rank, label, layer)
        order.append(f"pack {label}")
        return made

    monkeypatch.setattr(ExpertCheckpoint, "read", watched_read)
    monkeypatch.setattr(Packer, "build", watched_pack)
    model = load_kt_model(saved(family, tmp_path), make_config(backend, kt_lora_rank=RANK))
    labels = [layer.label for layer in model._kt_wrappers]
    assert sorted(order) == sorted([f"read {x}" for x in labels] + [f"pack {x}" for x in labels])
    for index, label in enumerate(labels[2:], 2):
        assert order.index(f"read {label}") > order.index(f"pack {labels[index - 2]}")
    assert all(isinstance(module, KTExperts) for module in model._kt_wrappers)


def test_an_interruption_leaves_nothing_behind(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the second layer is packed and the third is read; then once more, undisturbed."""
    family = FAMILIES["mixtral"]
    stock = AutoModelForCausalLM.from_pretrained(saved(family, tmp_path))
    config = make_config(backend, kt_lora_rank=RANK)
    replace = KTExperts.__init__

    def interrupted(self: KTExperts, weights: Any, shape: Any, layer_idx: int, *rest: Any) -> None:
        if layer_idx == 1:
            raise KeyboardInterrupt
        replace(self, weights, shape, layer_idx, *rest)

    monkeypatch.setattr(KTExperts, "__init__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_kt_model(tmp_path, config)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("kt_hf-read")]
    monkeypatch.undo()
    model = load_kt_model(tmp_path, config)
    assert torch.equal(logits_of(model, family.inputs()), logits_of(apply_kt_moe(stock, config), family.inputs()))


@pytest.mark.parametrize("name", [pytest.param("AMXBF16", marks=KERNEL_MARKS)])
def test_memory_that_is_free_decides_on_backward_weights(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loaded experts are in memory already, streamed ones are not yet: half as much again is enough for the former."""
    family = FAMILIES["mixtral"]
    stock = AutoModelForCausalLM.from_pretrained(saved(family, tmp_path))
    experts = sum(p.numel() * 2 for n, p in stock.named_parameters() if ".experts." in n)
    monkeypatch.setattr("kt_hf.placement.backward_copies.available_memory", lambda *_: int(1.5 * experts))
    config = make_config(name, kt_lora_rank=RANK)
    shared = [
        model._kt_wrappers[0].factory._share for model in (apply_kt_moe(stock, config), load_kt_model(tmp_path, config))
    ]
    assert shared == [False, True]
