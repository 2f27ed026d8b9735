"""The stock Trainer on several ranks: as on one process, saved, resumed and told when something is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.rank_trainers import Trained, trained, trainer
from tests.support.ranks import joined, on_ranks, relative, results


def on(ranks: int, folder: Path, train: dict[str, Any] | None = None, **settings: Any) -> list[Trained]:
    work = lambda rank: trained(trainer(folder, ranks, **settings), **(train or {}))  # noqa: E731
    return results(on_ranks(ranks, work))


def compare(got: list[Trained], expected: Trained, lora: float = 5e-6) -> None:
    assert len(got[0].losses) == len(expected.losses)
    for mine, reference in ((got[0].losses, expected.losses), (got[0].norms, expected.norms)):
        worst = max(abs(a - b) / abs(b) for a, b in zip(mine, reference, strict=True))
        assert worst <= 1e-6, worst
    parameters = joined([rank.parameters for rank in got])  # replicated ones are equal to the bit
    worst_of = max((relative(parameters[name], value), name) for name, value in expected.parameters.items())
    assert worst_of[0] <= lora, worst_of


def test_two_ranks_train_as_one_process(tmp_path: Path) -> None:
    expected = trained(trainer(tmp_path / "one", 1, max_steps=4))
    assert max(expected.norms) > 0.5, "nothing is clipped"
    compare(on(2, tmp_path / "two", max_steps=4), expected)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_twenty_steps(ranks: int, tmp_path: Path) -> None:
    compare(on(ranks, tmp_path / "ranks"), trained(trainer(tmp_path / "one", 1)))
