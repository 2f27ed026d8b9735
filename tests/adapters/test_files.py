"""Files are closed again, and are what their names say."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file

from kt_hf import KTAMXError, verify_adapter
from tests.support.cases import KERNEL_BF16, TORCH_FP32
from tests.support.helpers import MIXTRAL
from tests.support.patched import patched_model
from tests.support.trainers import model_to_train, trainer_for

ADAPTER = "adapter_model.safetensors"


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="descriptors are counted in Linux's /proc")
def test_no_file_is_left_open(backend: str, tmp_path: Path) -> None:
    """Patching, packing, training, saving, checking and loading leave no file open."""
    case, counts = TORCH_FP32 if backend == "torch" else KERNEL_BF16, []
    for _ in range(3):
        model = model_to_train(case)
        trainer_for(model, tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
        verify_adapter(tmp_path / "checkpoint-1", model)
        PeftModel.from_pretrained(patched_model(MIXTRAL, case), tmp_path / "checkpoint-1")
        counts.append(descriptors())
    assert len(set(counts[1:])) == 1, counts


def test_a_pickle_called_safetensors_is_refused(tmp_path: Path) -> None:
    """Every file called .safetensors is one; a pickle under that name is an error."""
    model = model_to_train(TORCH_FP32)
    trainer_for(model, tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    files = list(tmp_path.rglob("*.safetensors"))
    assert files
    for file in files:
        with safe_open(file, framework="pt") as opened:
            assert opened.keys()
    state = {name: value.clone() for name, value in load_file(files[0]).items()}
    torch.save(state, files[0])
    with pytest.raises(KTAMXError, match="is longer"):
        PeftModel.from_pretrained(patched_model(MIXTRAL, TORCH_FP32), files[0].parent)
