"""Checkpoints whose experts lie as the model's module has them, and MXFP4's: equal to what transformers loads."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from kt_hf import KTAMXError, KTAMXModelNotSupportedError, apply_kt_moe, load_kt_model
from kt_hf.checkpoint.as_module import ModuleTensors
from kt_hf.checkpoint.tensor_files import TensorFiles
from kt_hf.discovery import find_experts
from tests.support.cases import make_config
from tests.support.families import VOCAB, tiny

FAMILIES = ("gpt_oss", "dbrx", "llama4", "nemotron_h", "deepseek_v4", "gemma4", "longcat_flash", "minimax_m3_vl")


@pytest.mark.parametrize("family", FAMILIES)
def test_loaded_as_patched(family: str, tmp_path: Path) -> None:
    tiny(family).save_pretrained(tmp_path)
    model = type(tiny(family)).from_pretrained(tmp_path, dtype=torch.float32).eval()
    loaded = load_kt_model(tmp_path, make_config("torch"), dtype=torch.float32).eval()
    patched = apply_kt_moe(model, make_config("torch"))
    ids = torch.arange(18).view(2, 9) % VOCAB
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, patched(input_ids=ids).logits)
    for one, other in zip(loaded._kt_wrappers, patched._kt_wrappers, strict=True):
        assert torch.equal(one.base_fingerprint, other.base_fingerprint)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mxfp4_of_gpt_oss(dtype: torch.dtype, tmp_path: Path) -> None:
    """As transformers de-quantizes it, whole or with some experts left in four bits."""
    site = find_experts(tiny("gpt_oss", dtype))[0]
    E, H, I = site.form.num_experts, site.form.hidden_size, 64  # noqa: E741
    form = type(site.form)(**vars(site.form) | {"intermediate_size": I})
    stored = {}
    for name, rows, columns in (("gate_up_proj", 2 * I, H), ("down_proj", H, I)):
        stored[f"{name}_blocks"] = torch.randint(0, 256, (E, rows, columns // 32, 16), dtype=torch.uint8)
        stored[f"{name}_scales"] = torch.randint(118, 128, (E, rows, columns // 32), dtype=torch.uint8)
        stored[f"{name}_bias"] = torch.randn(E, rows).bfloat16()
    save_file({f"model.layers.0.mlp.experts.{n}": t for n, t in stored.items()}, tmp_path / "model.safetensors")
    files = TensorFiles(tmp_path).tensors
    module = ModuleTensors("experts", form, {name.rpartition(".")[2]: tensor for name, tensor in files.items()})
    wanted = {
        name: convert_moe_packed_tensors(stored[f"{name}_blocks"], stored[f"{name}_scales"], dtype=dtype)
        for name in ("gate_up_proj", "down_proj")
    }  # [E, in, out]
    gate_up = torch.cat([wanted["gate_up_proj"][..., 0::2], wanted["gate_up_proj"][..., 1::2]], 2).transpose(1, 2)
    down = wanted["down_proj"].transpose(1, 2)
    whole = module.read(dtype)
    assert torch.equal(whole.gate_up, gate_up)
    assert torch.equal(whole.down, down)
    bias = stored["gate_up_proj_bias"].to(dtype)
    assert whole.gate_up_bias is not None
    assert torch.equal(whole.gate_up_bias, torch.cat([bias[:, ::2], bias[:, 1::2]], 1))
    part = module.read(dtype, [1, 4])
    rest = [e for e in range(E) if e not in (1, 4)]
    assert part.low_bit is not None
    assert torch.equal(part.gate_up, gate_up[rest])
    assert torch.equal(part.low_bit.gate_up.dequantized(dtype), gate_up[[1, 4]])
    assert torch.equal(part.low_bit.down.dequantized(dtype), down[[1, 4]])


def in_mxfp4(folder: Path) -> None:
    """A checkpoint as it is on the hub, `packed`, and the same with its weights written out, `wide`."""
    model = tiny("gpt_oss", torch.bfloat16)
    tensors, packed = dict(model.state_dict()), {}
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        E, columns, rows = tensors[name].shape
        blocks = torch.randint(0, 256, (E, rows, columns // 32, 16), dtype=torch.uint8)
        scales = torch.randint(120, 124, (E, rows, columns // 32), dtype=torch.uint8)
        tensors[name] = convert_moe_packed_tensors(blocks, scales).contiguous()
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    for name, some in (("wide", tensors), ("packed", {n: t for n, t in tensors.items() if f"{n}_blocks" not in packed} | packed)):  # fmt: skip # noqa: E501
        (folder / name).mkdir()
        save_file({name: t.contiguous() for name, t in some.items()}, folder / name / "model.safetensors", {"format": "pt"})  # fmt: skip # noqa: E501
        config = copy.deepcopy(model.config)
        config.architectures = ["GptOssForCausalLM"]
        if name == "packed":
            config.quantization_config = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
        config.save_pretrained(folder / name)


def test_load_kt_model_of_mxfp4(tmp_path: Path) -> None:
    in_mxfp4(tmp_path)
    loaded = [
        load_kt_model(tmp_path / name, make_config("torch", kt_lora_rank=4)).eval() for name in ("wide", "packed")
    ]
    ids = torch.arange(18).view(2, 9) % VOCAB
    with torch.no_grad():
        assert torch.equal(*(one(input_ids=ids).logits for one in loaded))


def test_scales_that_are_no_numbers_are_refused_before_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_mxfp4(tmp_path)
    file = tmp_path / "packed" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("layers.1.mlp.experts.down_proj_scales"))
    tensors[name][3, 2, 0] = 255
    save_file(tensors, file, {"format": "pt"})
    monkeypatch.setattr(ModuleTensors, "read", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(KTAMXError, match=r"layers\.1\.mlp\.experts\.down_proj_scales .* not a finite number"):
        load_kt_model(tmp_path / "packed", make_config("torch", kt_lora_rank=4))


@pytest.mark.parametrize("name", ["down_proj_bias", "gate_up_proj"])
def test_a_missing_tensor_is_named(name: str, tmp_path: Path) -> None:
    tiny("gpt_oss").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {key: value for key, value in load_file(file).items() if not key.endswith(f"layers.1.mlp.experts.{name}")}
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(KTAMXError, match=rf"layers\.1\.mlp\.experts\.{name} is missing"):
        load_kt_model(tmp_path, make_config("torch"))


def test_another_shape_is_refused(tmp_path: Path) -> None:
    tiny("gpt_oss").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith("experts.gate_up_proj"))
    tensors[key] = tensors[key].transpose(1, 2).contiguous()
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(KTAMXError, match=r"has the shape \[8, \d+, 64\]; by the model's config it is \[8, 64, \d+\]"):
        load_kt_model(tmp_path, make_config("torch"))


def test_a_norm_behind_experts_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    tiny("muse_spark").save_pretrained(tmp_path)
    with pytest.raises(KTAMXModelNotSupportedError, match="a norm behind each expert"):
        load_kt_model(tmp_path, make_config("torch"))
