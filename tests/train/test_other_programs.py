"""Settings of LLaMA-Factory's and axolotl's: translated, taken without effect, or refused with what to write."""

from __future__ import annotations

from pathlib import Path

import pytest

from kt_hf.train.config.aliases import IGNORED, MEANT, REMOVED, RENAMED, TRANSLATED
from kt_hf.train.config.read import read_arguments, trainer_fields
from kt_hf.train.config.settings import RunKeys, TrainSettings
from kt_hf.train.config.stages import STAGES
from kt_hf.train.config.yaml_file import BadSettings

GOOD = "model_name_or_path: builtin:smollm2-moe\ndataset: builtin:pydoc\noutput_dir: out\n"
# What LLaMA-Factory's examples with use_kt have beside the model and the data.
EXAMPLE = """
trust_remote_code: true
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
template: qwen3_5
cutoff_len: 2048
max_samples: 100000
overwrite_cache: true
preprocessing_num_workers: 16
dataloader_num_workers: 4
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none  # choices: [none, wandb, tensorboard, swanlab, mlflow]
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null
image_max_pixels: 262144
video_max_pixels: 16384
flash_attn: sdpa
use_kt: true
kt_cpu_activation: recompute
kt_config:
  enabled: true
  kt_expert_weight_format: bf16
  kt_backend: torch
  kt_num_threads: 96
  kt_tp_enabled: true
  kt_threadpool_count: 2
  kt_max_cache_depth: 2
  kt_model_max_length: 2176
  kt_share_backward_bb: true
  kt_num_gpu_experts: 0
  kt_force_fused_expert_lora: true
"""


def read(folder: Path, text: str) -> TrainSettings:
    file = folder / "run.yaml"
    file.write_text(GOOD + text)
    return read_arguments(file)


def test_a_present_example_is_taken(tmp_path: Path) -> None:
    settings = read(tmp_path, EXAMPLE)
    assert settings.kt.kt_backend == "torch"
    assert settings.kt.kt_num_threads == 96
    assert settings.kt.kt_expert_activations == "recompute"
    assert settings.kt.kt_share_backward_weights is True
    assert settings.trainer["max_length"] == 2048
    told = "\n".join(settings.notices)
    for key in ("image_max_pixels", "kt_threadpool_count", "kt_model_max_length", "flash_attn", "overwrite_cache"):
        assert f"{key} has no effect: " in told


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "kt_config: {kt_expert_weight_format: int8}",
            "line 4: kt_config: kt_expert_weight_format='int8': write kt_back",
        ),
        ("kt_config: {kt_expert_weight_format: mxfp4}", "cannot be trained on"),
        ("kt_config: {kt_bakend: auto}", "line 4: kt_bakend is no known setting; did you mean kt_backend"),
        ("kt_config: {kt_backend: AMXBF8}", "kt_backend='AMXBF8' is not one of"),
        ("kt_config: {kt_backend: auto}\nkt_backend: auto", "kt_config: kt_backend is set at line 5 too: keep one"),
        ("kt_config: rules.yaml", "kt_config='rules.yaml': it must be a mapping"),
        ("kt_config: [1]", "it must be a mapping"),
        ("kt_config: {1: 2}", "it must be a mapping"),
        ("kt_non_expert_weight_path: /a", "all but the experts is read from model_name_or_path"),
        ("kt_cpu_activation: keep", "kt_expert_activations='keep' is not one of auto, retain, recompute"),
        ("kt_use_lora_experts: true", "the routed experts themselves have LoRA"),
        ("use_swanlab: true", "write report_to: swanlab"),
        ("export_dir: merged", "kt-hf export ADAPTER FOLDER --to merged"),
        ("batch_size: 4", "did you mean per_device_train_batch_size?"),
        ("micro_batch_size: 4", "did you mean per_device_train_batch_size?"),
        ("base_model: x", "did you mean model_name_or_path?"),
        ("lr: 1e-4", "did you mean learning_rate?"),
        ("epochs: 3", "did you mean num_train_epochs?"),
        ("sequence_len: 2048", "did you mean cutoff_len?"),
        ("datasets: [a]", "did you mean dataset?"),
        ("lora_r: 8", "did you mean lora_rank?"),
        ("adapter: lora", "did you mean finetuning_type?"),
        ("sample_packing: true", "did you mean packing?"),
        ("loraplus_lr_ratio: 0", "loraplus_lr_ratio=0: it must be more than 0"),
        ("adapter_name_or_path: nowhere", "adapter_name_or_path='nowhere': there is no such folder or file"),
    ],
)
def test_it_is_refused_with_what_to_write(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(BadSettings) as caught:
        read(tmp_path, text + "\n")
    assert message in str(caught.value)


@pytest.mark.parametrize("key", sorted(REMOVED))
def test_what_is_off_is_not_refused(key: str, tmp_path: Path) -> None:
    for value in ("null", "false"):
        assert read(tmp_path, f"{key}: {value}\n")
    with pytest.raises(BadSettings, match=f"line 4: {key} is no setting of kt_hf: "):
        read(tmp_path, f"{key}: 1\n")


def test_all_names_that_are_suggested_are_settings() -> None:
    ours = {*RunKeys.__dataclass_fields__, *(field for stage in STAGES for field in trainer_fields(stage))}
    known = ours | set(RENAMED) | set(TRANSLATED) | {"kt_num_threads", "kt_backend"}
    assert set(MEANT.values()) <= known
    tables = [RENAMED, TRANSLATED, IGNORED, REMOVED, MEANT]
    for table in tables:
        assert not set(table) & set(RunKeys.__dataclass_fields__)
    for number, table in enumerate(tables):
        for other in tables[number + 1 :]:
            assert not set(table) & set(other)
    assert not set(MEANT) & ours


def test_stages_as_llama_factory_has_them(tmp_path: Path) -> None:
    kto = read(
        tmp_path, "stage: kto\npref_beta: 0.2\nkto_chosen_weight: 1.5\nkto_rejected_weight: 0.5\npref_loss: sigmoid\n"
    )
    assert kto.trainer["beta"] == 0.2
    assert (kto.trainer["desirable_weight"], kto.trainer["undesirable_weight"]) == (1.5, 0.5)
    assert "pref_loss has no effect: it is for stage: dpo." in kto.notices
    orpo = read(tmp_path, "stage: dpo\npref_loss: orpo\npref_beta: 0.3\n")
    assert (orpo.run.stage, orpo.trainer["beta"]) == ("orpo", 0.3)
    assert any("stage: orpo is used" in notice for notice in orpo.notices)
    assert read(tmp_path, "stage: dpo\npref_loss: hinge\n").trainer["loss_type"] == ["hinge"]
    grpo = read(tmp_path, "stage: grpo\ncutoff_len: 2048\nreward_funcs: a.py:f\n")
    assert "max_length" not in grpo.trainer
    assert any("GRPO cuts no prompt" in notice for notice in grpo.notices)
    for stage in ("pt", "rm"):
        assert read(tmp_path, f"stage: {stage}\ncutoff_len: 128\n").trainer["max_length"] == 128


def test_more_keys_of_llama_factory_are_translated(tmp_path: Path) -> None:
    settings = read(tmp_path, "pure_bf16: true\nloraplus_lr_ratio: 16\nadditional_target: embed_tokens,lm_head\n")
    assert settings.run.torch_dtype == "bfloat16"
    assert settings.run.loraplus_lr_ratio == 16
    assert settings.run.additional_target == ["embed_tokens", "lm_head"]
    assert read(tmp_path, "modules_to_save: [lm_head]\n").run.additional_target == ["lm_head"]
