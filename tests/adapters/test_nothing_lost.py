"""No way to save or load, of the Trainer's or of PEFT's, that loses an expert tensor without an error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from peft import PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from torch import Tensor, nn

from kt_hf import KTAMXConfigError, KTAMXError, KTMoECallback, apply_kt_moe, verify_adapter
from kt_hf.adapters import MANIFEST, check_checkpoint, convert
from tests.support.cases import TORCH_FP32, Case, make_config, transformers_adapters
from tests.support.helpers import MIXTRAL
from tests.support.patched import adapted_model, fill_lora, logits_of, lora_config, patched_model
from tests.support.trainers import model_to_train, trainer_for

ADAPTER, IDS = "adapter_model.safetensors", MIXTRAL.inputs()


def expert_tensors(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """By the names they are saved under."""
    found = {
        name.replace(f".{adapter}.", "."): parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if ".experts." in name and f".{adapter}." in name
    }
    assert len(found) == 12
    return found


def assert_saved(folder: Path, tensors: dict[str, Tensor]) -> None:
    assert verify_adapter(folder)
    there = load_file(folder / ADAPTER)
    assert not [name for name, value in tensors.items() if not torch.equal(there[name], value)]


# -- the Trainer's ways

RUNS: dict[str, dict[str, Any]] = {
    "save_steps": {"save_strategy": "steps", "save_steps": 1},
    "save_total_limit": {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1},
    "save_only_model": {"save_strategy": "steps", "save_steps": 1, "save_only_model": True},
    "epochs": {"save_strategy": "epoch", "max_steps": -1, "num_train_epochs": 1},
    "best": {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss"},
}


@pytest.mark.parametrize("name", RUNS)
def test_checkpoints(name: str, case: Case, tmp_path: Path) -> None:
    model = model_to_train(case)
    trainer = trainer_for(model, tmp_path, evaluate=True, **{"max_steps": 3, **RUNS[name]})
    trainer.train()
    found = sorted(tmp_path.glob("checkpoint-*"))
    assert len(found) == {"save_steps": 3, "save_only_model": 3}.get(name, len(found)) > 0
    for folder in found:
        assert verify_adapter(folder)
        check_checkpoint(folder)
        assert json.loads((folder / MANIFEST).read_text())["training"]
    last = tmp_path / f"checkpoint-{trainer.state.global_step}"
    if last.exists():
        assert_saved(last, expert_tensors(model))
    trainer.save_model()
    assert_saved(tmp_path, expert_tensors(model))


def test_best_model_is_loaded(case: Case, tmp_path: Path) -> None:
    model = model_to_train(case)
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}  # so the first
    trainer = trainer_for(
        model, tmp_path, evaluate=True, max_steps=3, save_strategy="steps", save_steps=1, eval_strategy="steps",
        eval_steps=1, **best,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    assert_saved(tmp_path / "checkpoint-1", expert_tensors(model))
    moved = load_file(tmp_path / "checkpoint-3" / ADAPTER)
    assert [name for name, value in expert_tensors(model).items() if not torch.equal(moved[name], value)]


def test_what_is_pushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder as it is at the moment of the upload, for every save and at the end."""
    seen: list[Path] = []

    class Done:
        def is_done(self) -> bool:
            return True

        def result(self) -> None: ...

        done = is_done
        add_done_callback = lambda self, *_: None  # noqa: E731

    def upload(self: Any, *, folder_path: str, **kwargs: Any) -> Any:
        copy = tmp_path / f"upload-{len(seen)}"
        shutil.copytree(folder_path, copy, ignore=shutil.ignore_patterns("checkpoint-*"))
        seen.append(copy)
        return Done()

    monkeypatch.setattr(HfApi, "upload_folder", upload)
    monkeypatch.setattr(HfApi, "create_repo", lambda *a, **k: type("Repo", (), {"repo_id": "me/it"})())
    monkeypatch.setattr("transformers.trainer.PushInProgress", lambda jobs: Done())
    model = model_to_train(TORCH_FP32)
    trainer = trainer_for(model, tmp_path / "out", max_steps=2, save_strategy="steps", save_steps=1, push_to_hub=True,
                          hub_always_push=True)  # fmt: skip
    monkeypatch.setattr(type(trainer), "create_model_card", lambda self, **_: None)
    trainer.train()
    assert len(seen) >= 2
    trainer.push_to_hub()
    for folder in seen:
        assert verify_adapter(folder)
    assert_saved(seen[-1], expert_tensors(model))
    first = load_file(seen[0] / ADAPTER)
    assert [name for name, value in expert_tensors(model).items() if not torch.equal(first[name], value)]


