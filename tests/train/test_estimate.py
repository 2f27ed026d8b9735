"""Estimates move the right way, agree with what the packed model holds, and are near a measured peak."""

from __future__ import annotations

import csv
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from kt_hf import KTAMXConfigError, KTConfig, apply_kt_moe, kt_lora_config
from kt_hf.quantized import Manifest
from kt_hf.train.config.settings import RunKeys, TrainSettings
from kt_hf.train.hub import sizes_of
from kt_hf.train.memory import check_gpu, estimate
from kt_hf.train.memory_parts import Estimate, shape_of
from kt_hf.train.model_sizes import model_sizes
from kt_hf.train.models import load_config
from tests.support.families import config_of, tiny
from tests.support.tiny import ROOT

KEYS = RunKeys(model_name_or_path="builtin:smollm2-moe")


def made(
    kt: dict[str, Any] | None = None,
    free: int | None = None,
    gpu: bool = False,
    gpu_free: int | None = None,
    **trainer: Any,
) -> Estimate:
    keys = dataclasses.replace(KEYS, stage=trainer.pop("stage", "sft"), lora_rank=trainer.pop("lora_rank", 8))
    settings = TrainSettings("here", keys, KTConfig(**(kt or {})), trainer)
    sizes = model_sizes(load_config(keys)[0], keys)
    return estimate(settings, sizes, kernel=True, gpu=gpu, host_free=free, gpu_free=gpu_free)


def test_settings_that_save_memory_do() -> None:
    plain = made().host_total
    assert made({"kt_share_backward_weights": True}).host_total < plain - 2**30
    assert made({"kt_expert_activations": "recompute"}).host_total < plain
    assert made(per_device_train_batch_size=1).host_total < plain
    assert made(max_length=128).host_total < plain
    assert made(lora_rank=4).host_total < plain < made(lora_rank=64).host_total
    assert made(stage="dpo").host_total > plain
    assert made(activation_checkpointing=False).host_total > plain


CPU = {"kt_num_gpu_experts": 0}


def test_a_gpu_takes_all_but_the_experts() -> None:
    with_gpu, without = made(CPU, gpu=True), made()
    assert with_gpu.host_total < without.host_total
    assert with_gpu.host["experts packed"] == without.host["experts packed"]
    assert with_gpu.gpu["attention, embeddings and the rest"] == without.host["attention, embeddings and the rest"]
    assert "experts" not in with_gpu.gpu
    assert without.gpu == {}


def test_experts_in_tiers_are_counted_there() -> None:
    """In the memory of theirs, and auto as it begins and as the GPU has room, which is told."""
    plain, split = made(CPU, gpu=True), made({"kt_expert_placement": {"resident": 2, "streamed": 4}}, gpu=True)
    assert split.gpu["experts"] * 2 == split.host["experts streamed"] == plain.host["experts packed"] // 2
    assert split.host["experts packed"] == plain.host["experts packed"] // 4
    assert "buffers of experts" in split.gpu
    assert made({"kt_expert_placement": "gpu"}, gpu=True).host["experts packed"] == 0
    whole = made({"kt_expert_placement": {"resident_layers": 10}}, gpu=True)
    assert whole.gpu["experts"] * 2 == whole.host["experts streamed"] == plain.host["experts packed"] // 3 * 2
    assert made({"kt_expert_placement": "auto"}).plan is None, "without a GPU it is the CPU"
    planned = made({"kt_expert_placement": "auto"}, gpu=True)
    assert planned.plan is not None
    assert planned.as_json()["assumed_plan"]["resident_layers"] == planned.plan.resident_layers == 30
    assert planned.gpu["experts"] == plain.host["experts packed"]
    assert planned.host["experts streamed"] == plain.host["experts packed"], "a layer can be taken from the GPU again"


def test_auto_takes_what_the_gpu_has() -> None:
    """Layers stay as there is room; where host memory is short, they are on the GPU from the start."""
    before = -1
    for gigabytes in (1.5, 1.8, 2.1):
        auto = made(free=2**36, gpu=True, gpu_free=int(gigabytes * 2**30), max_length=256)
        assert auto.plan is not None
        assert auto.plan.cpu == 0
        assert auto.gpu_total < gigabytes * 2**30
        assert auto.plan.resident_layers >= before
        before = auto.plan.resident_layers
    assert 0 < before < 30
    short = made(free=3 * 2**30, gpu=True, gpu_free=6 * 2**30, max_length=256)
    assert 0 < short.host["experts streamed"] < auto.host["experts streamed"]


