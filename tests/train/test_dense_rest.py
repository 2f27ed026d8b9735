"""`quantization_bit: 4` in a run: linear layers outside the experts in 4 bits, what is trained in fp32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kt_hf.train import run as run_module
from tests.support.train_runs import Runs, runs_in

pytest.importorskip("bitsandbytes")


def adapter(runs: Runs) -> dict[str, Tensor]:
    return load_file(next(iter(sorted(runs.out.rglob("adapter_model.safetensors"), key=lambda p: len(p.parts)))))


def finer_than_bf16(values: Tensor) -> bool:
    return not torch.equal(values, values.bfloat16().float())


def test_what_is_trained_stays_in_fp32(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL rounds it to bf16 where the base is quantized: steps of 1e-4 would be lost in values of 0.1."""
    made, kinds = run_module.load_model, []

    def watched(*args: object) -> object:
        model = made(*args)
        kinds.append({type(m).__name__ for n, m in model.named_modules() if n.endswith("q_proj")})
        return model

    monkeypatch.setattr(run_module, "load_model", watched)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    first = runs_in(tmp_path / "first", tiny_model, quantization_bit=4, learning_rate=1e-4, lora_target="all")
    first.again()
    assert kinds == [{"Linear4bit"}]
    trained = adapter(first)
    assert {value.dtype for value in trained.values()} == {torch.float32}
    for part in (".self_attn.", ".experts."):
        assert any(finer_than_bf16(value) for name, value in trained.items() if part in name and "lora_A" in name), part

    # Going on from an adapter: its values are those it was saved with, not rounded once.
    second = runs_in(
        tmp_path / "second", tiny_model, quantization_bit=4, learning_rate=1e-30, max_steps=1, lora_target="all",
        adapter_name_or_path=str(first.out),
    )  # fmt: skip
    second.again()
    again = adapter(second)
    assert again.keys() == trained.keys()
    assert all(torch.equal(value, trained[name]) for name, value in again.items())
