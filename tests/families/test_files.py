"""Every family's files: adapters saved, loaded, exported and merged, checkpoints streamed by `load_kt_model`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

from kt_hf import KTAMXError, apply_kt_moe, load_kt_model
from kt_hf.adapters import convert
from tests.families.test_families import EVERY, adapted, called, inputs_of
from tests.support.cases import make_config
from tests.support.families import tiny
from tests.support.reference import relative_error

# Their checkpoints' experts are made of others' in a way through which nothing can be merged: refused.
OWN_FORMAT = {"ernie4_5_vl_moe", "inkling2_loop"}
# Not streamed: from_pretrained and apply_kt_moe take them, and load_kt_model says so.
NOT_STREAMED = {
    "aria", "dbrx", "diffusion_gemma", "ernie4_5_vl_moe", "gpt_oss", "granitemoe", "granitemoehybrid",
    "granitemoeshared", "inkling2", "inkling2_loop", "llama4", "longcat_flash", "muse_spark", "nemotron_h",
    "qwen3_vl_moe", "step3p7",
}  # fmt: skip
every_family = pytest.mark.parametrize("family", EVERY)


def saved(family: str, folder: Path) -> Path:
    """The tiny model as transformers writes its family's checkpoints."""
    tiny(family).save_pretrained(folder)
    return folder


def stock_again(family: str, folder: Path) -> Any:
    kind = type(tiny(family))
    model, info = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return called(model, inputs_of(model))


@every_family
def test_adapters(family: str, tmp_path: Path) -> None:
    """Saved and loaded again, and merged into the checkpoint."""
    model = adapted(family)
    wanted = logits(model)
    model.save_pretrained(tmp_path / "kt")
    again = PeftModel.from_pretrained(apply_kt_moe(tiny(family), make_config("torch")), tmp_path / "kt").eval()
    assert relative_error(logits(again), wanted) < 1e-6
    base = saved(family, tmp_path / "base")
    if family in OWN_FORMAT:
        with pytest.raises(KTAMXError, match="save_original_format=False"):
            convert(tmp_path / "kt", tmp_path / "merged", to="merged", base=base)
        tiny(family).save_pretrained(base, save_original_format=False)
    convert(tmp_path / "kt", tmp_path / "merged", to="merged", base=base)
    merged = logits(stock_again(family, tmp_path / "merged"))
    assert relative_error(merged, wanted) < 1e-5


@every_family
def test_in_stock_peft(family: str, tmp_path: Path) -> None:
    model = adapted(family)
    wanted = logits(model)
    model.save_pretrained(tmp_path / "kt")
    base = saved(family, tmp_path / "base")
    exported = convert(tmp_path / "kt", tmp_path / "peft", to="peft", base=base)
    stock = PeftModel.from_pretrained(tiny(family), exported).eval()
    assert relative_error(logits(stock), wanted) < 1e-5


@every_family
def test_load_kt_model(family: str, tmp_path: Path) -> None:
    saved(family, tmp_path)
    if family in NOT_STREAMED:
        with pytest.raises(KTAMXError, match=r"[Uu]se from_pretrained and apply_kt_moe|is missing; nothing in"):
            load_kt_model(tmp_path, make_config("torch"), dtype=torch.float32)
        model = apply_kt_moe(stock_again(family, tmp_path), make_config("torch"))
    else:
        model = load_kt_model(tmp_path, make_config("torch"), dtype=torch.float32).eval()
    assert relative_error(logits(model), logits(tiny(family))) < 1e-5