def test_a_state_dict_without_experts_is_not_saved(tmp_path: Path) -> None:
    """As wrappers pass one that they gathered themselves."""
    model = adapted_model(MIXTRAL, TORCH_FP32, seed=1)
    state = {name: value for name, value in model.state_dict().items() if ".experts." not in name}
    with pytest.raises(KTAMXError, match=r"lacks .*experts.*12 of 28 LoRA tensors"):
        model.save_pretrained(tmp_path / "a", state_dict=state)
    other = {name: value + 1 if "lora_" in name else value for name, value in model.state_dict().items()}
    with pytest.raises(KTAMXError, match="is not what the model holds"):
        model.save_pretrained(tmp_path / "b", state_dict=other)
    for name in "ab":
        with pytest.raises(KTAMXError, match="interrupted"):
            verify_adapter(tmp_path / name)


def test_diverged_training_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    model = model_to_train(TORCH_FP32)
    trainer = trainer_for(model, tmp_path, max_steps=1, save_strategy="steps", save_steps=1, save_total_limit=1)
    trainer.train()
    model._kt_wrappers[0].lora_params["up_lora_b"].data[3, 2, 1] = float("nan")
    trainer.state.global_step = 2
    with pytest.raises(KTAMXError, match="not finite: training has diverged"):
        trainer._save_checkpoint(model, None)
    check_checkpoint(tmp_path / "checkpoint-1")
    with pytest.raises(KTAMXError, match=r"interrupted.*checkpoint-1'"):
        check_checkpoint(tmp_path / "checkpoint-2")


def test_saving_over_what_is_loaded(case: Case, tmp_path: Path) -> None:
    """Loaded tensors may be the mapped file (safetensors 0.8): a save must not cut that under them."""
    adapted_model(MIXTRAL, case, seed=2).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(patched_model(MIXTRAL, case), tmp_path, low_cpu_mem_usage=True)
    expected = expert_tensors(model)
    model.save_pretrained(tmp_path)
    assert_saved(tmp_path, expected)


# -- PEFT's verbs


def trained_otherwise(model: PeftModel) -> None:
    model.add_adapter("other", lora_config(MIXTRAL, r=4))
    fill_lora(model, seed=5, only=lambda name: ".other." in name)


def test_several_adapters(case: Case, tmp_path: Path) -> None:
    model = adapted_model(MIXTRAL, case, seed=1)
    trained_otherwise(model)
    model.save_pretrained(tmp_path)
    assert_saved(tmp_path, expert_tensors(model))
    assert_saved(tmp_path / "other", expert_tensors(model, "other"))
    model.delete_adapter("default")
    model.save_pretrained(tmp_path / "one", selected_adapters=["other"])
    assert_saved(tmp_path / "one" / "other", expert_tensors(model, "other"))
    with pytest.raises(KTAMXError, match=r"is \(8, 4, 96\), in the model \(8, 8, 96\)"):
        adapted_model(MIXTRAL, case).load_adapter(tmp_path / "other", "default")


