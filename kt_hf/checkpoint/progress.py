"""The progress of loading, on a terminal: layers, GB/s, time left."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")


class LayersBar:
    """A bar that goes on by one a layer; silent where there is no terminal.

    Args:
        layers: How many there are.
        console: None means the standard error.
        title: What is done to them.
    """

    def __init__(self, layers: int, console: Console | None = None, title: str = "Loading the experts") -> None:
        console = console or Console(stderr=True)
        self._bytes = 0
        self._start = time.perf_counter()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("layers  {task.fields[rate]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._progress.add_task(title, total=layers, rate="")

    def advance(self, size: int) -> None:
        """A layer of `size` bytes in the files is done."""
        self._bytes += size
        rate = self._bytes / max(time.perf_counter() - self._start, 1e-9) / 1e9
        self._progress.update(self._task, advance=1, rate=f"{rate:.2f} GB/s")

    def each(self, layers: Iterable[T], sizes: Iterable[int]) -> Iterator[T]:
        """The layers, each of which counts as done when the next one is asked for.

        Args:
            layers: To be handed on.
            sizes: Bytes of each in the files.
        """
        for layer, size in zip(layers, sizes, strict=True):
            yield layer
            self.advance(size)

    def __enter__(self) -> LayersBar:
        self._start = time.perf_counter()
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
