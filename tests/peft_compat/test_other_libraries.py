"""What other libraries do with a patched model: count its parameters, bind kernels to its layers, optimize its LoRA."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import peft
import pytest
import torch
from peft import PeftMixedModel, get_peft_model
from transformers import PreTrainedModel

from kt_hf import KTAMXConfigError, KTConfig, apply_kt_moe, kt_lora_config
from kt_hf.backends.kt_kernel import kept_memory
from kt_hf.backends.kt_kernel.kept_memory import KeptMemory
from kt_hf.experts import kt_layers
from kt_hf.peft_compat import install
from kt_hf.peft_compat.counts import expert_parameters
from tests.support.cases import KERNEL_MISSING
from tests.support.models import FAMILIES, Family

TORCH = KTConfig(kt_backend="torch")
QWEN3 = FAMILIES["qwen3_moe"]


def patched(family: Family = QWEN3) -> PreTrainedModel:
    return apply_kt_moe(family(), TORCH)


# Counts


@pytest.mark.parametrize("name", FAMILIES)
def test_experts_are_counted_and_are_no_parameters(name: str) -> None:
    stock = FAMILIES[name]()
    counts = [stock.num_parameters(), stock.num_parameters(exclude_embeddings=True)]
    model = patched(FAMILIES[name])
    assert [model.num_parameters(), model.num_parameters(exclude_embeddings=True)] == counts
    assert model.num_parameters(only_trainable=True) == 0
    assert sum(p.numel() for p in model.parameters()) == counts[0] - expert_parameters(model)


def test_print_trainable_parameters_counts_them(capsys: pytest.CaptureFixture[str]) -> None:
    whole = QWEN3().num_parameters()
    model = get_peft_model(patched(), kt_lora_config(patched(), lora_rank=2))
    lora = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert model.get_nb_trainable_parameters() == (lora, whole + lora)
    model.print_trainable_parameters()
    assert f"trainable params: {lora:,} || all params: {whole + lora:,} ||" in capsys.readouterr().out
    assert model.get_model_status().total_params == whole + lora
    assert model.num_parameters() == whole + lora
    assert model.num_parameters(only_trainable=True) == lora


def test_mixed_models_count_them_too() -> None:
    model = PeftMixedModel(patched(), kt_lora_config(patched(), lora_rank=2))
    trainable, everything = model.get_nb_trainable_parameters()
    assert everything == QWEN3().num_parameters() + trainable


def test_other_models_are_counted_as_ever() -> None:
    model = QWEN3()
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())
    adapted = get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert adapted.get_nb_trainable_parameters()[1] == sum(p.numel() for p in adapted.parameters())


# Liger


@pytest.fixture
def binder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Liger's module that puts its forward on layers: its own, or what it does in a few lines where it is not there."""
    if importlib.util.find_spec("liger_kernel") is None:
        folder = tmp_path / "liger_kernel" / "transformers"
        folder.mkdir(parents=True)
        (tmp_path / "liger_kernel" / "__init__.py").touch()
        (folder / "__init__.py").touch()
        (folder / "monkey_patch.py").write_text(
            "def _bind_method_to_module(module, method_name, new_method):\n"
            "    module.__dict__[method_name] = new_method.__get__(module, module.__class__)\n"
        )
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setattr("kt_hf.peft_compat.patches.version", lambda name: "0.8.5")
    before = set(sys.modules)
    yield importlib.import_module("liger_kernel.transformers.monkey_patch")
    for name in set(sys.modules) - before:
        if name.startswith("liger_kernel"):
            del sys.modules[name]


def test_kernels_are_bound_to_other_layers_alone(binder: ModuleType) -> None:
    """Seen: 'KTExperts' object has no attribute 'hidden_dim' at the first step."""
    model = patched()
    ids = torch.tensor([[1, 2, 3, 4]])
    expected = model(ids).logits

    def forward(self: torch.nn.Module, *args: object) -> object:
        raise AssertionError("the experts were replaced")

    for layer in kt_layers(model):
        binder._bind_method_to_module(layer, "forward", forward)
    assert torch.equal(model(ids).logits, expected)
    binder._bind_method_to_module(model.model.norm, "forward", forward)
    with pytest.raises(AssertionError, match="replaced"):
        model(ids)


def test_what_was_bound_all_the_same_is_refused_before_the_first_step(tmp_path: Path) -> None:
    """By another way than Liger's: the callback sees it."""
    from transformers import Trainer, TrainingArguments

    from kt_hf import KTMoECallback

    model = get_peft_model(patched(), kt_lora_config(patched(), lora_rank=2))
    layer = kt_layers(model)[0]
    layer.__dict__["forward"] = lambda *_: None
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 2
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=1, use_cpu=True, report_to=[])
    with pytest.raises(KTAMXConfigError, match=rf"forward of {layer.label} has been replaced by .*<lambda>"):
        Trainer(model, arguments, train_dataset=rows, callbacks=[KTMoECallback()]).train()


# Optimizers


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch has no Muon")
def test_muon_says_which_parameters_it_cannot_take() -> None:
    install()
    model = get_peft_model(patched(), kt_lora_config(patched(), lora_rank=2))
    trained = [p for p in model.parameters() if p.requires_grad]
    with pytest.raises(KTAMXConfigError, match=r"takes matrices only.*experts.*3-D.*AdamW"):
        torch.optim.Muon(trained)
    torch.optim.Muon([p for p in trained if p.dim() == 2])
    with pytest.raises(ValueError, match="2D") as error:  # not ours: as ever
        torch.optim.Muon([torch.nn.Parameter(torch.zeros(3))])
    assert not isinstance(error.value, KTAMXConfigError)
    with pytest.raises(ValueError, match="Learning rate"):
        torch.optim.Muon(trained, lr=-1.0)


# What stays of a model


def test_a_second_model_is_told_once_what_stays(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kept = KeptMemory()
    kept.warn_before_another_model()
    assert not caplog.records
    kept.add(3 * 2**30)
    kept.warn_before_another_model()
    kept.warn_before_another_model()
    assert len(caplog.records) == 1
    assert "3.00 GiB of packed experts" in caplog.text


@pytest.mark.kernel
@pytest.mark.skipif(KERNEL_MISSING is not None, reason=str(KERNEL_MISSING))
def test_layers_on_the_operators_are_counted_as_kept(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kept = KeptMemory()
    for module in ("kt_hf.backends.kt_kernel.backend.KEPT", "kt_hf.patch.KEPT"):
        monkeypatch.setattr(module, kept)
    family = FAMILIES["mixtral"]
    model = apply_kt_moe(family(torch.bfloat16), KTConfig(kt_backend="AMXBF16", kt_lora_rank=4))
    assert kept.packed == 2 * expert_parameters(model)
    assert "stay in memory" not in caplog.text
    del model
    apply_kt_moe(family(torch.bfloat16), KTConfig(kt_backend="AMXBF16", kt_lora_rank=4))
    assert "stay in memory until the process ends" in caplog.text
    assert kept_memory.KEPT is not kept
