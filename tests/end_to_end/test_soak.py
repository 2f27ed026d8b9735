"""Five hundred steps leave memory, file descriptors and threads as they were."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_five_hundred_steps(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "benchmarks/soak.py", "--out", tmp_path]
    environment = os.environ | {"OMP_WAIT_POLICY": "passive"}  # on busy cores threads that spin take ten times as long
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    print(done.stdout[-500:])
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-2000:]
    with (tmp_path / "soak.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 500
    assert len(Image.open(tmp_path / "soak.png").getcolors()) > 10  # of its palette: not a white page
