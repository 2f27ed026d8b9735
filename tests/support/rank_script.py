"""Trains by the stock Trainer, and by a bare accelerate loop; started by torchrun or accelerate launch, or alone.

torchrun --nproc_per_node 2 tests/support/rank_script.py FOLDER
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from tests.support.cases import TORCH_FP32
from tests.support.helpers import MIXTRAL
from tests.support.patched import adapted_model
from tests.support.rank_trainers import padded, trained, trainer, unequal_rows
from tests.support.ranks import fill_whole


def bare_loop(folder: Path, ranks: int) -> tuple[list[float], list[float]]:
    """Losses, the mean of the ranks, and gradient norms of four steps."""
    accelerator = Accelerator(cpu=True)
    model = adapted_model(MIXTRAL, TORCH_FP32)
    fill_whole(model, 1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    rows = torch.utils.data.DataLoader(
        [{"input_ids": r["input_ids"][:5], "labels": r["labels"][:5]} for r in unequal_rows(16)],
        batch_size=4 // ranks, collate_fn=padded,
    )  # fmt: skip
    model, optimizer, rows = accelerator.prepare(model, optimizer, rows)
    losses, norms = [], []
    for batch in rows:
        loss = model(**batch).loss
        accelerator.backward(loss)
        norms.append(float(accelerator.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(accelerator.gather(loss.detach()[None]).mean()))
    accelerator.unwrap_model(model).save_pretrained(folder / "bare")
    return losses, norms


def main(folder: Path) -> None:
    ranks, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    run = trained(trainer(folder / "trainer", ranks, max_steps=5, save_strategy="steps", save_steps=5))
    torch.save((list(run), bare_loop(folder, ranks)), folder / f"{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
