"""Models with code of their own, whose experts are a ModuleList: patched, they train as they are written."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from kt_hf import KTAMXModelNotSupportedError, KTMoECallback, apply_kt_moe, kt_lora_config, load_kt_model
from kt_hf.experts import kt_layers
from kt_hf.patch import _warn_of_evaluation
from tests.support.cases import make_config
from tests.support.family_reference import merged_forward
from tests.support.patched import fill_lora
from tests.support.reference import relative_error

DATA = Path(__file__).parents[1] / "data/remote_code"
KINDS = ("looped", "sorted")
IDS = torch.arange(24).reshape(2, 12) * 7 % 96


@pytest.fixture(autouse=True)
def modules_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where transformers copies a model's code to: a folder of the test's."""
    from transformers import dynamic_module_utils

    folder = tmp_path_factory.mktemp("modules")
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder))
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    importlib.invalidate_caches()
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        del sys.modules[name]


def made(kind: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    config = AutoConfig.from_pretrained(DATA / kind, trust_remote_code=True, **settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True, dtype=torch.float32)
    return model.to(dtype).eval()


def patched(kind: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    return apply_kt_moe(made(kind, dtype, **settings), make_config("torch"))


def adapted(kind: str, **settings: Any) -> PeftModel:
    model = patched(kind, **settings)
    model = get_peft_model(model, kt_lora_config(model, lora_rank=2, lora_alpha=4))
    fill_lora(model, seed=1)
    return model


def block(model: nn.Module, layer: int = 0) -> Any:
    layer = model.model.layers[layer]
    return layer.mlp if hasattr(layer, "mlp") else layer.block_sparse_moe


def trainable_as_written(model: nn.Module) -> nn.Module:
    """The unpatched `sorted` with gradients: without them is its method alone, and its router's assertion."""
    for module in model.modules():
        if hasattr(module, "routed"):
            method = type(module).routed.__wrapped__
            module.routed = method.__get__(module)
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [False, True])
def test_equal_to_the_unpatched(kind: str, training: bool) -> None:
    """Logits, and gradients of LoRA, routers and all else."""
    stock = made(kind)
    stock = trainable_as_written(stock) if kind == "sorted" else stock.train(training)
    with torch.no_grad():
        before = stock(input_ids=IDS).logits
        assert (patched(kind).train(training)(input_ids=IDS).logits - before).abs().max() < 1e-6
    model = adapted(kind).train(training)
    lora = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert len([p for p in lora.values() if p.dim() == 3]) == 12
    leaves = {name: p.detach().clone().requires_grad_() for name, p in lora.items()}
    wanted = merged_forward(stock, model, leaves, input_ids=IDS).logits
    assert relative_error(model(input_ids=IDS).logits, wanted) < 1e-5
    assert relative_error(before, wanted) > 0.01
    plain = dict(stock.named_parameters())
    others = {name.removeprefix("base_model.model.").replace(".base_layer.", "."): p.requires_grad_()
              for name, p in model.named_parameters() if "lora_" not in name}  # fmt: skip
    assert any(name.endswith("gate.weight") for name in others)
    direction = torch.randn(wanted.shape) / wanted.numel() ** 0.5
    ours = torch.autograd.grad(
        model(input_ids=IDS).logits, [*lora.values(), *others.values()], direction, allow_unused=True
    )
    theirs = torch.autograd.grad(
        wanted, [*leaves.values(), *(plain[name] for name in others)], direction, allow_unused=True
    )
    for name, one, other in zip([*lora, *others], ours, theirs, strict=True):
        assert (one is None) == (other is None), name
        assert one is None or relative_error(one, other) < 2e-5, name


def test_what_evaluation_loses_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """Once for a class: the block's own code has no gradients of experts in training."""
    _warn_of_evaluation.cache_clear()
    patched("sorted")
    patched("looped")
    said = [record.message for record in caplog.records if "as in evaluation" in record.message]
    assert len(said) == 1
    assert "an auxiliary loss of its router" in said[0]


def test_noise_is_drawn_once() -> None:
    """The block writes noise to its own input in training: the same in both passes, and once."""
    results = []
    for model in (made("looped", noise=0.1), patched("looped", noise=0.1)):
        torch.manual_seed(3)
        with torch.no_grad():
            results.append(model.train()(input_ids=IDS).logits)
        results.append(torch.rand(3))
    assert (results[0] - results[2]).abs().max() < 1e-5
    assert torch.equal(results[1], results[3])
    assert (results[0] - made("looped")(input_ids=IDS).logits).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_in_bf16(kind: str) -> None:
    with torch.no_grad():
        before = made(kind, torch.bfloat16)(input_ids=IDS).logits
        assert relative_error(patched(kind, torch.bfloat16)(input_ids=IDS).logits, before) < 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_trains_saves_and_loads(kind: str, tmp_path: Path) -> None:
    model = patched(kind)
    model = get_peft_model(model, kt_lora_config(model, lora_rank=2))
    rows = [{"input_ids": IDS[i % 2].tolist(), "labels": IDS[i % 2].tolist()} for i in range(4)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"), use_cpu=True, report_to=[], disable_tqdm=True, max_steps=8,
        per_device_train_batch_size=2, learning_rate=0.02, logging_steps=1, save_strategy="no",
        dataloader_pin_memory=False, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[KTMoECallback()])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(patched(kind), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_are_taken_over(kind: str) -> None:
    model = made(kind)
    expert = block(model).experts[0]
    apply_kt_moe(model, make_config("torch"))
    assert not sum(p.numel() for p in expert.parameters())
    assert [layer.label for layer in kt_layers(model)] == [
        f"model.layers.{i}.{'mlp' if kind == 'sorted' else 'block_sparse_moe'}.experts" for i in (0, 1)
    ]


def scaled_by_its_place(self: Any, hidden: Tensor) -> Tensor:
    return sum(float(e) * expert(hidden) for e, expert in enumerate(self.experts)) + hidden.mean()


def reads_weights(self: Any, hidden: Tensor) -> Tensor:
    return hidden @ self.experts[0].w1.weight.t() @ self.experts[0].w2.weight.t()


def looks_at_results(self: Any, hidden: Tensor) -> Tensor:
    first = self.experts[0](hidden)
    return first + self.experts[1 if first.abs().sum() == 0 else 2](hidden)


def without_gradients(self: Any, hidden: Tensor) -> Tensor:
    with torch.no_grad():
        return 2.0 * self.experts[0](hidden)


WAYS = {
    "reads_weights": (reads_weights, "LoopedBlock computes its experts in a way in which they cannot"),
    "looks_at_results": (looks_at_results, "was called with other rows"),
    "without_gradients": (without_gradients, "no gradient reaches its experts"),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_block_that_cannot_be_told_is_refused(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything of the model is changed."""
    model = made("looped")
    forward, message = WAYS[way]
    monkeypatch.setattr(type(block(model)), "forward", forward)
    before = model.state_dict()
    with pytest.raises(KTAMXModelNotSupportedError, match=message):
        apply_kt_moe(model, make_config("torch"))
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(before[name] is after[name] or torch.equal(before[name], after[name]) for name in before)
    assert isinstance(block(model).experts, nn.ModuleList)
    assert "forward" not in vars(block(model))


def test_any_sum_of_its_experts_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("looped")
    monkeypatch.setattr(type(block(model)), "forward", lambda self, x: (scaled_by_its_place(self, x), None))
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        assert relative_error(apply_kt_moe(model, make_config("torch"))(input_ids=IDS).logits, before) < 1e-5


@pytest.mark.parametrize("change", ["bias", "sizes", "norm", "activation"])
def test_other_mlps_are_refused(change: str) -> None:
    model = made("looped")
    expert = block(model).experts[0]
    if change == "bias":
        expert.w1 = nn.Linear(64, 96)
    elif change == "sizes":
        expert.w1, expert.w3, expert.w2 = nn.Linear(64, 32, bias=False), nn.Linear(64, 32, bias=False), nn.Linear(
            32, 64, bias=False
        )  # fmt: skip
    elif change == "norm":
        expert.norm = nn.LayerNorm(64)
    else:
        expert.act = nn.Tanh()
    with pytest.raises(
        KTAMXModelNotSupportedError, match=r"not supported: model.layers.0.block_sparse_moe.experts .ModuleList."
    ):
        apply_kt_moe(model, make_config("torch"))


def test_cannot_be_streamed(tmp_path: Path) -> None:
    made("looped").save_pretrained(tmp_path)
    with pytest.raises(KTAMXModelNotSupportedError, match=r"from_pretrained and apply_kt_moe"):
        load_kt_model(tmp_path, make_config("torch"), trust_remote_code=True)
