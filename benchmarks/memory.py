"""What `kt-hf estimate` says against the peak memory of the run: `kt-hf train` on models of random weights.

python benchmarks/memory.py --write docs/memory.csv
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

SHARED = {
    "dataset": "data.jsonl", "output_dir": "out", "max_steps": 2, "save_strategy": "no", "logging_steps": 1,
    "torch_dtype": "bfloat16", "lora_rank": 8, "kt_num_threads": 1,
}  # fmt: skip
SMOL = {"model_name_or_path": "builtin:smollm2-moe", "max_length": 512, "per_device_train_batch_size": 1}
DEEPSEEK = {"model_name_or_path": "model", "max_length": 1024, "per_device_train_batch_size": 1}
CASES: dict[str, tuple[dict[str, Any], str | None]] = {
    "SmolLM2 as a Mixtral, 30 layers": (SMOL, None),
    "SmolLM2, not checkpointed": (SMOL | {"disable_gradient_checkpointing": True}, None),
    "DeepSeek-V2-Lite, 4 layers": (DEEPSEEK, "deepseek-ai/DeepSeek-V2-Lite-Chat"),
    "the same, backward weights shared": (
        DEEPSEEK | {"kt_share_backward_weights": True, "kt_expert_activations": "recompute"},
        "deepseek-ai/DeepSeek-V2-Lite-Chat",
    ),
}
LAYERS = {"deepseek-ai/DeepSeek-V2-Lite-Chat": 4}
MAKE = """
import sys, torch
from transformers import AutoConfig, AutoModelForCausalLM
config = AutoConfig.from_pretrained(sys.argv[1])
config.num_hidden_layers = int(sys.argv[2])
torch.set_default_dtype(torch.bfloat16)
model = AutoModelForCausalLM.from_config(config)
model.save_pretrained(sys.argv[3])
from tests.support.tiny import tokenizer
tokenizer().save_pretrained(sys.argv[3])
"""
ROOT = Path(__file__).parents[1]


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Estimated and measured peak of a case, in GiB."""
    settings, source = CASES[name]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    if source:
        config = ROOT / "tests/configs/models" / source
        command = [sys.executable, "-c", MAKE, str(config), str(LAYERS[source]), "model"]
        subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(SHARED | settings))
    row = json.dumps({"text": "The quick brown fox jumps over the lazy dog. " * 300})
    (folder / "data.jsonl").write_text((row + "\n") * 4)
    command = [sys.executable, "-m", "kt_hf.cli", "estimate", "run.yaml", "--json"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    estimate = json.loads(done.stdout)
    rest = estimate["host"]["attention, embeddings and the rest"]
    measured = _peak([sys.executable, "-m", "kt_hf.cli", "train", "run.yaml"], folder, environment, rest) / 2**30
    expected = estimate["host_total"] / 2**30
    error = expected / measured - 1
    parts = {part: round(size / 2**30, 2) for part, size in estimate["host"].items()}
    print(f"{name}: estimated {expected:.2f} GiB, measured {measured:.2f} GiB, {error:+.0%}  {parts}", flush=True)
    return {
        "case": name,
        "estimated_gib": f"{expected:.2f}",
        "measured_gib": f"{measured:.2f}",
        "error": f"{error:+.1%}",
    }


def _peak(command: list[str], folder: Path, environment: dict[str, str], rest: int) -> int:
    """The most memory the process had, in bytes, by samples.

    transformers keeps a weights file mapped as long as one of its tensors lives, and pages of experts that have been
    packed stay in memory until the system needs them. So of mapped pages only the libraries' count, and those of the
    `rest` bytes of weights that are in use.
    """
    most = mapped = 0
    with (folder / "log").open("w") as log:
        child = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
        process = psutil.Process(child.pid)
        libraries = 0
        while child.poll() is None:
            with contextlib.suppress(psutil.Error):
                info = process.memory_info()
                if not (folder / "out").exists():
                    libraries = max(libraries, min(info.shared, 2**29))
                mapped = max(mapped, info.shared)
                most = max(most, info.rss - info.shared)
            time.sleep(0.02)
    if child.returncode:
        raise SystemExit((folder / "log").read_text())
    return most + libraries + min(rest, mapped - libraries)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="cases whose name contains this")
    parser.add_argument("--write", type=Path, help="also write a CSV")
    options = parser.parse_args()
    rows = []
    for name in CASES:
        if not options.only or options.only in name:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(measure(name, Path(folder)))
    if options.write:
        with options.write.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
