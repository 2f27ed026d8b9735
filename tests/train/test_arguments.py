"""Configurations people have are taken; bad ones are refused with everything that is wrong, before anything happens."""

from __future__ import annotations

import importlib.util
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments
from typer.testing import CliRunner

from kt_hf.cli import app
from kt_hf.train.config.read import on_this_machine, read_arguments
from kt_hf.train.config.yaml_file import BadSettings
from tests.support.tiny import ROOT

GOOD = "model_name_or_path: builtin:smollm2-moe\ndataset: builtin:pydoc\noutput_dir: out\n"
FULL = """
model_name_or_path: deepseek-ai/DeepSeek-V3
trust_remote_code: true
torch_dtype: bfloat16
stage: sft
finetuning_type: lora
use_kt: true
kt_backend: AMXBF16  # 注释
kt_num_threads: 60
kt_tp_enabled: true
lora_target: q_proj,k_proj,gate_proj
dataset: alpaca_en
template: deepseek3
cutoff_len: 2048
preprocessing_num_workers: 8
learning_rate: 1.0e-4
weight_decay: 1e-2
warmup_ratio: 0.1
eval_strategy: no
disable_gradient_checkpointing: true
pref_loss: null
output_dir: outputs/x
overwrite_output_dir: true
overwrite_cache: true
"""


def write(folder: Path, text: str) -> Path:
    file = folder / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_llamafactorys_names_are_translated(tmp_path: Path) -> None:
    text = FULL.replace("pref_loss: null\n", "")
    settings = read_arguments(write(tmp_path, text))
    assert settings.run.model_name_or_path == "deepseek-ai/DeepSeek-V3"
    assert settings.run.lora_target == "q_proj,k_proj,gate_proj"
    assert settings.run.dataset == ["alpaca_en"]
    assert settings.kt.kt_num_threads == 60
    fields = TrainingArguments.__dataclass_fields__  # the old name, before transformers had the new
    checkpointing = f"{'activation' if 'activation_checkpointing' in fields else 'gradient'}_checkpointing"
    expected = {
        "max_length": 2048, "dataset_num_proc": 8, "warmup_steps": 0.1, checkpointing: False,
        "learning_rate": 1e-4, "weight_decay": 1e-2, "eval_strategy": "no", "output_dir": "outputs/x",
    }  # fmt: skip
    assert settings.trainer == expected
    assert any("overwrite_cache has no effect" in notice for notice in settings.notices)
    assert not settings.checkpointing


def test_dpo_takes_dpos_fields(tmp_path: Path) -> None:
    settings = read_arguments(write(tmp_path, GOOD + "stage: dpo\npref_beta: 0.2\npref_loss: sigmoid\n"))
    assert settings.trainer == {"output_dir": "out", "beta": 0.2, "loss_type": ["sigmoid"]}


def test_the_command_line_is_put_over_the_file(tmp_path: Path) -> None:
    settings = read_arguments(write(tmp_path, GOOD + "lora_rank: 8\n"), ["lora_rank=4", "learning_rate=1e-5"])
    assert settings.run.lora_rank == 4
    assert settings.trainer["learning_rate"] == 1e-5


