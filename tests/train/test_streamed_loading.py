"""`kt-hf train` streams the experts of safetensors checkpoints, and trains the same adapter as without."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

import kt_hf
from kt_hf import KTAMXError
from kt_hf.train.config.read import read_arguments
from kt_hf.train.run import run
from tests.support.checkpoints import SINGLE, edit
from tests.support.tiny import save_model, write_yaml


def trained(folder: Path, model: Path, backend: str, output: str, **settings: object) -> dict[str, Tensor]:
    """The adapter after two steps."""
    (folder / "data.jsonl").write_text('{"text": "The quick brown fox jumps over the lazy dog."}\n' * 8)
    file = write_yaml(
        folder / f"{output}.yaml",
        **{
            "model_name_or_path": str(model), "dataset": str(folder / "data.jsonl"), "output_dir": str(folder / output),
            "max_steps": 2, "max_length": 64, "per_device_train_batch_size": 2, "save_strategy": "no", "lora_rank": 4,
            "kt_backend": backend, "kt_num_threads": 1, "learning_rate": 1e-2, **settings,
        },
    )  # fmt: skip
    with (folder / "log").open("w") as log:
        run(read_arguments(file, ()), Console(file=log, width=200))
    return load_file(folder / output / "adapter_model.safetensors")


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The ranks of the calls of load_kt_model."""
    calls: list[object] = []
    load = kt_hf.load_kt_model

    def watched(path: object, cfg: kt_hf.KTConfig, **kwargs: object) -> object:
        calls.append(cfg.kt_lora_rank)
        return load(path, cfg, **kwargs)

    monkeypatch.setattr(kt_hf, "load_kt_model", watched)
    return calls


def test_the_same_adapter_as_without(
    backend: str, tmp_path: Path, streamed: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_model(tmp_path / "model")
    actual = trained(tmp_path, model, backend, "streamed")
    assert streamed == [4]
    monkeypatch.setattr("kt_hf.train.models._safetensors_folder", lambda *_: None)
    expected = trained(tmp_path, model, backend, "whole")
    assert streamed == [4]
    assert actual.keys() == expected.keys()
    assert any(".experts." in name and bool(tensor.any()) for name, tensor in actual.items() if "lora_B" in name)
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def test_a_rank_of_the_users_stays(tmp_path: Path, streamed: list[object]) -> None:
    trained(tmp_path, save_model(tmp_path / "model"), "auto", "out", kt_lora_rank=8)
    assert streamed == [8]


def test_without_experts_on_the_cpu_nothing_is_streamed(tmp_path: Path, streamed: list[object]) -> None:
    trained(tmp_path, save_model(tmp_path / "model"), "torch", "out", use_kt=False)
    assert streamed == []


def test_experts_under_unknown_names_are_refused(tmp_path: Path) -> None:
    """Neither transformers nor kt_hf would find them."""
    model = save_model(tmp_path / "model")

    def rename(content: dict[str, Tensor]) -> None:
        for name in list(content):
            content[name.replace(".experts.", ".specialists.")] = content.pop(name)

    edit(model, rename)
    with pytest.raises(KTAMXError, match=r"has no model\.layers\.0\.mlp\.experts\.down_proj"):
        trained(tmp_path, model, "torch", "out")


@pytest.mark.parametrize("use_kt", [True, False])
def test_random_experts_are_not_trained_on(use_kt: bool, tmp_path: Path) -> None:
    """transformers makes up what a checkpoint lacks, with a warning."""
    model = save_model(tmp_path / "model")

    def lose(content: dict[str, Tensor]) -> None:
        for name in [name for name in content if ".experts." in name]:
            del content[name]

    edit(model, lose)
    with pytest.raises(KTAMXError, match=r"has no model\.layers\.0\.mlp\.experts\.down_proj"):
        trained(tmp_path, model, "torch", "out", use_kt=use_kt)


def test_a_damaged_checkpoint_ends_the_run(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    (model / SINGLE).write_bytes((model / SINGLE).read_bytes()[:-100])
    with pytest.raises(KTAMXError, match=f"{model / SINGLE}.*it is truncated"):
        trained(tmp_path, model, "torch", "out")
    assert not (tmp_path / "out").exists()
