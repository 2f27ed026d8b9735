"""README's ten lines run as they stand, on a machine without a GPU."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from tests.support.tiny import ROOT, environment, save_model

NAME = "Qwen/Qwen3-30B-A3B"


def test_the_ten_lines_run_without_a_gpu(tmp_path: Path) -> None:
    """A tiny model stands where the hub's would be; nothing else is changed."""
    (program,) = re.findall(r"## Ten lines\n+```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    assert NAME in program
    program = program.replace(NAME, str(save_model(tmp_path / "model")))
    turns = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    (tmp_path / "conversations.jsonl").write_text(f"{json.dumps({'messages': turns})}\n" * 3)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment(tmp_path) | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "out").glob("checkpoint-*/adapter_model.safetensors"))
