"""The number of PyTorch's threads, set for the duration of a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Let PyTorch compute by `count` threads inside the block, and by as many as before it afterwards.

    Args:
        count: The number of threads on the CPU (torch.set_num_threads); None changes nothing.
    """
    if count is None:
        yield
        return
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def quiet_torch(threads: int | None, autocast: list[str]) -> Iterator[None]:
    """Set PyTorch's number of threads, unless it is None, and switch autocast off, while this is open.

    Args:
        threads: How many; None leaves them.
        autocast: Kinds of device, "cpu" or "cuda".
    """
    with ExitStack() as stack:
        stack.enter_context(torch_threads(threads))
        for device in autocast:
            stack.enter_context(torch.autocast(device, enabled=False))
        yield
