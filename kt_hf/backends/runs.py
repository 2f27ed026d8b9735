"""Runs of consecutive numbers, to copy several experts at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def runs(numbers: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Runs in ascending numbers: first, one past the last, and the first's place."""
    begin = 0
    for i in range(1, len(numbers) + 1):
        if i == len(numbers) or numbers[i] != numbers[i - 1] + 1:
            yield numbers[begin], numbers[i - 1] + 1, begin
            begin = i
