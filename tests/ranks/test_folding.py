"""Accumulation folded into larger batches on ranks: one decision, the same rows and loss; memory that one lacks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kt_hf.backends.gpu.streamed import StreamedBackend
from kt_hf.ranks import Ranks
from kt_hf.train import trial_step
from kt_hf.train.folding_rules import Split, whole_batches
from tests.ranks.test_train import ADAPTER
from tests.support.ranks import on_ranks, results
from tests.support.tiny import save_model
from tests.train.test_folding_runs import LONG, STREAMED, Result, as_written, near, result_of, run, runs_in

ROWS = [{"instruction": f"{i} + {i}?", "output": f"It is {2 * i}."} for i in range(24)]


def on_two(
    folder: Path, model: Path, before: Callable[[int], None] = lambda rank: None, rows: Any = ROWS, **settings: Any
) -> Result:
    """A run of two ranks that take half of each step's rows; what rank 0 printed is in the result."""
    folder.mkdir()
    runs = runs_in(folder, model, rows, **STREAMED | {"gradient_accumulation_steps": 2, "max_length": 40} | settings)

    def work(rank: int) -> str:
        before(rank)
        runs.again()
        return runs.printed

    runs.printed = results(on_ranks(2, work, timeout=60))[0]
    assert (runs.out / ADAPTER).exists()
    return result_of(runs)


def test_the_end_of_an_epoch_keeps_its_rows() -> None:
    """Batches go to the processes in turn, and the last ones are filled up with rows of the begin."""

    class Args:
        max_steps, dataloader_drop_last = 0, False

    written = Split(1, 4)
    assert [rows for rows in range(1, 17) if whole_batches(Args, written, 2, rows, False, 2)] == [4, 8, 12, 16]
    Args.max_steps = 2
    assert whole_batches(Args, written, 2, 17, False, 2)
    assert not whole_batches(Args, written, 2, 15, False, 2)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_folded_run_is_the_run(
    stage: str, cpu_for_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [{"prompt": f"{i} + {i}?", "chosen": f" {2 * i}", "rejected": f" {i}, no"} for i in range(24)]
    settings = {"stage": stage, "rows": ROWS if stage == "sft" else pairs, "max_steps": 4}
    model = save_model(tmp_path / "model")
    folded = on_two(tmp_path / "folded", model, waiting, **settings)
    assert "1 x 2 rows a step are computed as 2 x 1" in folded.printed
    as_written(monkeypatch)
    written = on_two(tmp_path / "written", model, **settings)
    assert "not folded" in written.printed
    assert near(folded, written)
    if stage == "sft":
        one = run(tmp_path / "one", model, rows=ROWS, max_length=40, max_steps=4)
        assert near(folded, one)


def waiting(_: int) -> None:
    """Ranks that are to go on after one lacks memory look at each other at once, on GPUs too."""
    exchange = Ranks.rows_to_all

    def checked(ranks: Ranks, *given: Any) -> Any:
        assert ranks.patient
        return exchange(ranks, *given)

    Ranks.rows_to_all = checked  # type: ignore[method-assign]  # of this process, which ends with the test


def scarce(rank: int, where: str, monkeypatch: pytest.MonkeyPatch, skipped: int = 0) -> None:
    """Rank 1 has no memory for two rows (all are 40 tokens long, and layers have those of both ranks)."""
    left, forward, step = [skipped], StreamedBackend.forward, trial_step.try_step

    def check() -> None:
        left[0] -= 1
        if rank and left[0] < 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than there is.")

    def in_layer(self: Any, x: Any, *rest: Any) -> Any:
        if x.shape[0] > 80:
            check()
        return forward(self, x, *rest)

    def in_loss(trainer: Any, *rest: Any) -> Any:
        compute = trainer.compute_loss

        def outside(*args: Any, **kwargs: Any) -> Any:
            loss = compute(*args, **kwargs)
            check()
            return loss

        trainer.compute_loss = outside
        try:
            return step(trainer, *rest)
        finally:
            del trainer.compute_loss

    if where == "layer":
        monkeypatch.setattr(StreamedBackend, "forward", in_layer)
    else:
        monkeypatch.setattr("kt_hf.train.folding.try_step", in_loss)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["layer", "loss"])
def test_a_trial_that_one_rank_has_no_memory_for(
    where: str, cpu_for_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the others wait for it in a layer, or have gone on to their backward."""
    model = save_model(tmp_path / "model")
    refused = on_two(tmp_path / "refused", model, lambda rank: scarce(rank, where, monkeypatch), LONG)
    assert "2 x 1 ran out of memory" in refused.printed
    as_written(monkeypatch)
    written = on_two(tmp_path / "written", model, rows=LONG)
    assert refused.losses == written.losses


@pytest.mark.slow
@pytest.mark.parametrize("save_strategy", ["no", "steps"])
def test_memory_of_one_rank_that_runs_out_later(
    save_strategy: str, cpu_for_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All go on from the same checkpoint, or once more from the start, with smaller batches."""
    model, more = save_model(tmp_path / "model"), {"rows": LONG[:8] * 2, "save_strategy": save_strategy, "max_steps": 4}
    # Two layers: the calls of the trial and of two steps go well.
    halved = on_two(tmp_path / "halved", model, lambda rank: scarce(rank, "layer", monkeypatch, 6), **more)
    where = "from the start" if save_strategy == "no" else "checkpoint-2"
    assert "The GPU ran out of memory after step 2, in batches folded to 2 x 1" in halved.printed, halved.printed
    assert where in halved.printed
    as_written(monkeypatch)
    written = on_two(tmp_path / "written", model, **more)
    assert near(halved, written)