# Each: what is added to a good file, and for each problem what its line must say.
BAD: list[tuple[str, list[str]]] = [
    ("lora_rnak: 8", ["line 4: lora_rnak is no known setting; did you mean lora_rank?"]),
    ("learning_rat: 1", ["did you mean learning_rate?"]),
    ("kt_num_thread: 4", ["did you mean kt_num_threads?"]),
    ("cutof_len: 4", ["did you mean cutoff_len?"]),
    ("zzzzqqqq: 4", ["line 4: zzzzqqqq is no known setting"]),
    ("kt_optimize_rule: a.yaml", ["line 4: kt_optimize_rule is no setting of kt_hf: leave it out"]),
    ("cpu_infer: 32", ["write kt_num_threads"]),
    ("chunk_size: 512", ["write kt_max_len"]),
    ("quantization_bit: 4", ["line 4: quantization_bit needs use_kt and safetensors files"]),
    ("lora_rank: eight", ["line 4: lora_rank='eight': it must be a whole number"]),
    ("lora_rank: 8.5", ["lora_rank=8.5: it must be a whole number"]),
    ("lora_rank: 0", ["lora_rank=0: it must be at least 1"]),
    ("lora_rank: true", ["lora_rank=True: it must be a whole number"]),
    ("lora_alpha: -1", ["lora_alpha=-1: it must be more than 0"]),
    ("lora_dropout: 1.5", ["lora_dropout=1.5: it must be less than 1"]),
    ("learning_rate: fast", ["learning_rate='fast': it must be a number"]),
    ("learning_rate: -1e-4", ["learning_rate=-0.0001: it must be more than 0"]),
    ('use_kt: "true"', ["use_kt='true': it must be true or false without quotes"]),
    ("packing: 1", ["packing=1: it must be true or false"]),
    ("run_name: 7", ['run_name=7: it must be text: put it in quotes, "7"']),
    ("lr_scheduler_type: cosin", ["did you mean cosine?"]),
    ("save_strategy: sometimes", ["save_strategy='sometimes': it must be one of"]),
    ("optim: adamw_tourch", ["did you mean adamw_torch?"]),
    ("torch_dtype: int8", ["torch_dtype='int8': it must be auto or bfloat16 or float16 or float32"]),
    ("stage: ppo", ["stage='ppo': it must be pt or sft or dpo or kto or orpo or rm or grpo; TRL has no PPO"]),
    ("stage: reward", ["stage='reward': it must be", "a reward model is stage: rm"]),
    ("stage: kto\nper_device_train_batch_size: 1", ["KTO compares each row with the others of its batch: give 2"]),
    ("stage: kto\ntrain_sampling_strategy: random", ["KTO takes rows in the order of the data (sequential)"]),
    ("stage: kto\nkto_chosen_weight: -1", ["desirable_weight=-1: it must be at least 0"]),
    ("stage: orpo\nmax_length: null", ["TRL's ORPO takes 512 tokens then"]),
    ("stage: grpo", ["reward_funcs is missing: stage: grpo needs a function that judges answers, PATH.py:FUNCTION"]),
    ("reward_funcs: a.py:f", ["reward_funcs is for stage: grpo, and this is stage: sft"]),
    (
        "stage: grpo\nreward_funcs: a.py:f\nper_device_train_batch_size: 3",
        ["num_generations=8 answers to a prompt do not fit per_device_train_batch_size=3 x gradient"],
    ),
    ("stage: grpo\nreward_funcs: a.py:f\nreward_weights: [1, 2]", ["reward_weights has 2 numbers for 1 reward_funcs"]),
    ("stage: grpo\nreward_funcs: a.py:f\nuse_vllm: true", ["use_vllm does not go together with use_kt"]),
    ("stage: grpo\nreward_funcs: a.py:f\nbeta: -1", ["beta=-1: it must be at least 0"]),
    ("stage: dpo\nbeta: 0", ["beta=0: it must be more than 0"]),
    ("finetuning_type: full", ["finetuning_type='full': it must be lora"]),
    ("kt_backend: AMXBF8", ["kt_backend='AMXBF8' is not one of auto, AMXBF16"]),
    ("kt_num_threads: 0", ["kt_num_threads=0 is not an integer of 1 or more"]),
    ("kt_num_gpu_experts: 4", ["line 4: kt_num_gpu_experts=4: it "]),
    ("kt_weight_path: int8", ["kt_weight_path=int8 needs kt_backend: AMXInt8 or AMXInt4, not auto"]),
    ("kt_weight_path: int8\nkt_backend: AMXInt8", ["kt_weight_path=int8 is not a folder"]),
    ("kt_lora_rank: 4\nlora_rank: 8", ["line 4: kt_lora_rank=4 is smaller than lora_rank=8"]),
    ("beta: 0.1", ["beta belongs to stage: dpo, kto, orpo or grpo, this is stage: sft"]),
    ("stage: dpo\npacking: true", ["packing belongs to stage: pt or sft, this is stage: dpo"]),
    ("max_length: 8\ncutoff_len: 9", ["line 5: cutoff_len means the same as max_length at line 4: keep one"]),
    ("lora_rank: 8\nlora_rank: 9", ["line 5: lora_rank is set a second time; the first is at line 4"]),
    ("eval_strategy: steps", ["eval_strategy=steps needs data to evaluate on"]),
    ("load_best_model_at_end: true", ["load_best_model_at_end=True needs data to evaluate on"]),
    ("eval_dataset: builtin:pydoc\nval_size: 0.1", ["val_size and eval_dataset are both given"]),
    ("deepspeed: ds.json", ["deepspeed does not go together with use_kt"]),
    ("fsdp: full_shard", ["fsdp does not go together with use_kt"]),
    ("activation_offloading: true", ["line 4: activation_offloading takes a GPU, and there is none: leave it out"]),
    ("activation_offloading: true\nuse_kt: false", ["line 4: activation_offloading takes a GPU"]),
    ("torch_compile_mode: reduce-overhead", ["line 4: torch_compile_mode=reduce-overhead records CUDA graphs"]),
    ("bf16: true\nfp16: true", ["bf16"]),
    ("resume_from_checkpoint: true", ["out holds no checkpoint to go on from"]),
    ("resume_from_checkpoint: nowhere/checkpoint-5", ["there is no such folder"]),
    ("warmup_ratio: 3", ["line 4: warmup_ratio=3: it must be a share from 0 to below 1"]),
    ("max_steps: -5", ["max_steps=-5: leave it out"]),
    ("label_smoothing_factor: 2", ["label_smoothing_factor=2: it must be less than 1"]),
    ("stage: dpo\nlabel_smoothing: 3", ["line 5: label_smoothing=3: it must be less than 1"]),
    ("neftune_noise_alpha: -1", ["neftune_noise_alpha=-1: it must be at least 0"]),
    ("eval_accumulation_steps: 0", ["eval_accumulation_steps=0: it must be at least 1"]),
    ("dataloader_num_workers: 1\ndataloader_prefetch_factor: -3", ["line 5: dataloader_prefetch_factor=-3: it must"]),
    ("save_strategy: best\nval_size: 2", ["line 4: save_strategy=best needs data to evaluate on", "metric_for_best"]),
    ("train_sampling_strategy: nix", ["train_sampling_strategy='nix': it must be random or"]),
    ("kt_config: {kt_backend: torch, kt_backend: auto}", ["line 4: kt_config: 'kt_backend' is set twice in it"]),
    ("lr_scheduler_kwargs: {a: {b: 1, b: 2}}", ["line 4: lr_scheduler_kwargs: 'b' is set twice in it"]),
    ("device_map: auto", ["device_map is no setting of kt_hf"]),
    (
        "lora_rnak: 8\nchunk_size: 5\nlora_alpha: x\npacking: 1\nkt_num_threads: -1\nwarmup_ratio: -0.1",
        [
            "has 6 problems", "line 4: lora_rnak", "line 5: chunk_size", "line 6: lora_alpha='x'", "line 7: packing=1",
            "line 8: kt_num_threads=-1", "line 9: warmup_ratio=-0.1",
        ],
    ),
]  # fmt: skip
WHOLE: list[tuple[str, list[str]]] = [
    ("", ["model_name_or_path is missing", "dataset is missing", "output_dir is missing"]),
    ("- a\n- b\n", ["line 1: is not a list of settings"]),
    ("a: [1, 2\nb: 3\n", ["is not YAML"]),
    (GOOD.replace("builtin:pydoc", "data/missing.jsonl"), ["line 2: dataset='data/missing.jsonl': there is no such"]),
    (GOOD.replace("builtin:pydoc", "builtin:wikipedia"), ["the built-in data set is builtin:pydoc"]),
    (GOOD.replace("builtin:pydoc", "two words"), ["neither a file nor a name on the hub"]),
    (GOOD.replace("builtin:smollm2-moe", "builtin:gpt5"), ["line 1: model_name_or_path='builtin:gpt5'"]),
    (GOOD.replace("builtin:smollm2-moe", "./missing"), ["model_name_or_path='./missing': there is no such folder"]),
    (GOOD.replace("output_dir: out", "output_dir: run.yaml"), ["output_dir='run.yaml' is a file"]),
]