@pytest.mark.parametrize(("layers", "tokens", "lora", "gpu", "host"), [
    (12, 2048, "gpu", 6.9, None), (12, 8192, "gpu", 8.6, None), (12, 16_384, "gpu", 11.4, None),
    (12, 8192, "cpu", 6.0, None), (48, 2048, "gpu", None, 61), (48, 2048, "cpu", None, 75),
])  # fmt: skip
def test_peaks_measured_with_streamed_experts(
    layers: int, tokens: int, lora: str, gpu: float | None, host: float | None
) -> None:
    """Qwen3-30B-A3B's layers on an H100 by SFTTrainer, LoRA r=16, in 10^9 bytes; host memory with 48 layers."""
    keys = RunKeys(model_name_or_path="Qwen/Qwen3-30B-A3B", lora_rank=16)
    config = sizes_of(keys.model_name_or_path)
    config.num_hidden_layers = layers
    kt = KTConfig(kt_expert_placement={"streamed": 128}, kt_moe_lora_device=lora)
    trainer = {"per_device_train_batch_size": tokens // 2048, "max_length": 2048}
    found = estimate(TrainSettings("here", keys, kt, trainer), model_sizes(config, keys), True, True, None, None)
    if gpu:
        assert (found.gpu_total - found.gpu["CUDA"]) / 1e9 == pytest.approx(gpu, rel=0.1)
    if host:
        assert found.host_total / 1e9 == pytest.approx(host, rel=0.1)


def test_the_loss_is_the_stages() -> None:
    """TRL's trainers compute it in chunks, but for label smoothing."""
    plain = made(gpu=True).budget
    assert plain.loss == made(gpu=True, stage="dpo").budget.loss == "chunked"
    assert made(gpu=True, label_smoothing_factor=0.1).budget.loss == "full"
    assert not plain.accumulating
    assert made(gpu=True, gradient_accumulation_steps=2).budget.accumulating
    moved = made(gpu=True, activation_offloading=True)
    assert moved.host["activations, moved from the GPU"] > 0
    assert "activations, moved from the GPU" not in made(gpu=True).host


@pytest.mark.parametrize(("dtype", "times"), [("bfloat16", 2), ("auto", 2), ("float16", 1), ("float32", 1)])
def test_streamed_experts_of_8_bits_are_half_as_large(dtype: str, times: int, tiny_model: Path) -> None:
    """Where the configuration says that the checkpoint has them so."""
    found = {}
    for quantised in (None, {"quant_method": "fp8", "weight_block_size": [128, 128]}, {"quant_method": "awq"}):
        keys = dataclasses.replace(KEYS, model_name_or_path=str(tiny_model), torch_dtype=dtype)
        config = load_config(keys)[0]
        if quantised:
            config.quantization_config = quantised
        sizes = model_sizes(config, keys)
        settings = TrainSettings("here", keys, KTConfig(kt_expert_placement={"streamed": 2}), {})
        made = estimate(settings, sizes, kernel=True, gpu=True, host_free=None, gpu_free=None)
        found[(quantised or {}).get("quant_method")] = made
    plain, eight = found[None], found["fp8"]
    assert eight.host["experts streamed"] * times == pytest.approx(plain.host["experts streamed"], rel=0.001)
    buffers = [one.gpu["buffers of experts"] for one in (eight, plain)]
    assert buffers[0] * 6 == pytest.approx(buffers[1] * (5 if times == 2 else 6), rel=0.001), (
        "three as they are copied, and one in bf16"
    )
    assert found["awq"].host == plain.host, "what loading refuses changes nothing"


@pytest.mark.parametrize(
    ("quantised", "bits"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, 4 + 24 / 128),
        ({"quant_method": "mxfp4"}, 4.25),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, 4.5),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4.5),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "llm_int8_skip_modules": ["experts"]}, 16),
    ],
    ids=str,
)
def test_streamed_experts_of_4_bits(quantised: dict[str, object], bits: float, tiny_model: Path) -> None:
    """By the configuration alone; experts that it leaves out of the quantization are bf16."""
    keys = dataclasses.replace(KEYS, model_name_or_path=str(tiny_model), torch_dtype="bfloat16")
    config = load_config(keys)[0]
    config.quantization_config = quantised
    settings = TrainSettings("here", keys, KTConfig(kt_expert_placement={"streamed": 2}), {})
    sizes = model_sizes(config, keys)
    memory = estimate(settings, sizes, kernel=True, gpu=True, host_free=None, gpu_free=None)
    streamed = 2 * sizes.expert_parameters // sizes.experts
    assert memory.host["experts streamed"] == pytest.approx(streamed * bits / 8, rel=0.001)


