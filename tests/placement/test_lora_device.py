"""Where the experts' LoRA is: by setting, tiers and what the GPU has left, decided once a model."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import TrainerControl, TrainerState
from trl import SFTConfig

from kt_hf import KTConfig, KTMoECallback, apply_kt_moe
from kt_hf.experts.projections import ExpertLora, ExpertProjection
from kt_hf.placement import packer as packing
from kt_hf.placement import packer_of
from kt_hf.placement.lora_device import choose_lora_device
from kt_hf.placement.memory_model import MemoryBudget, fragments, gpu_memory
from kt_hf.placement.packer import Packer
from kt_hf.placement.record import write_run_placement
from kt_hf.placement.tiers import Tiers
from kt_hf.shapes import ExpertShape
from kt_hf.system.cpu import ThreadPlan
from kt_hf.train.expert_profile import as_before, with_lora_as_before
from tests.support.helpers import MIXTRAL
from tests.support.patched import lora_config

GB = 10**9
QWEN = [ExpertShape(128, 8, 2048, 768)] * 48
# 128 experts of 48 layers: gate and up [r, 2048] and [768, r], down [r, 768] and [2048, r].
PARAMETERS = 48 * 128 * 16 * 3 * (2048 + 768)
STREAMED = Tiers(0, 128)


BUDGET = MemoryBudget(rest_bytes=3 * GB, layers=48, vocabulary=100_000, loss="chunked", computed_rank=16)


def free(tiers: Tiers, with_lora: int, tokens: int = 2048, short: int = 0, rank: int = 16, **settings: Any) -> int:
    """Bytes of the GPU's memory that a step takes with LoRA of so many layers there, and the tenth for safety."""
    budget = replace(BUDGET, lora_rank=rank, computed_rank=rank, lora_layers=with_lora, **settings)
    return math.ceil((gpu_memory(budget, QWEN[0], 48, tokens, tiers, fragments=fragments()).total - short) / 0.9)


@pytest.mark.parametrize("tiers", [STREAMED, Tiers(128), Tiers(64, 64), Tiers(0, 128, 24)])
def test_all_of_it_is_on_the_gpu_as_soon_as_it_fits(tiers: Tiers) -> None:
    """The experts there count."""
    enough, short = free(tiers, 48), free(tiers, 48, short=10**6)
    assert choose_lora_device("auto", 16, QWEN, tiers, BUDGET, 2048, enough).on_gpu == 48
    assert choose_lora_device("auto", 16, QWEN, tiers, BUDGET, 2048, short).on_gpu == 0, (
        "nobody said how long steps are"
    )


def test_of_steps_whose_length_is_known_as_many_layers_as_fit() -> None:
    told = replace(BUDGET, tokens=8192)
    for count in (47, 20, 1):
        enough, short = (free(STREAMED, count, 8192, short) for short in (0, 10**6))
        assert choose_lora_device("auto", 16, QWEN, STREAMED, told, 8192, enough).on_gpu == count
        assert choose_lora_device("auto", 16, QWEN, STREAMED, told, 8192, short).on_gpu == count - 1
        before = replace(told, lora_layers=5)
        assert choose_lora_device("auto", 16, QWEN, STREAMED, before, 8192, enough).on_gpu == min(count, 5)
    batches = replace(told, accumulating=True)  # may be made one: all or nothing
    for short, expected in ((0, 48), (10**6, 0)):
        size = free(STREAMED, 48, 8192, short, accumulating=True)
        assert choose_lora_device("auto", 16, QWEN, STREAMED, batches, 8192, size).on_gpu == expected


def test_gradients_are_not_there_while_activations_are() -> None:
    """A step of 48 layers in 24 GB: 16 bytes a parameter beside all activations would leave LoRA on the CPU."""
    told = replace(BUDGET, tokens=8192)
    chosen = choose_lora_device("auto", 16, QWEN, STREAMED, told, 8192, 24 * GB)
    assert 30 <= chosen.on_gpu < 48
    assert chosen.needed is not None
    assert chosen.needed <= 0.9 * 24 * GB
    assert choose_lora_device("auto", 16, QWEN, STREAMED, told, 8192, 27 * GB).on_gpu == 48


