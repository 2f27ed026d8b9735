"""Stock SFTTrainer and DPOTrainer over random tokens, their steps timed one by one."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from card import Card
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from kt_hf import KTMoECallback, kt_lora_config
from kt_hf.placement import packer_of
from kt_hf.placement.promotion import Promotion

RANK = 16
Batch = dict[str, torch.Tensor]


def promotion_of(model: Any) -> Promotion | None:
    """What moves the layers of a patched model; None for a model that is not patched, or a placement that stays."""
    packer = packer_of(model)
    promotion = packer.promotion if packer else None
    memory = getattr(promotion, "_memory", None)
    if hasattr(memory, "promotion"):  # the scripted one
        memory.promotion = promotion  # type: ignore[union-attr]
    return promotion


def lora(model: Any, patched: bool, rank: int = RANK) -> LoraConfig:
    """LoRA on attention and every expert: kt_hf's for a patched model, else PEFT's on the experts' parameters."""
    if patched:
        return kt_lora_config(model, lora_rank=rank, lora_alpha=2 * rank, lora_target="all")
    return LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM",
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )  # fmt: skip


class Tokens:
    """A data collator that makes random rows of its own.

    Args:
        vocabulary: Tokens there are.
        length: Of the n-th training batch, or of all.
        evaluation: Of the rows of an evaluation.
        different: How many different training batches there are before they come again; 0 for no end.
    """

    def __init__(
        self, vocabulary: int, length: int | Callable[[int], int], evaluation: int = 0, different: int = 0
    ) -> None:
        self._vocabulary, self._evaluation, self._different = vocabulary, evaluation, different
        self._length = length if callable(length) else lambda _: length
        self._count = 0

    def __call__(self, rows: Sequence[dict[str, Any]]) -> Batch:
        if "evaluation" in rows[0]:
            return self.batch(len(rows), self._evaluation, 0)
        self._count += 1
        number = self._count % self._different if self._different else self._count
        return self.batch(len(rows), self._length(self._count), number)

    def batch(self, rows: int, length: int, number: int) -> Batch:
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(3, self._vocabulary, (rows, length), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


class Preferences(Tokens):
    """A data collator for DPO: twice as many rows, those preferred first, of which the second half is the answer."""

    def batch(self, rows: int, length: int, number: int) -> Batch:
        made = super().batch(2 * rows, length, number)
        made["completion_mask"] = made.pop("labels").new_zeros(2 * rows, length)
        made["completion_mask"][:, length // 2 :] = 1
        return made


@dataclass
class Step:
    """A step of an optimizer: its seconds, GB at its peak, and the layers held on the GPU."""

    seconds: float
    allocated_gb: float
    reserved_gb: float
    held: int


class Timer(TrainerCallback):
    """Times each step of a Trainer, after all other callbacks have had their turn."""

    def __init__(self, card: Card, model: Any) -> None:
        self.card, self.steps = card, list[Step]()
        self._promotion = promotion_of(model)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.card.synchronize()
        self._begin = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.card.synchronize()
        seconds = time.perf_counter() - self._begin
        held = len(self._promotion.held) if self._promotion else 0
        self.steps.append(Step(seconds, **self.card.peak(), held=held))


def summary(steps: Sequence[Step], tokens: int) -> dict[str, Any]:
    """Median seconds and the most memory of some steps."""
    step = statistics.median(s.seconds for s in steps)
    return {
        "step": step, "tokens_per_second": tokens / step, "steps": [round(s.seconds, 3) for s in steps],
        "allocated_gb": max(s.allocated_gb for s in steps), "reserved_gb": max(s.reserved_gb for s in steps),
        "held": steps[-1].held,
    }  # fmt: skip


def trainer_for(
    card: Card, model: Any, batch: int, tokens: Tokens, steps: int, callbacks: Sequence[Any] = (),
    patched: bool = True, adapt: bool = True, rank: int = RANK, **settings: Any,
) -> SFTTrainer | DPOTrainer:  # fmt: skip
    """A stock SFTTrainer, or a DPOTrainer for `Preferences`, bf16 and with gradient checkpointing.

    Its last callback is `timer`.

    Args:
        card: To train on.
        model: Of transformers, patched by kt_hf or not; with `adapt` false it has an adapter already.
        batch: Rows of a training batch; evaluations have twice as many.
        tokens: Makes the batches.
        steps: Of the optimizer.
        callbacks: Come between kt_hf's and the timer.
        patched: Whether kt_hf's callback and LoRA are taken.
        adapt: Whether the trainer adds the adapter.
        rank: Of the adapter.
        **settings: Of SFTConfig or DPOConfig, over these.
    """
    evaluated = 2 * batch if settings.get("eval_strategy") else 0
    rows = Dataset.from_dict({"input_ids": [[3, 4]] * (steps * batch)})
    evaluation = Dataset.from_dict({"input_ids": [[3, 4]] * evaluated, "evaluation": [1] * evaluated})
    arguments = {
        "output_dir": tempfile.mkdtemp(), "per_device_train_batch_size": batch, "max_steps": steps, "bf16": True,
        "per_device_eval_batch_size": 2 * batch, "gradient_checkpointing": True, "learning_rate": 1e-4, "seed": 0,
        "report_to": [], "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "use_cpu": card.tiny,
        "remove_unused_columns": False, "lr_scheduler_type": "constant",
    }  # fmt: skip
    how: dict[str, Any] = {
        "data_collator": tokens, "processing_class": _tokenizer(), "callbacks": [KTMoECallback()] if patched else [],
        "peft_config": lora(model, patched, rank) if adapt else None,
    }  # fmt: skip
    torch.manual_seed(0)
    if isinstance(tokens, Preferences):
        texts = Dataset.from_dict({name: ["<eos>"] * len(rows) for name in ("prompt", "chosen", "rejected")})
        trainer = DPOTrainer(model, args=DPOConfig(**arguments | settings), train_dataset=texts, **how)
    else:
        arguments["dataset_kwargs"] = {"skip_prepare_dataset": True}
        evaluation = evaluation if evaluated else None
        trainer = SFTTrainer(
            model, SFTConfig(**arguments | settings), train_dataset=rows, eval_dataset=evaluation, **how
        )
    trainer.remove_callback(PrinterCallback)
    trainer.timer = Timer(card, trainer.model)
    for callback in (*callbacks, trainer.timer):
        trainer.add_callback(callback)
    return trainer


def losses_of(trainer: SFTTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def _tokenizer() -> Any:
    words = models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
