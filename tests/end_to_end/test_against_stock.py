"""A real model trained by kt_hf and by stock transformers + PEFT side by side: the same losses, step by step."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from kt_hf.cpu import cpu_features

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_losses_of_twenty_steps_are_stocks(tmp_path):
    features = cpu_features()
    dtype = "bfloat16" if features.amx or features.avx512_bf16 else "float32"
    command = [sys.executable, ROOT / "benchmarks/curves.py", "--out", tmp_path, "--dtype", dtype, "--tokens", "128"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-2000:]
    with (tmp_path / "curves.csv").open() as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    assert len(rows) == 20
    assert max(abs(row["auto"] - row["stock"]) for row in rows) <= 0.02
    assert rows[0]["stock"] - min(row["stock"] for row in rows[-4:]) >= 0.3
    assert (tmp_path / "curves.png").stat().st_size > 10_000