def check(text: str, expected: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.chdir(folder)
    monkeypatch.setattr(socket.socket, "connect", no_network)
    write(folder, text)
    result = CliRunner().invoke(app, ["train", "run.yaml"])
    assert result.exit_code == 2, result.output
    for part in expected:
        assert part in result.stderr
    if len(expected) == 1 and "is not YAML" not in expected[0] and "list of settings" not in expected[0]:
        assert "run.yaml has 1 problem:" in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""
    assert [path.name for path in folder.iterdir()] == ["run.yaml"]


@pytest.mark.parametrize(("more", "expected"), BAD, ids=[more.split("\n")[0] for more, _ in BAD])
def test_a_bad_setting_is_told(more: str, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(GOOD + more + "\n", expected, tmp_path, monkeypatch)


@pytest.mark.parametrize(("text", "expected"), WHOLE, ids=[str(i) for i in range(len(WHOLE))])
def test_a_bad_file_is_told(text: str, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(text, expected, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("installed", "gpu", "more", "words"),
    [
        (False, True, "", "needs its package: pip install liger-kernel"),
        (False, True, "use_kt: false\n", "needs its package"),
        (True, False, "", "needs a CUDA GPU"),
        (True, True, "use_cpu: true\n", "needs a CUDA GPU"),
        (True, True, "", None),
        (True, True, "use_kt: false\n", None),
    ],
)
def test_ligers_kernels_need_their_package_and_a_gpu(
    installed: bool, gpu: bool, more: str, words: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside experts on the CPU too, by LLaMA-Factory's name; the other layers get them."""
    find = importlib.util.find_spec
    spec = find("json") if installed else None
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: spec if name == "liger_kernel" else find(name, *a)
    )
    monkeypatch.setattr("kt_hf.system.gpu.experts_device", lambda: torch.device("cpu") if gpu else None)
    file = write(tmp_path, f"{GOOD}enable_liger_kernel: true\n{more}")
    if words is None:
        assert read_arguments(file).trainer["use_liger_kernel"] is True
        return
    with pytest.raises(BadSettings, match=rf"use_liger_kernel {words}"):
        read_arguments(file)


def test_unpatched_training_may_have_what_experts_on_the_cpu_may_not(tmp_path: Path) -> None:
    assert read_arguments(write(tmp_path, GOOD + "use_kt: false\ntorch_compile_mode: reduce-overhead\n"))


def test_an_earlier_run_is_not_written_over_by_accident(tmp_path: Path) -> None:
    (tmp_path / "out" / "checkpoint-5").mkdir(parents=True)
    text = GOOD.replace("output_dir: out", f"output_dir: {tmp_path / 'out'}")
    with pytest.raises(BadSettings, match="holds an earlier run"):
        read_arguments(write(tmp_path, text))
    for more in ("overwrite_output_dir=true", "resume_from_checkpoint=true"):
        assert read_arguments(write(tmp_path, text), [more])


def test_a_missing_file_is_a_problem_of_its_own(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["train", str(tmp_path / "none.yaml")])
    assert result.exit_code == 2
    assert "cannot be read: No such file" in result.stderr


def test_overrides_that_are_none_are_told(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["train", str(write(tmp_path, GOOD)), "lora_rank", "lora_alpha=[1"])
    assert result.exit_code == 2
    assert "command line: 'lora_rank' is not of the form key=value" in result.stderr
    assert "command line: lora_alpha: '[1' cannot be read as YAML" in result.stderr


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_files_of_configs_are_good(file: Path) -> None:
    read_arguments(file, purpose="estimate")


@pytest.mark.parametrize(
    ("text", "once"),
    [
        ("", True),
        ("num_train_epochs: 1", True),
        ("precompute_ref_log_probs: false", False),
        ("max_steps: 5", None),
        ("num_train_epochs: 0.5", None),
        ("sync_ref_model: true", None),
        ("use_kt: false", None),
    ],
)
def test_the_reference_is_computed_once(text: str, once: bool | None, tmp_path: Path) -> None:
    """Where each row is seen at least once, and the user does not say otherwise."""
    settings = read_arguments(write(tmp_path, GOOD + f"stage: dpo\n{text}\n"))
    assert on_this_machine(settings.trainer, settings.run).get("precompute_ref_log_probs") is once


def test_the_reference_is_none_of_sft(tmp_path: Path) -> None:
    settings = read_arguments(write(tmp_path, GOOD))
    assert "precompute_ref_log_probs" not in on_this_machine(settings.trainer, settings.run)