def test_fragments_leave_less_room_the_longer_a_step_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """16,384 tokens of 48 layers ran out of 24 GB with LoRA of 15 layers on the GPU, by tensors alone they fitted.

    Where segments grow there are a third of the fragments.
    """
    told = replace(BUDGET, tokens=16_384)
    with_lora = replace(told, lora_rank=16, lora_layers=15)
    assert gpu_memory(with_lora, QWEN[0], 48, 16_384, STREAMED).total < 0.9 * 24 * GB
    monkeypatch.setattr(torch.version, "hip", None)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    growing = choose_lora_device("auto", 16, QWEN, STREAMED, told, 16_384, 24 * GB)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64")
    fixed = choose_lora_device("auto", 16, QWEN, STREAMED, told, 16_384, 24 * GB)
    assert fixed.on_gpu < 5
    assert fixed.on_gpu + 5 < growing.on_gpu < 15


@pytest.mark.parametrize(
    ("asked", "tiers", "size", "on_gpu"),
    [
        ("auto", Tiers(0, 127), 10**15, 0),  # one expert on the CPU
        ("auto", Tiers(), 10**15, 0),
        ("auto", STREAMED, None, 0),  # no GPU
        ("auto", STREAMED, 0, 0),
        ("gpu", Tiers(), None, 48),
        ("gpu", STREAMED, 0, 48),
        ("cpu", STREAMED, 10**15, 0),
    ],
)
def test_the_device(asked: str, tiers: Tiers, size: int | None, on_gpu: int) -> None:
    chosen = choose_lora_device(asked, 16, QWEN, tiers, replace(BUDGET, tokens=2048), 2048, size)
    assert chosen.on_gpu == on_gpu
    assert chosen.parameters == PARAMETERS
    assert chosen.size == 16 * PARAMETERS


def test_twice_the_rank_takes_twice_the_room() -> None:
    size = free(STREAMED, 48, rank=32)
    assert choose_lora_device("auto", 32, QWEN, STREAMED, BUDGET, 2048, size).on_gpu
    assert not choose_lora_device("auto", 32, QWEN, STREAMED, BUDGET, 2048, size - GB).on_gpu


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        (0, "LoRA on the CPU: 830.5 M parameters, 13.3 GB with gradients and moments; a step then takes about "),
        (12, "LoRA of 12 of 48 layers on the GPU: 830.5 M parameters in all, 13.3 GB with gradients and moments; "),
        (48, "LoRA on the GPU: 830.5 M parameters, 13.3 GB with gradients and moments; a step then takes about "),
    ],
)
def test_it_says_what_and_why(layers: int, text: str) -> None:
    told = replace(BUDGET, tokens=2048)
    chosen = choose_lora_device("auto", 16, QWEN, STREAMED, told, 2048, free(STREAMED, layers))
    assert str(chosen).startswith(text)


def packer(monkeypatch: pytest.MonkeyPatch, tiers: Tiers, free: float, **config: Any) -> Packer:
    """Of a Qwen3-30B-A3B, with so many GB free on the GPU, the tenth for safety aside."""
    monkeypatch.setattr(packing, "free_device_memory", lambda device: int(free * GB / 0.9))
    one = Packer(KTConfig(**config), "torch", "a test", ThreadPlan(((0, 1),)), 0, tiers, gpu=torch.device("cpu"))
    one.place(dict(enumerate(QWEN)), None, MemoryBudget(2048, rest_bytes=2 * GB, layers=48, vocabulary=100_000))
    return one


