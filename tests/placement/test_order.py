"""Which experts go to the GPU: counted, kept with the adapter, restored; and none of it changes the adapter."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from kt_hf import KTAMXConfigError, KTAMXError, Placement, apply_kt_moe, count_experts, load_kt_model, read_placement
from kt_hf.adapters import verify_adapter
from kt_hf.placement import PLACEMENT
from tests.support.cases import TORCH_BF16, make_config
from tests.support.helpers import MIXTRAL
from tests.support.models import FAMILIES, expert_modules
from tests.support.patched import adapted_model, fill_lora, logits_of, lora_config, patched_model
from tests.support.reference import assert_close
from tests.support.tiered import split_model
from tests.support.trainers import trainer_for

pytestmark = pytest.mark.usefixtures("cpu_for_gpu")

GPU = [0, 3, 5]


def placed(model: nn.Module) -> list[list[int]]:
    """The experts in the GPU's tier, of each layer."""
    return [layer._runner.backend.parts[0].experts.tolist() for layer in model._kt_wrappers]


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2"])
@pytest.mark.parametrize("patched", [False, True])
def test_counts(family: str, patched: bool) -> None:
    """As many as the routers chose, by layer, whether the model is patched or not."""
    model = FAMILIES[family]()
    chosen: dict[int, list[torch.Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, i=index: chosen.setdefault(i, []).append(args[1]))
        for index, module in expert_modules(model).items()
    ]
    batches = [FAMILIES[family].inputs(seed=seed) for seed in (1, 2)]
    with torch.no_grad():
        for batch in batches:
            model(input_ids=batch)
    for handle in handles:
        handle.remove()
    if patched:
        apply_kt_moe(model, make_config("torch"))
    model.train()
    counts = count_experts(model, [batches[0], {"input_ids": batches[1], "labels": batches[1]}])
    assert model.training, "the mode is as before"
    assert list(counts) == list(chosen)
    for layer, ids in chosen.items():
        assert torch.equal(counts[layer], torch.bincount(torch.cat(ids).flatten(), minlength=8))
    assert not any(module._forward_pre_hooks for module in expert_modules(model).values())


def test_the_most_used_come_first() -> None:
    placement = Placement.by_use({0: torch.tensor([3, 9, 0, 9]), 1: torch.tensor([0, 0, 1, 0])})
    assert placement.order == {0: (1, 3, 0, 2), 1: (2, 0, 1, 3)}
    placement.check(0, 4)
    for layer, total in ((2, 4), (0, 5)):
        with pytest.raises(KTAMXConfigError, match=f"the model has {total}"):
            placement.check(layer, total)


def test_without_a_profile_the_first_ones(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kt_hf")
    model = apply_kt_moe(MIXTRAL(torch.bfloat16), make_config("torch", kt_num_gpu_experts=2, kt_lora_rank=8))
    assert placed(model) == [[0, 1]] * 2
    assert "count_experts" in caplog.text, "nobody is told that a profile would be better"


def test_another_models_placement_is_refused_before_any_work() -> None:
    model = MIXTRAL(torch.bfloat16)
    before = [module.gate_up_proj for module in expert_modules(model).values()]
    with pytest.raises(KTAMXConfigError, match="another model's"):
        apply_kt_moe(model, make_config("torch", kt_num_gpu_experts=2), placement={0: torch.ones(4)})
    assert all(m.gate_up_proj is w for m, w in zip(expert_modules(model).values(), before, strict=True))


def test_the_adapter_does_not_know_where_experts_ran(tmp_path: Path) -> None:
    """Files of a split and of an unsplit model with the same values are equal; each loads into the other."""
    split, plain = split_model(TORCH_BF16, GPU, seed=1), adapted_model(MIXTRAL, TORCH_BF16, seed=1)
    split.save_pretrained(tmp_path / "split")
    plain.save_pretrained(tmp_path / "plain")
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("split", "plain"))
    assert list(a) == list(b)
    assert all(torch.equal(a[key], b[key]) for key in a)
    ids = MIXTRAL.inputs()
    other = PeftModel.from_pretrained(patched_model(MIXTRAL, TORCH_BF16), tmp_path / "split")
    assert_close(logits_of(other, ids), logits_of(plain, ids), 1e-6, "logits of the split model's adapter")


