"""A tiny base checkpoint, the models that are loaded from it, and what adapters on them are filled with."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from kt_hf import apply_kt_moe
from tests.support.cases import make_config
from tests.support.models import VOCAB, Family, expert_modules
from tests.support.patched import logits_of


def base_of(family: Family, folder: Path, tied: bool) -> Path:
    config = family.make_config()
    config.tie_word_embeddings = tied
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = family.model_class(config).float()
    for module in expert_modules(model).values():
        module.down_proj.data.mul_(2)  # so that the experts are to be seen in the logits
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.data.normal_(std=0.1)
    model.save_pretrained(folder)
    return folder


def loaded(base: Path, more_tokens: int = 0, patched: bool = True) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    if patched:
        model = apply_kt_moe(model, make_config("torch"))
    if more_tokens:
        torch.manual_seed(1)
        model.resize_token_embeddings(VOCAB + more_tokens)
    return model.eval()


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Other values for all that is trained, the same for the same name."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rng = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            value = torch.randn(parameter.shape, generator=rng) * 0.1
            parameter.copy_(value if "lora_" in name else parameter + value)


def difference(model: nn.Module, ids: Tensor, expected: Tensor) -> float:
    return float((logits_of(model, ids) - expected).abs().max() / expected.abs().max())
