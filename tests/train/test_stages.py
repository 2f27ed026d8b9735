"""Every stage of training: TRL's own trainer, whose losses on the patched model are those on the unpatched one."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    set_seed,
)

from kt_hf import KTConfig, load_kt_model
from kt_hf.errors import KTAMXConfigError
from kt_hf.train.config.stages import STAGES, stage_of
from kt_hf.train.folding_rules import why_not
from kt_hf.train.reward_model import as_reward_model
from kt_hf.train.rewards import reward_functions
from tests.support.tiny import tokenizer, trained

WORDS = ("four", "five", "a dozen", "seven hundred", "none at all")
REWARDS = """
def vowels(completions, answer, **kwargs):
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [sum(letter in "aeiou" for letter in text) / 10 + len(a) / 100 for text, a in zip(texts, answer)]


def too_few(completions, **kwargs):
    return [0.0]


def no_number(completions, **kwargs):
    return ["a"] * len(completions)


def narrow(completions):
    return [0.0] * len(completions)


def asks(completions, solution, **kwargs):
    return [0.0] * len(completions)


not_a_function = 3
"""
# Of the runs that are compared, beside `trained`'s; and of GRPO's, in which the model writes.
OPTIONS: dict[str, Any] = {
    "max_steps": 10, "per_device_train_batch_size": 4, "warmup_steps": 0, "bf16": False,
}  # fmt: skip
WRITES = {"num_generations": 4, "max_completion_length": 12, "beta": 0.1}
# What TRL logs beside the loss.
WATCHED = {
    "dpo": ("rewards/margins",), "kto": ("rewards/chosen", "kl"), "orpo": ("rewards/margins", "nll_loss"),
    "rm": ("margin",), "grpo": ("reward", "kl"),
}  # fmt: skip


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def says(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def rows(stage: str, count: int = 8) -> list[dict[str, Any]]:
    """Of a stage, in TRL's own form."""
    made: list[dict[str, Any]] = []
    for number in range(count):
        prompt, good, bad = [user(f"{number}+{number}?")], WORDS[number % 5], WORDS[(number + 2) % 5]
        if stage == "pt":
            made.append({"text": f"{number} and {number} is {good}. " * 4})
        elif stage == "kto":
            made.append({"prompt": prompt, "completion": [says(good if number % 2 else bad)], "label": number % 2 == 1})
        elif stage == "grpo":
            made.append({"prompt": prompt, "answer": good})
        elif stage == "sft":
            made.append({"prompt": prompt, "completion": [says(good)]})
        else:
            made.append({"prompt": prompt, "chosen": [says(good)], "rejected": [says(bad)]})
    return made


@pytest.fixture(scope="module")
def rewards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rewards") / "rewards.py"
    file.write_text(REWARDS)
    return file


def overrides(stage: str, rewards: Path, **options: Any) -> list[str]:
    writes = {"per_device_train_batch_size": 4, **WRITES, "reward_funcs": f"{rewards}:vowels"}
    more = options | (writes if stage == "grpo" else {})
    return [f"stage={stage}", *(f"{key}={json.dumps(v) if isinstance(v, bool) else v}" for key, v in more.items())]


def logged(folder: Path, name: str) -> list[float]:
    history = json.loads((folder / "out" / "trainer_state.json").read_text())["log_history"]
    return [row[name] for row in history if name in row]


@pytest.mark.parametrize("stage", [name for name in STAGES if name not in ("sft", "dpo")])
def test_a_step_of_every_stage(stage: str, tiny_model: Path, rewards: Path, tmp_path: Path) -> None:
    summary, text = trained(tmp_path, tiny_model, rows(stage, 4), *overrides(stage, rewards))
    assert summary["steps"] == 1
    assert torch.isfinite(torch.tensor(summary["loss"]))
    assert f"{stage}, learning rate" in text
    if stage == "grpo":
        assert summary["metrics"]["reward"] > 0
        assert "The first prompt" in text
    if stage == "pt":
        assert "0 of them trained" not in text
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as file:
        names = list(file.keys())
    assert any(".experts." in name for name in names)
    assert any(name.endswith("score.weight") for name in names) == (stage == "rm")


# Reward functions