CONFIGS: dict[str, dict[str, Any]] = {
    "all-linear": {"target_modules": "all-linear"},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"down_proj": 3}},
    "a regex": {"target_modules": r".*(experts\.(gate|up|down)_proj|q_proj)"},
    "a layer": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "excluded": {"exclude_modules": r".*layers\.0\.mlp.*"},
    "the router too": {"target_modules": ["gate", "gate_proj", "up_proj", "down_proj"]},
    "heads": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_any_config_saves_and_loads(name: str, tmp_path: Path) -> None:
    model = get_peft_model(patched_model(MIXTRAL, TORCH_FP32), lora_config(MIXTRAL, **CONFIGS[name]))
    fill_lora(model, seed=3)
    model.save_pretrained(tmp_path / "kt")
    assert verify_adapter(tmp_path / "kt", model)
    expected = logits_of(model, IDS)
    loaded = PeftModel.from_pretrained(patched_model(MIXTRAL, TORCH_FP32), tmp_path / "kt")
    assert torch.equal(logits_of(loaded, IDS), expected)
    stock = PeftModel.from_pretrained(MIXTRAL(), convert(tmp_path / "kt", tmp_path / "peft", to="peft"))
    assert (logits_of(stock, IDS) - expected).abs().max() < 1e-5
    back = convert(tmp_path / "peft", tmp_path / "back", to="kt")
    loaded = PeftModel.from_pretrained(patched_model(MIXTRAL, TORCH_FP32), back)
    assert torch.equal(logits_of(loaded, IDS), expected)


@transformers_adapters
def test_transformers_own_adapters(case: Case, tmp_path: Path) -> None:
    model = patched_model(MIXTRAL, case)
    model.add_adapter(lora_config(MIXTRAL))
    fill_lora(model, seed=6)
    model.save_pretrained(tmp_path)
    expected = {f"base_model.model.{name}": value for name, value in expert_tensors(model).items()}
    assert_saved(tmp_path, expected)
    again = patched_model(MIXTRAL, case)
    again.load_adapter(str(tmp_path))
    assert torch.equal(logits_of(again, IDS), logits_of(model, IDS))
    (tmp_path / ADAPTER).write_bytes((tmp_path / ADAPTER).read_bytes()[:-8])
    with pytest.raises(KTAMXError, match="truncated"):
        patched_model(MIXTRAL, case).load_adapter(str(tmp_path))


REFUSED: dict[str, Callable[[PeftModel, Path], Any]] = {
    "merge_and_unload": lambda model, _: model.merge_and_unload(),
    "merge_adapter": lambda model, _: model.merge_adapter(),
    "unload": lambda model, _: model.unload(),
    "base save_pretrained": lambda model, path: model.get_base_model().save_pretrained(path),
    "a pickle": lambda model, path: model.save_pretrained(path, safe_serialization=False),
    "hotswap of a damaged one": lambda model, path: hotswap_adapter(model, str(damaged(model, path)), "default"),
}


def damaged(model: PeftModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    data = bytearray((folder / ADAPTER).read_bytes())
    data[-5] ^= 1
    (folder / ADAPTER).write_bytes(data)
    return folder


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, tmp_path: Path) -> None:
    model = adapted_model(MIXTRAL, TORCH_FP32, seed=1)
    before = logits_of(model, IDS)
    with pytest.raises(KTAMXError):
        REFUSED[name](model, tmp_path)
    assert torch.equal(logits_of(model, IDS), before)


# -- starting from an adapter


@pytest.mark.parametrize("to", ["kt", "peft", "per-expert", "fused"])
def test_starting_from_any_format(to: str, case: Case, tmp_path: Path) -> None:
    model = adapted_model(MIXTRAL, case, seed=1)
    expected = expert_tensors(model)
    model.save_pretrained(tmp_path / "kt")
    source = tmp_path / "kt" if to == "kt" else convert(tmp_path / "kt", tmp_path / to, to=to)
    given = apply_kt_moe(MIXTRAL(case.dtype), make_config(case.backend), adapter=source)
    assert all(torch.equal(expert_tensors(given)[name], value) for name, value in expected.items())
    assert all(parameter.requires_grad for name, parameter in given.named_parameters() if "lora_" in name)

    trainer = trainer_for(
        adapted_model(MIXTRAL, case), tmp_path / "run", callback=False, max_steps=1, learning_rate=0.0
    )
    trainer.add_callback(KTMoECallback(adapter=source))
    trainer.train()
    assert all(torch.equal(expert_tensors(trainer.model)[name], value) for name, value in expected.items())


