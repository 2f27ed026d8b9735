"""What `load_kt_model` refuses for its arguments, and what it shows on a terminal."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from kt_hf import KTAMXConfigError, KTAMXModelNotSupportedError, load_kt_model
from tests.support.cases import KERNEL_MARKS, make_config
from tests.support.checkpoints import saved
from tests.support.helpers import MIXTRAL


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(MIXTRAL, tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("device_map", "auto"),
        ("device_map", {"": "cpu"}),
        ("max_memory", {0: "1GB"}),
        ("tp_plan", "auto"),
        ("state_dict", {}),
        ("gguf_file", "model.gguf"),
        ("variant", "fp16"),
        ("key_mapping", {"a": "b"}),
        ("output_loading_info", True),
    ],
)
def test_arguments_that_cannot_be_meant(name: str, value: Any, folder: Path) -> None:
    with pytest.raises(KTAMXConfigError, match=f"^{name}=.* cannot be given to load_kt_model: "):
        load_kt_model(folder, make_config("torch"), **{name: value})


@pytest.mark.parametrize("backend", [pytest.param(b, marks=KERNEL_MARKS) for b in ("AMXBF16", "auto")])
def test_the_operators_need_a_rank(backend: str, folder: Path) -> None:
    (folder / "model.safetensors").unlink()  # told before any file is looked for
    with pytest.raises(KTAMXConfigError, match=r"kt_lora_rank=None: .*Give KTConfig\(kt_lora_rank="):
        load_kt_model(folder, make_config(backend))


def test_several_processes_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(KTAMXConfigError, match="WORLD_SIZE=2, but RANK is not set"):
        load_kt_model(folder, make_config("torch"))


def test_no_such_model(tmp_path: Path) -> None:
    with pytest.raises(KTAMXConfigError, match="nobody/nothing"):
        load_kt_model("nobody/nothing", make_config("torch"))
    with pytest.raises(KTAMXConfigError, match=str(tmp_path)):
        load_kt_model(tmp_path, make_config("torch"))


def test_a_model_without_experts(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(KTAMXModelNotSupportedError, match="no routed experts"):
        load_kt_model(tmp_path, make_config("torch"))


@pytest.mark.parametrize("dtype", [torch.float64, "int8", "bf16"])
def test_a_dtype_experts_cannot_have(dtype: torch.dtype | str, folder: Path) -> None:
    with pytest.raises(KTAMXConfigError, match=f"dtype={dtype}: give bfloat16"):
        load_kt_model(folder, make_config("torch"), dtype=dtype)


def test_the_older_name_of_dtype(folder: Path) -> None:
    assert load_kt_model(folder, make_config("torch"), torch_dtype="float32").dtype is torch.float32


def test_a_terminal_is_shown_the_progress(folder: Path) -> None:
    seen = io.StringIO()
    console = Console(file=seen, force_terminal=True, width=120)
    load_kt_model(folder, make_config("torch"), console=console)
    assert "Loading the experts" in seen.getvalue()
    assert "2/2" in seen.getvalue()
    assert "GB/s" in seen.getvalue()


def test_a_file_is_not(folder: Path) -> None:
    seen = io.StringIO()
    load_kt_model(folder, make_config("torch"), console=Console(file=seen, width=120))
    assert seen.getvalue().strip() == ""