@pytest.mark.parametrize(
    ("spec", "columns", "reason"),
    [
        ("{file}", set(), "say which of its functions"),
        ("{file}:missing", set(), "has no function 'missing'. It has: asks, narrow, no_number, too_few, vowels"),
        ("{file}:not_a_function", set(), "has no function 'not_a_function'"),
        ("nowhere.py:f", set(), "there is no file nowhere.py"),
        (
            "{file}:asks",
            {"answer"},
            "needs solution, and TRL calls it with prompts, completions, completion_ids and the",
        ),
        ("{file}:narrow", set(), "has no **kwargs"),
        ("no_such_package.rewards.f", set(), "No module named 'no_such_package'"),
        ("some_reward", set(), "trl.rewards has no function 'some_reward'. It has: accuracy_reward"),
    ],
)
def test_a_reward_function_that_cannot_be_called_is_refused(
    spec: str, columns: set[str], reason: str, rewards: Path
) -> None:
    with pytest.raises(KTAMXConfigError) as caught:
        reward_functions([spec.format(file=rewards)], columns)
    assert reason in str(caught.value)


def test_a_file_of_rewards_that_fails_is_told(tmp_path: Path) -> None:
    for text, reason in (("def f(:", "SyntaxError"), ("import nothing_of_that_name", "ModuleNotFoundError"),
                         ("raise SystemExit(3)", "SystemExit: 3")):  # fmt: skip
        (tmp_path / "bad.py").write_text(text)
        with pytest.raises(KTAMXConfigError, match=f"bad.py:f' cannot be imported: {reason}"):
            reward_functions([f"{tmp_path}/bad.py:f"], set())


def test_rewards_of_trl_and_of_a_module() -> None:
    own, dotted, named = reward_functions(
        ["think_format_reward", "trl.rewards.think_format_reward", "trl.rewards:think_format_reward"], set()
    )
    answer = [[says("<think>\nhm\n</think>\nfour")]]
    assert own(completions=answer) == dotted(completions=answer) == named(completions=answer) == [1.0]


