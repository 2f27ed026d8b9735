"""Where the experts' LoRA is: by setting, tiers and what the GPU has left, decided once a model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import TrainerControl, TrainerState
from trl import SFTConfig

from kt_hf import KTConfig, KTMoECallback, apply_kt_moe
from kt_hf.backends.gpu.weight_stream import BUFFERS, CHUNK_BYTES
from kt_hf.experts.projections import ExpertLora, ExpertProjection
from kt_hf.placement import packer as packing
from kt_hf.placement import packer_of
from kt_hf.placement.lora_device import choose_lora_device
from kt_hf.placement.memory_model import MemoryBudget, gpu_memory
from kt_hf.placement.packer import Packer
from kt_hf.placement.record import write_run_placement
from kt_hf.placement.tiers import Tiers
from kt_hf.shapes import ExpertShape, expert_bytes
from kt_hf.system.cpu import ThreadPlan
from kt_hf.train.expert_profile import as_before
from tests.support.helpers import MIXTRAL
from tests.support.patched import lora_config

GB = 10**9
QWEN = [ExpertShape(128, 8, 2048, 768)] * 48
LAYER = expert_bytes(QWEN[0]) * 128
# 128 experts of 48 layers: gate and up [r, 2048] and [768, r], down [r, 768] and [2048, r].
PARAMETERS = 48 * 128 * 16 * 3 * (2048 + 768)
STREAMED = Tiers(0, 128)


def room(lora_gb: float, experts: int = 0) -> int:
    """Bytes for experts that leave so many GB for LoRA beside the buffers and so many bytes of experts."""
    return int(lora_gb * GB) + BUFFERS * CHUNK_BYTES + experts


@pytest.mark.parametrize(
    ("asked", "tiers", "free", "on_gpu"),
    [
        ("auto", STREAMED, room(14), True),
        ("auto", STREAMED, room(13), False),  # 13.3 are needed
        ("auto", Tiers(128), room(14, 48 * LAYER), True),
        ("auto", Tiers(128), room(12, 48 * LAYER), False),
        ("auto", Tiers(64, 64), room(14, 48 * LAYER // 2), True),
        ("auto", Tiers(64, 64), room(14), False),  # the resident half counts
        ("auto", Tiers(0, 128, 24), room(14, 24 * LAYER), True),
        ("auto", Tiers(0, 128, 24), room(14, 23 * LAYER), False),  # whole layers count
        ("auto", Tiers(0, 127), room(1000), False),  # one expert on the CPU
        ("auto", Tiers(), room(1000), False),
        ("auto", STREAMED, None, False),  # no GPU
        ("auto", STREAMED, 0, False),
        ("gpu", Tiers(), None, True),
        ("gpu", STREAMED, 0, True),
        ("cpu", STREAMED, room(1000), False),
    ],
)
def test_the_device(asked: str, tiers: Tiers, free: int | None, on_gpu: bool) -> None:
    chosen = choose_lora_device(asked, 16, QWEN, tiers, free)
    assert chosen.on_gpu is on_gpu
    assert chosen.parameters == PARAMETERS
    assert chosen.size == 16 * PARAMETERS


def test_experts_in_8_bits_have_larger_buffers() -> None:
    """Two chunks in bf16 beside the three of the ring."""
    need = 16 * PARAMETERS + BUFFERS * CHUNK_BYTES + CHUNK_BYTES // 2
    assert choose_lora_device("auto", 16, QWEN, STREAMED, need).on_gpu
    assert not choose_lora_device("auto", 16, QWEN, STREAMED, need, bits=8).on_gpu
    assert choose_lora_device("auto", 16, QWEN, STREAMED, need + 3 * CHUNK_BYTES, bits=8).on_gpu


def test_twice_the_rank_takes_twice_the_room() -> None:
    assert choose_lora_device("auto", 32, QWEN, STREAMED, room(27)).on_gpu
    assert not choose_lora_device("auto", 32, QWEN, STREAMED, room(26)).on_gpu


def test_it_says_what_and_why() -> None:
    text = str(choose_lora_device("auto", 16, QWEN, STREAMED, room(10)))
    assert text == "LoRA on the CPU: 830.5 M parameters, 13.3 GB with gradients and moments; the GPU has 10.0 GB " \
        "beside everything else"  # fmt: skip


def packer(monkeypatch: pytest.MonkeyPatch, tiers: Tiers, free: float, **config: Any) -> Packer:
    """Of a Qwen3-30B-A3B, with so many GB free on the GPU, the tenth for safety aside."""
    monkeypatch.setattr(packing, "free_device_memory", lambda device: int(free * GB / 0.9))
    one = Packer(KTConfig(**config), "torch", "a test", ThreadPlan(((0, 1),)), 0, tiers, gpu=torch.device("cpu"))
    one.place(dict(enumerate(QWEN)), None, MemoryBudget(2048, rest_bytes=2 * GB, layers=48, vocabulary=100_000))
    return one


def test_everything_that_is_on_the_gpu_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 GB of other weights, 13.3 of LoRA, 0.8 of buffers; hidden states, logits and their loss at 2,048 tokens."""
    budget = MemoryBudget(2048, 2 * GB, 48, 100_000, computed_rank=16)
    beside = 100 * GB - budget.free_for_experts(int(100 * GB / 0.9), 2048, QWEN[0])
    need = (beside + 16 * PARAMETERS + BUFFERS * CHUNK_BYTES) / GB
    assert packer(monkeypatch, STREAMED, need + 0.1).lora_on_gpu(16)
    assert not packer(monkeypatch, STREAMED, need - 0.1).lora_on_gpu(16)


