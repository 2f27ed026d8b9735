"""Processes with a GPU each, connected by NCCL and gloo: CUDA cannot be forked, so each is a program of its own.

python -m tests.support.gpu_ranks FUNCTION RESULT ARGUMENTS, with a launcher's environment
"""

from __future__ import annotations

import datetime
import json
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.support.ranks import RanksFailed
from tests.support.tiny import ROOT

GPUS = torch.cuda.device_count()


def on_gpus(count: int, work: Callable[..., Any], timeout: float = 120, limit: float = 240, **arguments: Any) -> Any:
    """What `work(rank, **arguments)` returns or raises in each of `count` processes, None of one that was killed.

    Args:
        count: Of processes, each with the GPU of its number.
        work: A function at the top of a module.
        timeout: Seconds that a rank waits for another in an exchange.
        limit: Seconds after which the processes are ended.
        **arguments: Of `work`, as JSON has them.
    """
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port = opened.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{rank}.pickle" for rank in range(count)]
        children = []
        for rank, file in enumerate(files):
            name = f"{work.__module__}:{work.__name__}"
            command = [sys.executable, "-m", "tests.support.gpu_ranks", name, str(file), json.dumps(arguments)]
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "GROUP_RANK": 0}
            more = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "KT_TEST_TIMEOUT": timeout}
            environment = os.environ | {key: str(value) for key, value in (ranks | more).items()}
            children.append(subprocess.Popen(command, cwd=ROOT, env=environment))
        until = time.monotonic() + limit
        try:
            for child in children:
                child.wait(max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise RanksFailed(f"not ended after {limit} s") from None
        finally:
            for child in children:
                child.kill()
                child.wait()
        return [pickle.loads(file.read_bytes()) if file.exists() else None for file in files]


def main(function: str, result: str, arguments: str) -> None:
    module, _, name = function.partition(":")
    rank = int(os.environ["RANK"])
    torch.cuda.set_device(rank)
    timeout = datetime.timedelta(seconds=float(os.environ["KT_TEST_TIMEOUT"]))
    dist.init_process_group("cpu:gloo,cuda:nccl", timeout=timeout)
    torch.manual_seed(0)
    try:
        value = getattr(__import__(module, fromlist=[name]), name)(rank, **json.loads(arguments))
    except Exception as error:
        error.add_note(traceback.format_exc())
        value = error
    file = Path(result)
    file.with_suffix(".part").write_bytes(pickle.dumps(value))
    file.with_suffix(".part").rename(file)
    sys.stdout.flush()
    os._exit(0)  # a rank that has failed leaves a group that cannot be ended in order


if __name__ == "__main__":
    main(*sys.argv[1:])
