"""The scripts of the stages run as they are, and unpatched without their three lines."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.support.tiny import ROOT, environment

ROWS = {
    "sft": {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]},
    "dpo": {
        "prompt": [{"role": "user", "content": "2+2?"}],
        "chosen": [{"role": "assistant", "content": "4"}],
        "rejected": [{"role": "assistant", "content": "5"}],
    },
    "grpo": {"prompt": [{"role": "user", "content": "2+2?"}], "answer": "4"},
}
ROWS["rm"] = ROWS["dpo"]
# Of a stage alone; the others have a limit of tokens.
OPTIONS = {"grpo": ["--num_generations", "2", "--max_completion_length", "4"]}


# A random model with its bytes for tokens, and the demo's with SmolLM2's tokenizer and chat template.
@pytest.mark.parametrize(
    ("stage", "patched", "model"),
    [
        pytest.param(stage, patched, model, marks=[] if number == 0 else [pytest.mark.slow])
        for number, (stage, patched, model) in enumerate(
            itertools.product(["sft", "dpo", "rm", "grpo"], [True, False], ["tiny_model", "demo_model"])
        )
    ],
)
def test_a_script_runs(stage: str, patched: bool, model: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    lines = (ROOT / "scripts" / f"{stage}.py").read_text().splitlines(keepends=True)
    assert sum(line.rstrip().endswith("# (kt_hf)") for line in lines) == 3
    if not patched:
        lines = [line for line in lines if not line.rstrip().endswith("# (kt_hf)")]
    assert ("import apply_kt_moe" in "".join(lines)) is False
    script = tmp_path / "script.py"
    script.write_text("".join(lines))
    (tmp_path / "data.jsonl").write_text((json.dumps(ROWS[stage]) + "\n") * 8)
    options = [
        "--model", str(request.getfixturevalue(model)), "--data", "data.jsonl", "--output_dir", "out",
        "--max_steps", "2", "--use_cpu", "--per_device_train_batch_size", "2",
        "--save_strategy", "no", *OPTIONS.get(stage, ["--max_length", "64"]),
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(script), *options], cwd=tmp_path, env=environment(tmp_path), capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as file:
        keys = list(file.keys())
    # Stock PEFT knows a Mixtral's experts by other names, and leaves them out.
    assert any(".experts.gate_proj.lora_A" in key for key in keys) == patched
    assert any(".q_proj.lora_A" in key for key in keys)