def test_saved_with_the_adapter(tmp_path: Path) -> None:
    """In the manifest, so that damage is seen; restored by placement=, by adapter=, and by from_pretrained."""
    split_model(TORCH_BF16, GPU, seed=1).save_pretrained(tmp_path)
    assert PLACEMENT in json.loads((tmp_path / "kt_adapter_manifest.json").read_text())["files"]
    config = make_config("torch", kt_num_gpu_experts=3)
    ways: dict[str, Any] = {
        "placement": lambda m: get_peft_model(apply_kt_moe(m, config, placement=tmp_path), lora_config(MIXTRAL)),
        "adapter": lambda m: apply_kt_moe(m, config, adapter=tmp_path),
        "from_pretrained": lambda m: PeftModel.from_pretrained(apply_kt_moe(m, config), tmp_path),
    }
    for name, way in ways.items():
        assert placed(way(MIXTRAL(torch.bfloat16))) == [GPU] * 2, name
    found = read_placement(tmp_path)
    assert found is not None
    assert (found.order[0][:3], found.source) == (tuple(GPU), "a profile of 6 choices of the routers")
    (tmp_path / PLACEMENT).write_text("{}")
    with pytest.raises(KTAMXError, match=PLACEMENT):
        verify_adapter(tmp_path)


def test_a_model_without_placement_leaves_no_file_of_an_earlier_one(tmp_path: Path) -> None:
    split_model(TORCH_BF16, GPU, seed=1).save_pretrained(tmp_path)
    adapted_model(MIXTRAL, TORCH_BF16, seed=1).save_pretrained(tmp_path)
    assert not (tmp_path / PLACEMENT).exists()
    verify_adapter(tmp_path)


def test_another_placement_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    split_model(TORCH_BF16, GPU, seed=1).save_pretrained(tmp_path)
    model = split_model(TORCH_BF16, [1, 2, 7])
    model.load_adapter(tmp_path, "other")
    assert placed(model) == [[1, 2, 7]] * 2
    assert "placement=" in caplog.text


def test_no_placement_in_the_folder(tmp_path: Path) -> None:
    with pytest.raises(KTAMXConfigError, match=PLACEMENT):
        apply_kt_moe(MIXTRAL(torch.bfloat16), make_config("torch", kt_num_gpu_experts=2), placement=tmp_path)


def test_load_kt_model(tmp_path: Path) -> None:
    """Streamed, and the same logits as patched from memory."""
    MIXTRAL(torch.bfloat16).save_pretrained(tmp_path)
    counts = {layer: torch.tensor([int(e in GPU) for e in range(8)]) for layer in (0, 1)}
    config = make_config("torch", kt_num_gpu_experts=3, kt_lora_rank=8)
    model = load_kt_model(tmp_path, config, placement=counts)
    assert placed(model) == [GPU] * 2
    ids = MIXTRAL.inputs()
    assert_close(logits_of(model, ids), logits_of(patched_model(MIXTRAL, TORCH_BF16), ids), 0.06, "logits")


def test_resumed_run_keeps_the_placement(tmp_path: Path) -> None:
    """Stock Trainer: stopped after 3 of 6 steps and resumed in a fresh model, to the bit as the run that went on."""
    ends = []
    for resumed in (False, True):
        if not resumed:
            model = split_model(TORCH_BF16, GPU, seed=1)
        else:
            config = make_config("torch", kt_num_gpu_experts=3)
            patched = apply_kt_moe(MIXTRAL(torch.bfloat16), config, placement=tmp_path / "checkpoint-3")
            model = get_peft_model(patched, lora_config(MIXTRAL))
            fill_lora(model, seed=2)
        trainer = trainer_for(model, tmp_path, max_steps=6, save_strategy="steps", save_steps=3, learning_rate=1e-3)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3") if resumed else None)
        assert placed(model) == [GPU] * 2
        ends.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
    unlike = [name for name, value in ends[0].items() if not torch.equal(ends[1][name], value)]
    assert not unlike