def test_what_does_not_fit_comes_with_advice() -> None:
    need = made({"kt_share_backward_weights": False}).host_total
    short = made({"kt_share_backward_weights": False}, free=need - 1)
    assert not short.fits
    assert any("kt_share_backward_weights: true" in line for line in short.advice)
    assert any("per_device_train_batch_size: 1" in line for line in short.advice)
    assert made({"kt_share_backward_weights": False}, free=need).fits
    tiny = made(free=2**29)
    assert tiny.advice == ["the experts alone need 1 GiB of host memory: take a larger machine or a smaller model"]


def test_without_memory_to_spare_backward_weights_are_shared() -> None:
    assert made(free=3 * 2**30).shared_backward
    assert not made(free=64 * 2**30).shared_backward


@pytest.mark.parametrize(("backend", "part"), [("AMXBF16", 1.0), ("auto", 1.0), ("AMXInt8", 0.5), ("AMXInt4", 0.25)])
def test_experts_take_what_their_arithmetic_takes(backend: str, part: float) -> None:
    """As measured: BF16 2 W, INT8 1 W, INT4 0.5 W; half of it and one layer's copy with shared backward weights."""
    weights = made().host["experts packed"]
    found = made({"kt_backend": backend, "kt_share_backward_weights": False}).host
    assert found["experts packed"] == found["backward copies"] == part * weights
    shared = made({"kt_backend": backend, "kt_share_backward_weights": True}).host
    assert shared["experts packed"] == part * weights
    assert shared["backward copies"] == part * weights // 30
    # The built-in model is made in bf16 and packed after.
    assert sum(shared.get(p, 0) for p in ("experts packed", "backward copies", "experts before packing")) >= weights


def test_a_streamed_model_never_has_its_experts_in_bf16(tiny_model: Path) -> None:
    keys = dataclasses.replace(KEYS, model_name_or_path=str(tiny_model))
    settings = TrainSettings("here", keys, KTConfig(kt_backend="AMXInt8"), {})
    sizes = model_sizes(load_config(keys)[0], keys)
    found = estimate(settings, sizes, kernel=True, gpu=False, host_free=None, gpu_free=None)
    assert "experts before packing" not in found.host
    long = dataclasses.replace(sizes, expert_parameters=2 * 10**9)  # two large layers, and next to nothing besides
    reading = estimate(settings, long, kernel=True, gpu=False, host_free=None, gpu_free=None).host
    later = [size for part, size in reading.items() if "activations" in part or "LoRA" in part]
    later += [reading["keys and values"], reading["logits and loss"]]
    assert reading["reading and packing"] + sum(later) == 2.5 * 2 * 10**9


def test_short_memory_may_be_helped_by_int8() -> None:
    need = made({"kt_share_backward_weights": True}).host_total
    short = made({"kt_share_backward_weights": True}, free=need - 1)
    assert any(line.startswith("kt_backend: AMXInt8 saves 0.6 GiB of host memory") for line in short.advice)
    int8 = made({"kt_share_backward_weights": True, "kt_backend": "AMXInt8"}, free=2**30)
    assert not any("AMXInt8" in line for line in int8.advice)


