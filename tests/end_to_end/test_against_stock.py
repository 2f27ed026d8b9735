"""A real model trained by kt_hf and by stock transformers + PEFT side by side: the same losses, step by step."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from PIL import Image

from kt_hf import apply_kt_moe, kt_lora_config
from kt_hf.builtin.smollm2_moe import load_dense, upcycle_model
from kt_hf.system.cpu import cpu_features

ROOT = Path(__file__).parents[2]


def curves(folder: Path, *options: str) -> list[dict[str, float]]:
    """A row of losses for each step, by `benchmarks/curves.py` with 128 tokens a step."""
    command = [sys.executable, ROOT / "benchmarks/curves.py", "--out", folder, "--tokens", "128", *options]
    environment = os.environ | {"OMP_WAIT_POLICY": "passive"}  # on busy cores threads that spin take ten times as long
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    with (folder / "curves.csv").open() as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_losses_of_twenty_steps_are_stocks(tmp_path: Path) -> None:
    """In bf16, where whoever computes rounds away what is small of LoRA; stock PEFT in bf16 differs by 0.018."""
    features = cpu_features()
    dtype = "bfloat16" if features.amx or features.avx512_bf16 else "float32"
    rows = curves(tmp_path, "--dtype", dtype)
    assert len(rows) == 20
    assert max(abs(row["auto"] - row["stock"]) for row in rows) <= 0.02
    assert rows[0]["stock"] - min(row["stock"] for row in rows[-4:]) >= 0.3
    assert len(Image.open(tmp_path / "curves.png").getcolors()) > 10  # of its palette: not a white page


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_losses_in_fp32_are_stocks_to_the_fifth_digit(tmp_path: Path) -> None:
    rows = curves(tmp_path, "--dtype", "float32", "--cases", "stock", "torch", "--steps", "4")
    assert len(rows) == 4
    assert max(abs(row["torch"] - row["stock"]) for row in rows) <= 2e-5
    assert rows[0]["stock"] - rows[-1]["stock"] >= 0.3


@pytest.mark.slow
def test_the_experts_lora_takes_part(tmp_path: Path) -> None:
    """Trained and frozen, with LoRA on attention in both: two curves."""
    dense, tokenizer = load_dense()
    ids = tokenizer("Experts are computed on the CPU, all the rest wherever it likes. " * 8, return_tensors="pt")

    def losses(frozen: bool) -> list[float]:
        torch.manual_seed(0)
        model = apply_kt_moe(upcycle_model(dense, num_layers=4, dtype="bfloat16"))
        model = get_peft_model(model, kt_lora_config(model))
        for name, parameter in model.named_parameters():
            if frozen and ".experts." in name:
                parameter.requires_grad_(False)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        found = []
        for _ in range(6):
            loss = model(**ids, labels=ids.input_ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    trained, frozen = losses(False), losses(True)
    assert trained[0] == pytest.approx(frozen[0], abs=1e-6)
    assert trained[-1] < frozen[-1] - 0.05 < frozen[0] - 0.05