def test_the_first_layers_and_the_first_answer(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also when a larger adapter comes later, or memory has become free or short; it is told once."""
    one = packer(monkeypatch, STREAMED, 16)
    with caplog.at_level(logging.INFO, "kt_hf"):
        there = [one.lora_on_gpu(16, layer) for layer in range(48)]
        one.lora._free = 0
        assert [one.lora_on_gpu(1024, layer) for layer in range(48)] == there
    assert 0 < sum(there) < 48
    assert there == sorted(there, reverse=True)
    assert [r.message.split(":")[:2] for r in caplog.records] == [["kt_hf", " kt_moe_lora_device=auto"]]
    assert f"LoRA of {sum(there)} of 48 layers on the GPU" in caplog.text


@pytest.mark.parametrize(("tiers", "asked"), [(Tiers(), "auto"), (Tiers(8, 0), "auto"), (STREAMED, "cpu")])
def test_nothing_is_said_where_there_is_no_choice(
    tiers: Tiers, asked: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one = packer(monkeypatch, tiers, 1000, kt_moe_lora_device=asked)
    with caplog.at_level(logging.INFO, "kt_hf"):
        assert not one.lora_on_gpu(16, 0)
    assert not caplog.records


@pytest.mark.parametrize(
    ("placement", "follows"),
    [({"streamed": 8}, True), ("gpu", True), ({"resident": 3, "streamed": 5}, True), ({"streamed": 6}, False),
     ("cpu", False)],
)  # fmt: skip
def test_the_adapter_of_a_model(cpu_for_gpu: None, placement: Any, follows: bool) -> None:
    """All of its tensors, of a second adapter too; with nothing set."""
    config = KTConfig(kt_backend="torch", kt_expert_placement=placement)
    model = get_peft_model(apply_kt_moe(MIXTRAL(torch.bfloat16), config), lora_config(MIXTRAL))
    model.add_adapter("second", lora_config(MIXTRAL))
    holders = [module for module in model.modules() if isinstance(module, ExpertLora)]
    assert len(holders) == 2 * 6 * len(model._kt_wrappers)
    assert {holder.follow_to_gpu for holder in holders} == {follows}


@pytest.mark.parametrize(
    ("free", "asked", "then"),
    [(1000, "auto", "auto"), (16, "auto", "auto"), (1, "auto", "cpu"), (1000, "cpu", "cpu")],
    ids=["was on the GPU", "was there in part", "did not fit", "was asked for"],
)
def test_a_run_that_goes_on_leaves_lora_on_the_cpu(
    free: float, asked: str, then: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also where it would fit now. On the GPU it is again if it fits; and what is asked for is done."""
    one = packer(monkeypatch, STREAMED, free, kt_moe_lora_device=asked)
    one.lora_on_gpu(16, 0)
    write_run_placement(tmp_path, one, {})
    kt, notes = as_before(KTConfig(), tmp_path)
    assert one.lora.chosen is not None
    assert with_lora_as_before(BUDGET, tmp_path).lora_layers == (one.lora.chosen.on_gpu or None)
    assert kt == KTConfig(kt_moe_lora_device=then)
    assert len(notes) == (then == "cpu")
    assert as_before(KTConfig(kt_moe_lora_device="gpu"), tmp_path) == (KTConfig(kt_moe_lora_device="gpu"), [])


def test_a_run_without_lora_on_experts_says_nothing_of_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_run_placement(tmp_path, packer(monkeypatch, STREAMED, 1), {})
    assert as_before(KTConfig(), tmp_path) == (KTConfig(), [])


def test_experts_and_lora_on_the_cpu_stay_without_a_word(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    one = packer(monkeypatch, Tiers(), 1000)
    one.lora_on_gpu(16, 0)
    write_run_placement(tmp_path, one, {})
    assert as_before(KTConfig(), tmp_path) == (KTConfig(), [])


def test_a_trainer_says_how_it_computes_its_loss(
    cpu_for_gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All logits have no room beside it, TRL's tiles have; longer steps have none: before there is an optimizer."""
    monkeypatch.setattr("kt_hf.placement.choice.copy_rate", lambda _: 1e12)
    shape = ExpertShape(MIXTRAL.num_experts, MIXTRAL.top_k, MIXTRAL.hidden, MIXTRAL.intermediate)
    base = MIXTRAL(torch.bfloat16)
    base.config.vocab_size = 150_000  # nothing is computed
    budget = MemoryBudget(tokens=4096, layers=2, vocabulary=150_000)
    size = int(gpu_memory(budget, shape, 2, 4096, Tiers(0, MIXTRAL.num_experts)).total / 0.9)
    for module in ("packer", "choice"):
        monkeypatch.setattr(f"kt_hf.placement.{module}.free_device_memory", lambda _: size)
    model = get_peft_model(apply_kt_moe(base, tokens_per_step=4096), lora_config(MIXTRAL))
    packer = packer_of(model)
    assert packer is not None
    assert packer.lora.chosen is not None
    assert packer.lora.chosen.on_gpu == 0
    settings_ = {"per_device_train_batch_size": 4, "max_length": 1024, "loss_type": "nll"}
    seen: list[torch.device | None] = []
    monkeypatch.setattr(ExpertProjection, "place_lora", lambda self, gpu: seen.append(gpu))
    gpu = packer.gpu_device
    for more, layers in (({"label_smoothing_factor": 0.1}, 0), ({}, 2), ({"max_length": 2**20}, 0)):
        args = SFTConfig(str(tmp_path), report_to=[], bf16=False, **settings_ | more)
        seen.clear()
        KTMoECallback().on_init_end(args, TrainerState(), TrainerControl(), model=model, optimizer=None)
        assert seen == [gpu] * 3 * layers + [None] * 3 * (2 - layers)
        assert packer.lora.chosen.on_gpu == layers
    seen.clear()
    monkeypatch.setattr("kt_hf.placement.packer.free_device_memory", lambda _: 0)  # an optimizer has taken the rest
    KTMoECallback().on_init_end(args, TrainerState(), TrainerControl(), model=model, optimizer=None)
    assert seen == [], "a trainer like the one before"
