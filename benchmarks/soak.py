"""Five hundred training steps: does resident memory stay flat, are file descriptors and threads constant?

    python benchmarks/soak.py [--steps 500] [--backend auto] [--out FOLDER]

A small Mixtral with LoRA on everything, a stock Trainer with gradient accumulation, batches of other lengths each step,
evaluation every fifty steps. Writes soak.csv and soak.png; ends with status 1 if memory of the last four fifths of the
steps varies by more than 0.5 %, or a descriptor or thread is gained. A hundred steps come before those that are
counted: till then PyTorch compiles products.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM, Trainer, TrainerCallback, TrainingArguments

from kt_hf import KTConfig, KTMoECallback, apply_kt_moe, kt_lora_config

_BEFORE = 100  # steps that are not counted


class Watch(TrainerCallback):
    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.process = psutil.Process()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step <= _BEFORE:
            return
        self.rows.append({
            "step": state.global_step - _BEFORE,
            "resident MiB": self.process.memory_info().rss / 2**20,
            "file descriptors": self.process.num_fds(),
            "threads": self.process.num_threads(),
        })  # fmt: skip


class Batches(torch.utils.data.Dataset):
    """Rows of one batch have one length, a multiple of 16 up to 128 tokens, the longest first.

    With any length, PyTorch's cache of compiled products grows for hundreds of steps, a little for each new one.
    """

    def __init__(self, batches: int, rows: int) -> None:
        generator = torch.Generator().manual_seed(0)
        lengths = [128, *(16 * torch.randint(1, 9, (batches - 1,), generator=generator)).tolist()]
        self.ids = [torch.randint(512, (n,), generator=generator) for n in lengths for _ in range(rows)]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def train(steps: int, backend: str, folder: str) -> list[dict[str, float]]:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    model = apply_kt_moe(MixtralForCausalLM(config).bfloat16(), KTConfig(kt_backend=backend))
    model = get_peft_model(model, kt_lora_config(model))
    watch = Watch()
    arguments = TrainingArguments(
        folder, max_steps=_BEFORE + steps, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=1e-4, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", logging_steps=50,
        eval_strategy="steps", eval_steps=50, train_sampling_strategy="sequential",
    )  # fmt: skip
    Trainer(
        model, arguments, train_dataset=Batches(2 * (_BEFORE + steps), 2), eval_dataset=Batches(4, 8),
        callbacks=[KTMoECallback(), watch],
    ).train()  # fmt: skip
    return watch.rows


def plot(rows: list[dict[str, float]], file: Path) -> None:
    from report.picture import plt, save

    figure, axes = plt.subplots(3, 1, figsize=(7, 6), sharex=True)
    for axis, name in zip(axes, [name for name in rows[0] if name != "step"], strict=True):
        values = [row[name] for row in rows]
        axis.plot([row["step"] for row in rows], values)
        axis.set(ylabel=name, ylim=(0, 1.1 * max(values)))
        axis.grid(alpha=0.3)
    axes[-1].set(xlabel="step")
    figure.tight_layout()
    save(figure, file, dpi=110)


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--steps", type=int, default=500)
    arguments.add_argument("--backend", default="auto")
    arguments.add_argument("--out", type=Path, default=Path("outputs/soak"))
    given = arguments.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        rows = train(given.steps, given.backend, folder)
    with (given.out / "soak.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, given.out / "soak.png")
    settled = rows[len(rows) // 5 :]
    memory = [row["resident MiB"] for row in settled]
    spread = max(memory) / min(memory) - 1
    gained = {name: settled[-1][name] - settled[0][name] for name in ("file descriptors", "threads")}
    print(f"{len(rows)} steps; of the last {len(settled)}: resident {min(memory):.0f} to {max(memory):.0f} MiB "
          f"({spread:.2%}), gained {gained}")  # fmt: skip
    return 0 if spread <= 0.005 and not any(gained.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
