"""A rank killed while the ranks save: the last complete checkpoint is there, and none that loads but is wrong."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from kt_hf.adapters import check_checkpoint, last_complete
from kt_hf.errors import KTAMXError
from tests.support.killed import ADAPTER, Killer, checkpoints, same
from tests.support.rank_trainers import trained, trainer
from tests.support.ranks import on_ranks, results

STEPS, KILLS = 3, 30


def train(folder: Path, resume: Any = None) -> None:
    of = trainer(
        folder, 2, fill=resume is None, max_steps=STEPS, save_strategy="steps", save_steps=1, save_total_limit=1
    )
    trained(of, resume_from_checkpoint=resume)


def run(folder: Path, victim: int, at: int, log: Path) -> list[Any]:
    """What the ranks give, None for one that was killed, of a run in which `victim` is killed at its point `at`."""

    def work(rank: int) -> bool:
        if rank == victim:
            Killer(at, log).install(folder)
        train(folder)
        return True

    return on_ranks(2, work)


def examine(folder: Path, golden: Path) -> Path | None:
    """Each checkpoint is complete and as the uninterrupted run saved it, or refused: at most the newest is."""
    usable, refused = [], []
    for path in checkpoints(folder) if folder.exists() else []:
        try:
            check_checkpoint(path)
        except KTAMXError:
            refused.append(path)
            continue
        assert same(load_file(path / ADAPTER), load_file(golden / path.name / ADAPTER)), f"{path}: other LoRA"
        usable.append(path)
    last = last_complete(folder) if folder.exists() else None
    assert last == (usable[-1] if usable else None)
    assert len(refused) <= 1
    assert usable or not refused or refused[0].name == "checkpoint-1", "what was complete is lost"
    return last


@pytest.mark.slow
def test_thirty_kills_of_a_random_rank(tmp_path: Path) -> None:
    golden, rng, resumed = tmp_path / "golden", random.Random(0), 0

    def all_steps(rank: int) -> bool:
        trained(trainer(golden, 2, max_steps=STEPS, save_strategy="steps", save_steps=1, save_total_limit=None))
        return True

    results(on_ranks(2, all_steps))
    points = []
    for rank in range(2):
        log = tmp_path / f"points-{rank}"
        assert run(tmp_path / f"count-{rank}", rank, 0, log) == [True, True]
        points.append(log.read_text().splitlines())
    for index in range(KILLS):
        victim = rng.randrange(2)
        at = rng.randrange(1, len(points[victim]) + 1)
        folder = tmp_path / f"kill-{index}"
        values = run(folder, victim, at, tmp_path / "log")
        where = f"rank {victim} killed at {points[victim][at - 1]}"
        assert values[victim] is None, where
        other = values[1 - victim]
        # True: it had done all before it could have noticed.
        named = isinstance(other, KTAMXError) and f"for rank {victim}, which has ended" in str(other)
        assert other is True or named, f"{where}: {other!r}"
        try:
            last = examine(folder, golden)
        except AssertionError as error:
            raise AssertionError(f"{where}: {error}") from error
        if last is not None and last.name != f"checkpoint-{STEPS}" and index % 3 == 0:
            resumed += 1
            results(on_ranks(2, lambda rank, last=last, folder=folder: train(folder, str(last)) or True))
            final = f"checkpoint-{STEPS}"
            assert same(load_file(folder / final / ADAPTER), load_file(golden / final / ADAPTER)), where
    assert resumed
