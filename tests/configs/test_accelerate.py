"""The files of configs/accelerate start as many processes as they say, each of which knows which it is."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny import ROOT

FILES = {"one_process": 1, "two_cpu_processes": 2, "all_gpus": 2, "fsdp2": 2}
SCRIPT = """
import os, pathlib, sys
rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
pathlib.Path(sys.argv[1], rank).write_text(size)
"""
MEETING = """
import os, pathlib, sys
import torch.distributed as dist
from kt_hf.ranks import Ranks, current_world, of_all_ranks
dist.init_process_group("gloo")
world = current_world()
every = of_all_ranks(Ranks(world), lambda: world.rank)
pathlib.Path(sys.argv[1], str(world.rank)).write_text(str(world.size) if every == [0, 1] else repr(every))
dist.destroy_process_group()
"""


def test_all_files_are_tried() -> None:
    assert {path.stem for path in (ROOT / "configs/accelerate").glob("*.yaml")} == set(FILES)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "script"), [(name, SCRIPT) for name in FILES] + [("two_cpu_processes", MEETING)])
def test_a_file_starts_its_processes(name: str, script: str, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(script)
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port = opened.getsockname()[1]
    (tmp_path / "ranks").mkdir()
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", ROOT / f"configs/accelerate/{name}.yaml",
        "--main_process_port", str(port), tmp_path / "script.py", tmp_path / "ranks",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    written = {path.name: path.read_text() for path in (tmp_path / "ranks").iterdir()}
    assert written == {str(rank): str(FILES[name]) for rank in range(FILES[name])}