def test_the_first_answer_stays(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Also when a larger adapter comes later, or memory has become free or short; it is told once."""
    one = packer(monkeypatch, STREAMED, 40)
    with caplog.at_level(logging.INFO, "kt_hf"):
        assert one.lora_on_gpu(16)
        one.lora._free = 0
        assert one.lora_on_gpu(1024)
    assert [r.message.split(";")[0] for r in caplog.records] == [
        "kt_hf: kt_moe_lora_device=auto: LoRA on the GPU: 830.5 M parameters, 13.3 GB with gradients and moments"
    ]


@pytest.mark.parametrize(("tiers", "asked"), [(Tiers(), "auto"), (Tiers(8, 0), "auto"), (STREAMED, "cpu")])
def test_nothing_is_said_where_there_is_no_choice(
    tiers: Tiers, asked: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one = packer(monkeypatch, tiers, 1000, kt_moe_lora_device=asked)
    with caplog.at_level(logging.INFO, "kt_hf"):
        assert not one.lora_on_gpu(16)
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
    [(1000, "auto", "auto"), (1, "auto", "cpu"), (1000, "cpu", "cpu")],
    ids=["was on the GPU", "did not fit", "was asked for"],
)
def test_a_run_that_goes_on_leaves_lora_on_the_cpu(
    free: float, asked: str, then: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also where it would fit now. On the GPU it is again if it fits; and what is asked for is done."""
    one = packer(monkeypatch, STREAMED, free, kt_moe_lora_device=asked)
    one.lora_on_gpu(16)
    write_run_placement(tmp_path, one, {})
    kt, notes = as_before(KTConfig(), tmp_path)
    assert kt == KTConfig(kt_moe_lora_device=then)
    assert len(notes) == (then == "cpu")
    assert as_before(KTConfig(kt_moe_lora_device="gpu"), tmp_path) == (KTConfig(kt_moe_lora_device="gpu"), [])


def test_a_run_without_lora_on_experts_says_nothing_of_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_run_placement(tmp_path, packer(monkeypatch, STREAMED, 1), {})
    assert as_before(KTConfig(), tmp_path) == (KTConfig(), [])


def test_experts_and_lora_on_the_cpu_stay_without_a_word(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    one = packer(monkeypatch, Tiers(), 1000)
    one.lora_on_gpu(16)
    write_run_placement(tmp_path, one, {})
    assert as_before(KTConfig(), tmp_path) == (KTConfig(), [])


def test_a_trainer_says_how_it_computes_its_loss(
    cpu_for_gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All logits have no room beside it, TRL's tiles have: it goes to the GPU before there is an optimizer."""
    monkeypatch.setattr("kt_hf.placement.choice.copy_rate", lambda _: 1e12)
    shape = ExpertShape(MIXTRAL.num_experts, MIXTRAL.top_k, MIXTRAL.hidden, MIXTRAL.intermediate)
    base = MIXTRAL(torch.bfloat16)
    base.config.vocab_size = 150_000  # nothing is computed
    budget = MemoryBudget(tokens=4096, layers=2, vocabulary=150_000)
    free = int(gpu_memory(budget, shape, 2, 4096, Tiers(0, MIXTRAL.num_experts)).total / 0.9)
    for module in ("packer", "choice"):
        monkeypatch.setattr(f"kt_hf.placement.{module}.free_device_memory", lambda _: free)
    model = get_peft_model(apply_kt_moe(base, tokens_per_step=4096), lora_config(MIXTRAL))
    packer = packer_of(model)
    assert packer is not None
    assert packer.lora.left_on_cpu
    settings_ = {"per_device_train_batch_size": 4, "max_length": 1024, "loss_type": "nll"}
    seen = []
    monkeypatch.setattr(ExpertProjection, "follow_to_gpu", lambda self, device: seen.append(device))
    for more, moved in (({"label_smoothing_factor": 0.1}, 0), ({}, 6)):
        args = SFTConfig(str(tmp_path), report_to=[], bf16=False, **settings_ | more)
        KTMoECallback().on_init_end(args, TrainerState(), TrainerControl(), model=model, optimizer=None)
        assert len(seen) == moved
        assert packer.lora.left_on_cpu == (not moved)
