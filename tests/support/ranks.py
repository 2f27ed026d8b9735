"""Several real processes on this machine that train one model together, connected by gloo.

They are forked from the test's process, which has imported everything already: 0.1 s instead of 10. Nothing of
kt-kernel may run in them, which refuses forks.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import os
import pickle
import signal
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kt_hf.experts.holders import ExpertLora

TIMEOUT = 20.0  # seconds that a rank waits for another: far more than any of these tests takes


Outcome = tuple[Exception | None, float]  # what a rank raised, and after how many seconds


class RanksFailed(AssertionError):
    """A rank raised what its test did not expect, or did not end."""


def on_ranks(
    count: int,
    work: Callable[[int], Any],
    timeout: float = TIMEOUT,
    limit: float = 120,
    connect: bool = True,
    hosts: int = 1,
    backend: str = "gloo",
) -> list[Any]:
    """What `work(rank)` returns on each of `count` forked processes; an exception it raises is returned in its place.

    Args:
        count: Of processes.
        work: Runs in each of them.
        timeout: Seconds that a rank waits for another in an exchange.
        limit: Seconds after which processes are ended that have not ended by themselves.
        connect: Whether torch.distributed is initialized for them.
        hosts: As many machines as they take themselves to be on, with `count / hosts` processes each.
        backend: That torch.distributed is initialized with.
    """
    with contextlib.suppress(ImportError):  # which PEFT imports, and takes seconds in each process
        importlib.import_module("bitsandbytes")
    with tempfile.TemporaryDirectory() as folder:
        children = [
            _start(rank, count, work, Path(folder), timeout, backend if connect else None, hosts)
            for rank in range(count)
        ]
        until, left = time.monotonic() + limit, dict(enumerate(children))
        while left and time.monotonic() < until:
            left = {rank: pid for rank, pid in left.items() if os.waitpid(pid, os.WNOHANG) == (0, 0)}
            time.sleep(0.01)
        for pid in left.values():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        if left:
            raise RanksFailed(f"ranks {sorted(left)} had not ended after {limit} s")
        files = [Path(folder) / f"{rank}.pickle" for rank in range(count)]
        return [pickle.loads(file.read_bytes()) if file.exists() else None for file in files]


def timed(work: Callable[[int], Any]) -> Callable[[int], Outcome]:
    """For `on_ranks`: what `work` raises on a rank, and after how many seconds."""

    def outcome(rank: int) -> Outcome:
        begin = time.perf_counter()
        try:
            work(rank)
        except Exception as error:
            error.__cause__ = None
            return error, time.perf_counter() - begin
        return None, time.perf_counter() - begin

    return outcome


def results(values: list[Any]) -> list[Any]:
    """The values that `on_ranks` returned, none of which may be an exception."""
    for rank, value in enumerate(values):
        if isinstance(value, Exception) or value is None:
            notes = "\n".join(getattr(value, "__notes__", []))
            raise RanksFailed(f"rank {rank}: {type(value).__name__}: {value}\n{notes}")
    return values


def _start(
    rank: int, count: int, work: Callable[[int], Any], folder: Path, timeout: float, backend: str | None, hosts: int
) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        torch.set_num_threads(1)
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank % (count // hosts))}
        os.environ |= {"LOCAL_WORLD_SIZE": str(count // hosts), "GROUP_RANK": str(rank // (count // hosts))}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        if backend is not None:
            dist.init_process_group(
                backend, init_method=f"file://{folder}/store", rank=rank, world_size=count,
                timeout=datetime.timedelta(seconds=timeout),
            )  # fmt: skip
        torch.manual_seed(0)
        try:
            value = work(rank)
        except Exception as error:
            error.add_note(traceback.format_exc())
            value = error
        _write(value, folder / f"{rank}.pickle")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _write(value: Any, file: Path) -> None:
    try:
        data = pickle.dumps(value)
    except Exception as error:
        data = pickle.dumps(RuntimeError(f"{type(value).__name__} cannot be sent: {error}; {value}"))
    temporary = file.with_suffix(".part")
    temporary.write_bytes(data)
    temporary.rename(file)


@torch.no_grad()
def fill_whole(model: nn.Module, seed: int, std: float = 0.1) -> None:
    """Random LoRA, the same for the same name whatever part of a tensor this rank owns."""
    holders = {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, ExpertLora)}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            holder = holders.get(name)
            shape = tuple(parameter.shape) if holder is None else holder.whole_shape
            rng = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
            values = torch.randn(shape, generator=rng) * std
            parameter.copy_(values if holder is None else holder.owned(values))


def is_owned(name: str) -> bool:
    return ".experts." in name and ".lora_" in name


def joined(parts: list[dict[str, Tensor]], hosts: int = 1) -> dict[str, Tensor]:
    """Of each rank's tensors by name: owned ones joined, the others as rank 0 has them, which all must have alike.

    Owned ones must be alike on all hosts.
    """
    owners = len(parts) // hosts
    for rank, part in enumerate(parts):
        for name, value in part.items():
            other = parts[rank % owners if is_owned(name) else 0][name]
            assert torch.equal(value, other), f"{name} differs between rank {rank} and another"
    return {n: torch.cat([part[n] for part in parts[:owners]]) if is_owned(n) else v for n, v in parts[0].items()}


def relative(a: Tensor, b: Tensor) -> float:
    """The norm of the difference of two tensors over that of the second."""
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-12))
