"""Every family's files: adapters saved, loaded, exported and merged, checkpoints streamed by `load_kt_model`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from kt_hf import KTAMXError, apply_kt_moe, load_kt_model
from kt_hf.adapters import check_export, convert, load_adapter
from tests.families.test_families import EVERY, adapted, called, inputs_of
from tests.support.cases import make_config
from tests.support.families import tiny
from tests.support.reference import relative_error

# Their checkpoints' experts are made of others' in a way through which nothing can be merged: refused.
OWN_FORMAT = {"ernie4_5_vl_moe", "inkling2_loop"}
# Parts of the model have one another's weights, and LoRA each.
SHARED = {"diffusion_gemma"}
# Stock PEFT has nothing for LoRA of these experts by themselves, or loses its own adapters of the model as well.
_RENAMED = "does not find its own adapters of this model either"
NOT_IN_STOCK = {
    "dbrx": "one LoRA for all experts",
    "deepseek_ocr2": _RENAMED,
    "laguna": _RENAMED,
    "mistral_large4": _RENAMED,
    "unlimited_ocr": _RENAMED,
}
# Not streamed: from_pretrained and apply_kt_moe take them, and load_kt_model says so.
NOT_STREAMED = {
    "diffusion_gemma": "its weights tied to those of other experts",
    "ernie4_5_vl_moe": "by ErnieFuseAndSplitTextVisionExperts",
    "inkling2_loop": "by Inkling2LoopDequantizeExperts",
    "muse_spark": "a norm behind each expert",
}
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
    if family in SHARED:
        with pytest.raises(KTAMXError, match=r"has the weights of .* Load the adapter beside its base"):
            convert(tmp_path / "kt", tmp_path / "merged", to="merged", base=base)
        return
    if family in OWN_FORMAT:
        with pytest.raises(KTAMXError, match="save_original_format=False"):
            convert(tmp_path / "kt", tmp_path / "merged", to="merged", base=base)
        tiny(family).save_pretrained(base, save_original_format=False)
    convert(tmp_path / "kt", tmp_path / "merged", to="merged", base=base)
    check_export(tmp_path / "merged", tmp_path / "kt", base)
    merged = logits(stock_again(family, tmp_path / "merged"))
    assert relative_error(merged, wanted) < 1e-5


@every_family
def test_in_stock_peft(family: str, tmp_path: Path) -> None:
    """Exported, it computes the same there; and so it does read back onto a patched model."""
    model = adapted(family)
    wanted = logits(model)
    model.save_pretrained(tmp_path / "kt")
    base = saved(family, tmp_path / "base")
    if family in NOT_IN_STOCK:
        with pytest.raises(KTAMXError, match=f"{NOT_IN_STOCK[family]}.* Export it merged"):
            convert(tmp_path / "kt", tmp_path / "peft", to="peft", base=base)
        return
    exported = convert(tmp_path / "kt", tmp_path / "peft", to="peft", base=base)
    check_export(exported, tmp_path / "kt", base)
    stock = PeftModel.from_pretrained(tiny(family), exported).eval()
    assert relative_error(logits(stock), wanted) < 1e-5
    again = load_adapter(apply_kt_moe(tiny(family), make_config("torch")), exported).eval()
    assert relative_error(logits(again), wanted) < 1e-6


@pytest.mark.parametrize("family", ["gpt_oss", "llama4", "dbrx", "nemotron_h", "longcat_flash", "aria"])
def test_per_expert(family: str, tmp_path: Path) -> None:
    """However the model holds its experts, each one's A and B are the same matrices: there and back to the bit."""
    model = adapted(family)
    model.save_pretrained(tmp_path / "kt")
    check_export(convert(tmp_path / "kt", tmp_path / "each", to="per-expert"), tmp_path / "kt")
    convert(tmp_path / "each", tmp_path / "back", to="kt")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("kt", "back"))
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    one = next(name for name in before if name.endswith("experts.down_proj.lora_B.weight"))
    each = load_file(tmp_path / "each/adapter_model.safetensors")
    assert torch.equal(each[one.replace("experts.down", "experts.3.down")], before[one][3])


@every_family
def test_load_kt_model(family: str, tmp_path: Path) -> None:
    saved(family, tmp_path)
    if family in NOT_STREAMED:
        with pytest.raises(KTAMXError, match=f"{NOT_STREAMED[family]}.* Use from_pretrained and apply_kt_moe"):
            load_kt_model(tmp_path, make_config("torch"), dtype=torch.float32)
        model = apply_kt_moe(stock_again(family, tmp_path), make_config("torch"))
    else:
        model = load_kt_model(tmp_path, make_config("torch"), dtype=torch.float32).eval()
    assert relative_error(logits(model), logits(tiny(family))) < 1e-5


def test_experts_turned_as_on_the_hub(tmp_path: Path) -> None:
    """Qwen3-VL-MoE's are [in, out] there; transformers turns what has not the model's shape."""
    saved("qwen3_vl_moe", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if ".experts." in name]:
        tensors[name] = tensors[name].transpose(1, 2).contiguous()
    save_file(tensors, file, {"format": "pt"})
    model = load_kt_model(tmp_path, make_config("torch"), dtype=torch.float32).eval()
    assert relative_error(logits(model), logits(stock_again("qwen3_vl_moe", tmp_path))) < 1e-6
    assert relative_error(logits(model), logits(tiny("qwen3_vl_moe"))) < 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", "is missing: no tensor"),
        ("short", r"has the shape \[7, "),
        ("int8", "bfloat16, float16 and float32"),
    ],
)
def test_what_the_table_names_is_checked(change: str, message: str, tmp_path: Path) -> None:
    """Granite's experts, under names of their own: refused before anything is loaded."""
    saved("granitemoe", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors, name = load_file(file), "model.layers.1.block_sparse_moe.output_linear.weight"
    if change == "missing":
        del tensors[name]
    else:
        tensors[name] = tensors[name][:7].contiguous() if change == "short" else tensors[name].to(torch.int8)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(KTAMXError, match=message):
        load_kt_model(tmp_path, make_config("torch"), dtype=torch.float32)
