"""What gradient accumulation is folded into larger batches, and what is left as it is written."""

from __future__ import annotations

import itertools
import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerControl, TrainerState
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from kt_hf import KTConfig, KTMoECallback, apply_kt_moe, kt_lora_config
from kt_hf.train.folding_rules import Split, draw_rows, padded_tokens, recorded, row_lengths, whole_batches, why_not
from kt_hf.train.trial_step import is_out_of_memory, leaves_room

NAMES = ("per_device_train_batch_size", "gradient_accumulation_steps")
LENGTHS = (5, 9, 3, 12, 7, 7, 30)
SFT_ROWS = [{"input_ids": list(range(n)), "labels": list(range(n))} for n in LENGTHS]
DPO_ROWS = [{"prompt": "a" * n, "chosen": "b" * n, "rejected": "c" * 2 * n} for n in LENGTHS]


def trainer_of(folder: Path, model: Path, stage: str = "sft", **settings: Any) -> Any:
    """TRL's, with LoRA on attention."""
    kind, config, rows = (DPOTrainer, DPOConfig, DPO_ROWS) if stage == "dpo" else (SFTTrainer, SFTConfig, SFT_ROWS)
    args = config(
        output_dir=str(folder), use_cpu=True, report_to="none", dataset_num_proc=None,
        **{"router_aux_loss_coef": 0.0, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4} | settings,
    )  # fmt: skip
    return kind(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=LoraConfig(r=1, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )


@pytest.mark.parametrize(
    ("stage", "settings", "words"),
    [
        ("sft", {}, None),
        ("sft", {"loss_type": "dft"}, None),
        ("sft", {"train_sampling_strategy": "group_by_length"}, None),
        ("sft", {"packing": True, "packing_strategy": "wrapped", "max_length": 16}, None),
        ("sft", {"packing": True, "max_length": 32}, "attention over the whole batch"),
        ("sft", {"router_aux_loss_coef": None}, "router_aux_loss_coef=0.001.*router_aux_loss_coef: 0"),
        ("sft", {"neftune_noise_alpha": 5.0}, "neftune_noise_alpha"),
        ("sft", {"full_determinism": True}, "full_determinism"),
        ("sft", {"auto_find_batch_size": True}, "auto_find_batch_size"),
        ("sft", {"train_sampling_strategy": "batch_rebalance"}, "batch_rebalance"),
        ("dpo", {}, None),
        ("dpo", {"loss_type": ["ipo", "sigmoid_norm"], "loss_weights": [1.0, 1.0]}, None),
        ("dpo", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 1.0]}, "loss_type=sft"),
        ("dpo", {"loss_type": ["aot"]}, "loss_type=aot"),
        ("dpo", {"router_aux_loss_coef": 0.01}, "router_aux_loss_coef=0.01"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else None,
)
def test_what_is_not_folded(
    stage: str, settings: dict[str, Any], words: str | None, tmp_path: Path, tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    # It would set PyTorch's algorithms for the whole process.
    monkeypatch.setattr("transformers.trainer.enable_full_determinism", lambda *_: None)
    reason = why_not(trainer_of(tmp_path, tiny_model, stage, **settings))
    assert reason is None if words is None else re.search(words, reason)


def test_a_loss_of_ones_own_is_not_folded(tmp_path: Path, tiny_model: Path) -> None:
    class Mine(SFTTrainer):
        pass

    trainer = trainer_of(tmp_path, tiny_model)
    trainer.compute_loss_func = lambda *_, **__: None
    assert "not TRL's own" in why_not(trainer)
    trainer.compute_loss_func = None
    trainer.__class__ = Mine
    assert "not TRL's own" in why_not(trainer)


def weights_of(rows: int, batch: int, steps: int, drop_last: bool, pairs: bool) -> list[list[tuple[int, float]]]:
    """(row, weight of its loss) of each step of an epoch, as the Trainer parts it."""
    batches = [list(range(i, min(i + batch, rows))) for i in range(0, rows, batch)]
    batches = [each for each in batches if len(each) == batch or not drop_last]
    result = []
    for i in range(0, len(batches), steps):
        step = batches[i : i + steps]
        whole = sum(map(len, step))
        result.append([(row, 1 / len(step) / len(b) if pairs else 1 / whole) for b in step for row in b])
    return result


def test_a_step_has_the_same_rows_and_weights() -> None:
    """Wherever `whole_batches` says so, and nowhere it does not: all small cases."""
    verdicts = set()
    for rows, batch, steps, drop_last, pairs in itertools.product(
        range(1, 26), (1, 2, 3), (2, 4, 6), (False, True), (False, True)
    ):
        for factor in (f for f in range(2, steps + 1) if steps % f == 0):
            args, written = SimpleNamespace(max_steps=-1, dataloader_drop_last=drop_last), Split(batch, steps)
            folded = written.folded(factor)
            one = weights_of(rows, batch, steps, drop_last, pairs)
            two = weights_of(
                rows, folded.per_device_train_batch_size, folded.gradient_accumulation_steps, drop_last, pairs
            )
            same = len(one) == len(two) and all(
                [r for r, _ in a] == [r for r, _ in b]
                and all(abs(x - y) < 1e-9 for (_, x), (_, y) in zip(a, b, strict=True))
                for a, b in zip(one, two, strict=True)
            )
            said = whole_batches(args, written, factor, rows, pairs)
            assert said <= same, (rows, batch, steps, factor, drop_last, pairs)
            if not (drop_last and pairs):  # of a last step with dropped rows it may say no too often
                assert said == same, (rows, batch, steps, factor, drop_last, pairs)
            verdicts.add((drop_last, pairs, said))
    assert verdicts == {*itertools.product((False, True), (False, True), (True,)), (False, True, False),
                        (True, False, False), (True, True, False)}  # fmt: skip


def test_epochs_that_do_not_end_have_no_last_step() -> None:
    args = SimpleNamespace(max_steps=2, dataloader_drop_last=True)
    assert whole_batches(args, Split(1, 4), 4, 8, True)
    assert not whole_batches(args, Split(1, 4), 4, 7, True)


def test_padding() -> None:
    lengths, order = np.array([4, 1, 3, 2, 10]), np.array([0, 1, 2, 3, 4])
    assert padded_tokens(lengths, [order], 1) == 20
    assert padded_tokens(lengths, [order], 2) == 2 * 4 + 2 * 3 + 10
    assert padded_tokens(lengths, [order[::-1]], 2) == 2 * 10 + 2 * 3 + 4
    assert padded_tokens(lengths, [order, order], 4, multiple=8) == 2 * (4 * 8 + 16)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_lengths_are_those_the_model_sees(stage: str, tmp_path: Path, tiny_model: Path) -> None:
    trainer = trainer_of(tmp_path, tiny_model, stage, max_length=20)
    rows = [trainer.data_collator([row]) for row in trainer.train_dataset]
    assert row_lengths(trainer).tolist() == [row["input_ids"].shape[1] for row in rows]


def test_rows_are_drawn_without_drawing_from_the_run(tmp_path: Path, tiny_model: Path) -> None:
    trainer = trainer_of(tmp_path, tiny_model, train_sampling_strategy="group_by_length")
    before = torch.get_rng_state()
    first, *_ = draw_rows(trainer)
    assert torch.equal(before, torch.get_rng_state())
    assert sorted(first) == list(range(len(LENGTHS)))
    assert (first == draw_rows(trainer)[0]).all()
    assert LENGTHS[first[0]] == 30, "not the sampler's order: it begins with the longest"


@pytest.mark.parametrize("folding", [None, 3, {"per_device_train_batch_size": 2}, dict.fromkeys(NAMES, 0)])
def test_a_record_without_a_split(folding: Any) -> None:
    assert recorded({"folding": folding}) is None
    assert recorded({}) is None


def test_factors() -> None:
    assert Split(2, 6).folded(3) == Split(6, 2)
    assert [Split(2, 6).factor_of(other) for other in (Split(2, 6), Split(12, 1), Split(4, 4), Split(3, 4))] == [
        1, 6, None, None,
    ]  # fmt: skip


def test_room() -> None:
    assert leaves_room(70, 80, 20)
    assert not leaves_room(76, 80, 20)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))
    assert not is_out_of_memory(RuntimeError("shapes"))
    assert not is_out_of_memory(MemoryError())


@pytest.mark.parametrize(("streamed", "steps"), [(4, 4), (4, 1), (0, 4)])
def test_a_script_is_told_once(
    streamed: int, steps: int, cpu_for_gpu: None, tmp_path: Path, tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    model = apply_kt_moe(model, KTConfig(kt_backend="torch", kt_expert_placement={"resident": 0, "streamed": streamed}))
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=2,
                     gradient_accumulation_steps=steps)  # fmt: skip
    callback = KTMoECallback()
    from peft import get_peft_model

    model = get_peft_model(model, kt_lora_config(model, lora_rank=1))
    with caplog.at_level(logging.INFO, logger="kt_hf"):
        for _ in range(2):
            callback.on_train_begin(args, TrainerState(), TrainerControl(), model=model)
    words = "per_device_train_batch_size=8, gradient_accumulation_steps=1 copies them once"
    assert caplog.text.count(words) == (streamed > 0 and steps > 1)