def test_a_resumed_run_does_not_start_from_the_adapter_again(tmp_path: Path) -> None:
    adapted_model(MIXTRAL, TORCH_FP32, seed=7).save_pretrained(tmp_path / "start")
    runs = []
    for resume in (None, True):
        trainer = trainer_for(
            model_to_train(TORCH_FP32), tmp_path / "run", callback=False, max_steps=2 if resume else 1,
            save_strategy="steps", save_steps=1, learning_rate=0.0,
        )  # fmt: skip
        trainer.add_callback(KTMoECallback(adapter=tmp_path / "start"))
        if resume:
            shutil.rmtree(tmp_path / "start")
        trainer.train(resume_from_checkpoint=resume)
        runs.append(expert_tensors(trainer.model))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_an_adapter_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = get_peft_model(patched_model(MIXTRAL, TORCH_FP32), lora_config(MIXTRAL, r=4))
    model.save_pretrained(tmp_path / "rank")
    model = get_peft_model(patched_model(MIXTRAL, TORCH_FP32), lora_config(MIXTRAL, lora_alpha=3))
    model.save_pretrained(tmp_path / "alpha")
    for name, words in (("rank", r"is \(8, 4, 96\); the model's adapter has \(8, 8, 96\)"), ("alpha", "is scaled by")):
        trainer = trainer_for(model_to_train(TORCH_FP32), tmp_path / "run", callback=False, max_steps=1)
        trainer.add_callback(KTMoECallback(adapter=tmp_path / name))
        with pytest.raises(KTAMXError, match=words):
            trainer.train()


# -- outputs of conversions


@pytest.mark.parametrize(
    ("output", "to", "words"),
    [
        ("x.pt", "peft", "does not fit to='peft', which is a folder"),
        ("x", "sglang", "does not fit to='sglang', which is a file ending in .pt"),
        ("x.safetensors", None, "does not fit to='fused'"),
        ("x.bin", "kt", "does not fit"),
        ("x.txt", None, "the extension does not tell a format"),
        ("x", None, "the extension does not tell a format"),
        ("x", "gguf", "to='gguf' is not one of"),
        ("kt", "peft", "exists already"),
        ("kt/x.pt", None, "lies inside"),
        ("kt/sub/x", "peft", "lies inside"),
        ("x", "merged", "needs base"),
    ],
)
def test_outputs_that_are_refused(output: str, to: str | None, words: str, tmp_path: Path) -> None:
    adapted_model(MIXTRAL, TORCH_FP32, seed=1).save_pretrained(tmp_path / "kt")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(KTAMXConfigError, match=words):
        convert(tmp_path / "kt", tmp_path / output, to=to)
    assert sorted(tmp_path.rglob("*")) == before


def test_fused_experts_belong_into_an_adapters_folder(tmp_path: Path) -> None:
    model = adapted_model(MIXTRAL, TORCH_FP32, seed=1)
    model.save_pretrained(tmp_path / "kt")
    folder = convert(tmp_path / "kt", tmp_path / "fused", to="fused")
    alone = folder / "fused_expert_lora.safetensors"
    expected = load_file(alone)
    alone.unlink()
    convert(tmp_path / "kt", alone)
    assert all(torch.equal(load_file(alone)[name], value) for name, value in expected.items())
    loaded = apply_kt_moe(MIXTRAL(), make_config("torch"), adapter=folder)
    assert torch.equal(logits_of(loaded.eval(), IDS), logits_of(model, IDS))
