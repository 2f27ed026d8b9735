"""Which layers keep their experts' forward: as many as there is room for, the same numbers with any of them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import TrainerControl, TrainerState, TrainingArguments

from kt_hf import KTConfig, KTMoECallback, apply_kt_moe
from kt_hf.placement import packer_of
from kt_hf.placement.kept_activations import KeptActivations, keeping_activations
from kt_hf.placement.memory_model import FRAGMENTS, MemoryBudget, fitting_chunk, gpu_memory
from kt_hf.placement.tiers import Tiers
from kt_hf.shapes import ExpertShape, expert_bytes
from tests.support.cases import make_config
from tests.support.helpers import MIXTRAL, count_calls
from tests.support.patched import fill_lora, lora_config, loss_of

GB = 10**9
# Qwen3-235B-A22B in int4, the rest in 4 bits, 8,192 tokens a step, LoRA r=8 on the CPU.
QWEN = ExpertShape(128, 8, 4096, 1536)
STREAMED = Tiers(0, 128)
BUDGET = MemoryBudget(8192, 6 * GB, 94, 151_936, bits=4.5, computed_rank=8, inner_bytes=160_000, loss="chunked")
E = MIXTRAL.num_experts


def retained(free: float, budget: MemoryBudget = BUDGET, tiers: Tiers = STREAMED, asked: str = "auto") -> int | None:
    return keeping_activations(asked, budget, [QWEN] * 94, budget.tokens or 0, tiers, int(free)).retained


def test_as_many_as_there_is_room_for() -> None:
    """29 GiB with all kept, as was measured (29.2): all with 48 GB, some with 24, none with 16."""
    everything = gpu_memory(BUDGET, QWEN, 94, 8192, STREAMED, 2**28).total
    assert everything == pytest.approx(31.4 * GB, rel=0.05)
    assert retained(48 * GB) is None
    counts = [retained(gb * GB) for gb in range(16, 34)]
    assert counts[0] == 0
    some = [94 if count is None else count for count in counts]
    assert some == sorted(some)
    assert 0 < some[24 - 16] < 94


@pytest.mark.parametrize("gb", range(24, 60, 4))
def test_a_chunk_has_room_beside_what_is_kept(gb: int) -> None:
    """And is no smaller than a sixteenth of a layer, where the choice is between both."""
    budget = keeping_activations("auto", BUDGET, [QWEN] * 94, 8192, STREAMED, gb * GB)
    chunk = fitting_chunk(budget, QWEN, 94, 8192, STREAMED, gb * GB)
    assert gpu_memory(budget, QWEN, 94, 8192, STREAMED, chunk, FRAGMENTS).total <= gb * GB
    if budget.retained != 0:
        assert chunk >= 0.8 * 128 * expert_bytes(QWEN) / 16


@pytest.mark.parametrize(
    ("asked", "how", "tiers", "expected"),
    [
        ("retain", {}, STREAMED, None),
        ("recompute", {}, STREAMED, 0),
        ("auto", {"checkpointing": False}, STREAMED, None),
        ("auto", {}, Tiers(), None),
        ("auto", {}, Tiers(0, 64), None),
        ("auto", {}, STREAMED, 0),
    ],
)
def test_what_is_asked_and_what_is_no_question(
    asked: str, how: dict[str, Any], tiers: Tiers, expected: int | None
) -> None:
    budget = MemoryBudget(**{**vars(BUDGET), **how})
    assert retained(10 * GB, budget, tiers, asked) == expected


def test_layers_that_do_not_are_spread(caplog: pytest.LogCaptureFixture) -> None:
    one = KeptActivations("auto")
    with caplog.at_level("INFO", "kt_hf"):
        one.decide(range(10, 18), 0)  # before it is known how logits become a loss
        for _ in range(2):
            one.decide(range(10, 18), 4)
            one.say()
    kept = [layer for layer in range(10, 18) if one.keeps(layer)]
    assert len(kept) == 4
    assert max(b - a for a, b in itertools.pairwise(kept)) <= 3
    assert caplog.text.count("computed again in backward") == 1
    assert "experts of 4 of 8 layers are computed again in backward" in caplog.text
    one.decide(range(10, 18), None)
    assert all(map(one.keeps, range(10, 18)))
    assert not KeptActivations("recompute").keeps(0)


def model_with(monkeypatch: pytest.MonkeyPatch, layers: int) -> PeftModel:
    """A model whose experts are streamed, of which so many layers have room to keep their forward."""

    def room(asked: str, budget: MemoryBudget, *_: Any) -> MemoryBudget:
        assert asked == "auto"
        return MemoryBudget(**{**vars(budget), "retained": layers})

    monkeypatch.setattr("kt_hf.placement.packer.keeping_activations", room)
    settings = make_config("torch", kt_expert_placement={"resident": 0, "streamed": E})
    model = get_peft_model(apply_kt_moe(MIXTRAL(torch.bfloat16), settings), lora_config(MIXTRAL))
    fill_lora(model, 1)
    model.train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def test_one_layer_of_two(cpu_for_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """That one computes its forward once, the other twice, and gradients have the same bits."""
    results = []
    for layers, calls in ((2, [1, 1]), (1, [2, 1]), (0, [2, 2])):
        model = model_with(monkeypatch, layers)
        counts = count_calls(model.base_model.model, monkeypatch)
        loss_of(model, MIXTRAL.inputs()).backward()
        assert sorted(counts.forward, reverse=True) == calls
        assert counts.backward == [1, 1]
        results.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for other in results[1:]:
        assert all(torch.equal(value, other[name]) for name, value in results[0].items())


def test_a_trainer_says_how_long_its_steps_are(
    cpu_for_gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Decided when the model is patched, and once more for the trainer, in both directions."""
    shape = ExpertShape(E, MIXTRAL.top_k, MIXTRAL.hidden, MIXTRAL.intermediate)
    budget = MemoryBudget(tokens=4096, layers=2, vocabulary=128, loss="full", computed_rank=16)
    none_kept = MemoryBudget(**{**vars(budget), "retained": 0})
    sizes = [gpu_memory(one, shape, 2, 4096, Tiers(0, E), None, FRAGMENTS).total for one in (none_kept, budget)]
    for module in ("packer", "choice"):
        monkeypatch.setattr(f"kt_hf.placement.{module}.free_device_memory", lambda _: sum(sizes) // 2)
    settings = KTConfig(kt_expert_placement={"resident": 0, "streamed": E}, kt_moe_lora_device="cpu")
    model = get_peft_model(apply_kt_moe(MIXTRAL(torch.bfloat16), settings), lora_config(MIXTRAL))
    packer = packer_of(model)
    assert packer is not None
    kept = lambda: [packer.retains(i) for i in (0, 1)]  # noqa: E731
    runners = lambda: [layer._runner.retain for layer in model.base_model.model._kt_wrappers]  # noqa: E731
    for length, expected in ((64, True), (1 << 20, False), (64, True)):
        args = TrainingArguments(
            str(tmp_path), report_to=[], per_device_train_batch_size=1, gradient_checkpointing=True
        )
        args.max_length = length
        KTMoECallback().on_init_end(args, TrainerState(), TrainerControl(), model=model, optimizer=None)
        del args
        assert kept() == runners() == [expected] * 2
