"""A tiny model in a folder, and an adapter of it whose answers differ from the model's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from kt_hf import KTConfig, apply_kt_moe, kt_lora_config
from tests.support.tiny import save_model


@dataclass(frozen=True)
class Trained:
    """Folders of a base model and of its adapter."""

    base: Path
    adapter: Path


def save_adapter(base: Path, folder: Path, seed: int = 0, target_modules: list[str] | None = None) -> Path:
    model = apply_kt_moe(AutoModelForCausalLM.from_pretrained(base), KTConfig(kt_backend="torch"))
    config = LoraConfig(r=4, target_modules=target_modules) if target_modules else kt_lora_config(model, 4)
    tuned = get_peft_model(model, config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    tuned.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    base = save_model(tmp_path_factory.mktemp("base"))
    return Trained(base, save_adapter(base, tmp_path_factory.mktemp("adapter")))
