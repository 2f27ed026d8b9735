"""Checkpoints of the wide Mixtral, and what `kt-hf quantize` makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor

from kt_hf import KTConfig, apply_kt_moe
from kt_hf.quantized import MANIFEST
from kt_hf.tools.quantize import run
from tests.support.models import Family
from tests.support.patched import fill_lora, gradients_of, logits_of, lora_config, loss_of

BACKEND = {"int8": "AMXInt8", "int4": "AMXInt4"}


def save_checkpoint(folder: Path, family: Family, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Path:
    family(dtype, seed).save_pretrained(folder)
    return folder


def load(folder: Path, family: Family, dtype: torch.dtype = torch.bfloat16) -> Any:
    return family.model_class.from_pretrained(folder, dtype=dtype)


def quantised(checkpoint: Path, out: Path, to: str = "int8", **options: Any) -> Path:
    run(str(checkpoint), out, BACKEND[to], **options)
    return out


def settings(to: str = "int8", path: Path | None = None, **config: Any) -> KTConfig:
    return KTConfig(
        kt_backend=BACKEND[to], kt_num_threads=1, kt_weight_path=path, **{"kt_lora_rank": 8, **config}
    )  # fmt: skip


def results(model: Any, family: Family, config: KTConfig | None = None) -> dict[str, Tensor]:
    """Logits and all gradients of the model with an adapter whose values are always the same."""
    model = get_peft_model(apply_kt_moe(model, config) if config else model, lora_config(family))
    fill_lora(model, seed=1)
    ids = family.inputs()
    return {"logits": logits_of(model, ids), **gradients_of(model, loss_of(model, ids))}


def edit(folder: Path, **values: Any) -> None:
    """Write other values into the manifest."""
    file = folder / MANIFEST
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