@pytest.mark.parametrize(
    ("function", "reason"),
    [("too_few", "returned 1 rewards for 2 completions"), ("no_number", "returned a list that is no list of numbers")],
)
def test_wrong_rewards_are_told_before_the_model_is_loaded(
    function: str, reason: str, tiny_model: Path, rewards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kt_hf.train.run.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    settings = [*overrides("grpo", rewards)[:-1], f"reward_funcs={rewards}:{function}"]
    with pytest.raises(KTAMXConfigError, match=reason):
        trained(tmp_path, tiny_model, rows("grpo", 2), *settings)
    assert not (tmp_path / "out").exists()


# Reward models


def test_a_reward_model_is_loaded_again_with_its_head(tiny_model: Path, tmp_path: Path) -> None:
    trained(tmp_path, tiny_model, rows("rm", 4), "stage=rm", "learning_rate=0.01")
    model = load_kt_model(
        tiny_model, KTConfig(kt_backend="torch", kt_lora_rank=8), architectures=["MixtralForSequenceClassification"],
        num_labels=1,
    )  # fmt: skip
    loaded = PeftModel.from_pretrained(model, str(tmp_path / "out")).eval()
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as file:
        saved = {name: file.get_tensor(name) for name in file.keys() if name.endswith("score.weight")}  # noqa: SIM118
    ((_, head),) = saved.items()
    active = loaded.base_model.model.score.modules_to_save["default"].weight
    assert torch.equal(active.float().cpu(), head.float())
    score = loaded(torch.tensor([[1, 2, 3]])).logits
    assert score.shape == (1, 1)
    with loaded.disable_adapter():
        assert not torch.equal(loaded(torch.tensor([[1, 2, 3]])).logits, score)


def test_a_family_without_a_score_head_is_told() -> None:
    with pytest.raises(KTAMXConfigError, match=r"none for olmoe .*It has one for mixtral, qwen2_moe, qwen3_moe"):
        as_reward_model(OlmoeConfig())


def test_a_reward_model_does_not_start_from_another_adapter(tiny_model: Path, tmp_path: Path) -> None:
    trained(tmp_path, tiny_model, rows("sft", 2))
    adapter, folder = tmp_path / "out", tmp_path / "second"
    folder.mkdir()
    with pytest.raises(KTAMXConfigError, match="has no trained score head"):
        trained(folder, tiny_model, rows("rm", 2), "stage=rm", f"adapter_name_or_path={adapter}")


def test_answers_longer_than_max_length_are_left_out_of_a_reward_models_data(tiny_model: Path, tmp_path: Path) -> None:
    long = [{"prompt": [user("?")], "chosen": [says("a" * 300)], "rejected": [says("b")]}]
    _, text = trained(tmp_path, tiny_model, rows("rm", 3) + long, "stage=rm")
    assert "1 of 4 rows are longer than max_length=128 tokens and are left out" in text


# Batches


@pytest.mark.parametrize("stage", ["kto", "grpo", "orpo"])
def test_batches_of_these_stages_are_never_folded(stage: str) -> None:
    trainer = SimpleNamespace(args=SimpleNamespace(full_determinism=False, auto_find_batch_size=False, world_size=1))
    named = type(stage_of(stage).trainer, (SimpleNamespace,), {})(**vars(trainer))
    assert stage_of(stage).name.upper() in (why_not(named) or "")


# As the same trainer on the unpatched model


def save_qwen(folder: Path) -> Path:
    config = Qwen3MoeConfig(
        vocab_size=259, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, num_experts=8, num_experts_per_tok=2,
        max_position_embeddings=512, dtype=torch.float32, bos_token_id=None, eos_token_id=256,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Qwen3MoeForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_mixtral(folder: Path) -> Path:
    config = MixtralConfig(
        vocab_size=259, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=512,
        dtype=torch.float32, bos_token_id=None, eos_token_id=256,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        MixtralForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def stock(
    stage: str, model: Path, folder: Path, reward: Any, experts: bool, options: dict[str, Any]
) -> list[dict[str, float]]:
    """What TRL's trainer logs, step by step, on the model as transformers has it."""
    kind = stage_of(stage)
    set_seed(42)
    auto: Any = AutoModelForSequenceClassification if kind.scores else AutoModelForCausalLM
    loaded = auto.from_pretrained(model, dtype=torch.float32, **({"num_labels": 1} if kind.scores else {}))
    more: dict[str, Any] = options | (WRITES if kind.generates else {"max_length": 128})
    if stage == "pt":
        more |= {"packing": True, "packing_strategy": "wrapped"}
    args = kind.config_class()(
        output_dir=str(folder), logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
        gradient_checkpointing=False, **more,
    )  # fmt: skip
    lora = LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"] if experts else None,
        task_type="SEQ_CLS" if kind.scores else "CAUSAL_LM",
    )  # fmt: skip
    trainer = kind.trainer_class()(
        loaded, args=args, train_dataset=Dataset.from_list(rows(stage)), peft_config=lora,
        processing_class=AutoTokenizer.from_pretrained(model), **({"reward_funcs": [reward]} if kind.generates else {}),
    )  # fmt: skip
    trainer.train()
    return trainer.state.log_history


@pytest.mark.slow
@pytest.mark.parametrize(
    ("save", "experts"),
    [(save_qwen, False), (save_qwen, True), (save_mixtral, True)],
    ids=["qwen3_moe-attention", "qwen3_moe-experts", "mixtral-experts"],
)
@pytest.mark.parametrize("stage", STAGES)
def test_ten_steps_are_those_of_the_unpatched_model(
    stage: str, save: Any, experts: bool, rewards: Path, tmp_path: Path
) -> None:
    model = save(tmp_path / "model")
    target = "all" if experts else "all_attention"
    # Stock PEFT's LoRA of gate and up has one A for both, and learns otherwise; on attention it is the same.
    options = OPTIONS | {"learning_rate": 5e-4 if experts else 2e-3}
    trained(tmp_path, model, rows(stage), *overrides(stage, rewards, **options, lora_target=target))
    (function,) = reward_functions([f"{rewards}:vowels"], {"answer"})
    history = stock(stage, model, tmp_path / "stock", function, experts, options)
    for name in ("loss", *WATCHED.get(stage, ())):
        ours, theirs = logged(tmp_path, name), [row[name] for row in history if name in row]
        assert len(ours) == len(theirs) == 10
        worst = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        print(f"{stage} {name}: {ours[0]:.4f} -> {ours[-1]:.4f}, at most {worst:.6f} from TRL's")
        assert worst < 0.02


def test_asking_for_the_arguments_of_every_stage_prints_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a misspelled key asks, whatever the stage. TRL warns at the first import of its experimental part."""
    monkeypatch.delenv("TRL_EXPERIMENTAL_SILENCE", raising=False)
    for name in ("trl.experimental", STAGES["orpo"].module):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        assert all(stage.config_class() for stage in STAGES.values())
    assert not [str(warning.message) for warning in raised]