def test_saved_experts_without_backward_weights_share(tmp_path: Path) -> None:
    Manifest("AMXInt8", False, 1, "0.7.2", "amx", "model", "mixtral", "", {}, {}).write(tmp_path)
    kt = {"kt_backend": "AMXInt8", "kt_weight_path": str(tmp_path)}
    assert made(kt, free=2**40).shared_backward
    assert not made(kt | {"kt_weight_path": str(tmp_path / "on another machine")}, free=2**40).shared_backward


@pytest.mark.parametrize("target", ["all", "all_attention", "q_proj,o_proj,gate_proj,down_proj"])
def test_parameters_are_those_the_model_gets(target: str, tiny_model: Path) -> None:
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    keys = RunKeys(model_name_or_path=str(tiny_model), lora_rank=4, lora_target=target)
    sizes = model_sizes(load_config(keys)[0], keys)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert sizes.expert_parameters + sizes.other_parameters == sum(p.numel() for p in model.parameters())
    apply_kt_moe(model, KTConfig(kt_backend="torch"))
    tuned = get_peft_model(model, kt_lora_config(model, 4, lora_target=target))
    trained = {name: p.numel() for name, p in tuned.named_parameters() if p.requires_grad}
    assert sizes.lora_experts == sum(count for name, count in trained.items() if ".experts." in name)
    assert sizes.lora_others == sum(count for name, count in trained.items() if ".experts." not in name)


def test_measured_peaks_are_within_15_percent() -> None:
    """As benchmarks/memory.py has written them; run it again after a change of what is kept in memory."""
    with (ROOT / "docs" / "memory.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) >= 3
    for row in rows:
        assert abs(float(row["estimated_gib"]) / float(row["measured_gib"]) - 1) < 0.15, row


def test_a_gpu_that_is_too_small_by_far_is_refused_with_the_batch_that_fits() -> None:
    one, eight = (made(CPU, gpu=True, per_device_train_batch_size=batch).gpu_total for batch in (1, 8))
    assert one < 0.7 * eight
    free = int(1.05 * one)
    short = made(CPU, gpu=True, gpu_free=free, per_device_train_batch_size=8)
    fitting = int(short.advice[0].removeprefix("per_device_train_batch_size: ").split()[0])
    assert fitting in (1, 2, 4)
    assert made(CPU, gpu=True, gpu_free=free, per_device_train_batch_size=fitting).fits
    assert not made(CPU, gpu=True, gpu_free=free, per_device_train_batch_size=2 * fitting).fits
    with pytest.raises(KTAMXConfigError, match=rf"too small for this run.*train_batch_size: {fitting} fits"):
        check_gpu(short)
    check_gpu(made(CPU, gpu=True, gpu_free=int(0.9 * eight), per_device_train_batch_size=8))  # a note is enough
    nothing = made(CPU, gpu=True, gpu_free=2**29, per_device_train_batch_size=8)
    assert not any("fits on the GPU" in line for line in nothing.advice)


@pytest.mark.parametrize(("family", "matrices"), [("gpt_oss", 3), ("nemotron_h", 2)])
def test_experts_of_other_forms(family: str, matrices: int) -> None:
    """Biases are counted, beside the experts, and only the matrices that are there."""
    model, config = tiny(family), config_of(family)
    config.architectures = [type(model).__name__]
    sizes = model_sizes(config, KEYS)
    biases = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name and name.endswith("_bias"))
    assert (biases > 0) == (family == "gpt_oss")
    routed = [
        p.numel() for name, p in model.named_parameters() if re.search(r"\.experts\.(gate_up|up|down)_proj$", name)
    ]
    assert sizes.expert_parameters == sum(routed)
    assert sizes.other_parameters == sum(p.numel() for p in model.parameters()) - sum(routed)
    assert shape_of(sizes).num_weights * sizes.expert_layers == sum(routed)
    assert len(shape_of(sizes).projections) == matrices


def test_layers_that_differ_in_their_heads() -> None:
    """Gemma 4's: the largest counts; asking for one of all layers is an error there."""
    model, config = tiny("gemma4"), config_of("gemma4")
    config.architectures = [type(model).__name__]
    widths = {p.shape[0] for name, p in model.named_parameters() if name.endswith("q_proj.weight")}
    assert len(widths) > 1
    assert model_sizes(config, KEYS).attention_width == max(widths)
