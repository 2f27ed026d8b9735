"""`kt-hf quantize --to int4`: a checkpoint in compressed-tensors' layout, of the weights that the quantizer gives."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from typer.testing import CliRunner

from kt_hf import KTAMXConfigError, load_kt_model
from kt_hf.adapters import convert
from kt_hf.backends.packed import PackedMatrices
from kt_hf.backends.quantizer import quantized
from kt_hf.cli import app
from kt_hf.quantized.compressed import quantize_to_int4
from tests.support.cases import make_config
from tests.support.checkpoints import fuse, saved, set_config, tensors, write
from tests.support.models import FAMILIES
from tests.support.patched import fill_lora, logits_of, lora_config
from tests.support.tiered import streamed_parts

QWEN3 = FAMILIES["qwen3_moe"]


def widened(content: dict[str, Tensor], name: str) -> Tensor:
    codes = content[f"{name}.weight_packed"].view(torch.uint8)[None]
    return PackedMatrices("int4", codes, content[f"{name}.weight_scale"][None]).dequantized(torch.bfloat16)[0]


@pytest.mark.parametrize("layout", ["one file", "sharded", "fused"])
def test_the_experts_are_quantized_and_the_rest_is_copied(layout: str, tmp_path: Path) -> None:
    base = saved(QWEN3, tmp_path / "base", sharded=layout == "sharded")
    one_each = tensors(base)
    if layout == "fused":
        fuse(base, QWEN3(torch.bfloat16))
    (base / "notes.txt").write_text("kept")
    result = CliRunner().invoke(app, ["quantize", str(base), str(tmp_path / "out"), "--to", "int4"])
    assert result.exit_code == 0, result.output
    out = tensors(tmp_path / "out")
    assert (tmp_path / "out" / "notes.txt").read_text() == "kept"
    for name, tensor in one_each.items():
        if ".experts." not in name:
            assert torch.equal(out[name], tensor)
            continue
        module = name.removesuffix(".weight")
        assert name not in out
        assert out[f"{module}.weight_shape"].tolist() == list(tensor.shape)
        assert torch.equal(widened(out, module), quantized(tensor[None], "int4").dequantized(torch.bfloat16)[0])
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert "lm_head" in config["ignore"]
    assert "model.layers.0.self_attn.q_proj" in config["ignore"]
    assert not any(".experts." in name for name in config["ignore"])


@pytest.mark.skipif(importlib.util.find_spec("compressed_tensors") is None, reason="needs compressed-tensors")
def test_compressed_tensors_reads_it(tmp_path: Path) -> None:
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig

    quantize_to_int4(saved(QWEN3, tmp_path / "base"), tmp_path / "out")
    out = tensors(tmp_path / "out")
    described = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(described).config_groups["group_0"]
    module = "model.layers.0.mlp.experts.3.down_proj"
    state = {part: out[f"{module}.{part}"] for part in ("weight_packed", "weight_scale", "weight_shape")}
    theirs = PackedQuantizationCompressor.decompress(state, scheme)["weight"]
    assert torch.equal(theirs, widened(out, module))


def test_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, out = saved(QWEN3, tmp_path / "base"), tmp_path / "out"
    monkeypatch.setattr("shutil.copyfile", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        quantize_to_int4(base, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_what_is_refused(tmp_path: Path) -> None:
    base = saved(QWEN3, tmp_path / "base")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("")
    with pytest.raises(KTAMXConfigError, match="in use"):
        quantize_to_int4(base, tmp_path / "used")
    set_config(base, quantization_config={"quant_method": "fp8"})
    with pytest.raises(KTAMXConfigError, match="quantized already"):
        quantize_to_int4(base, tmp_path / "out")


@pytest.mark.usefixtures("cpu_for_gpu")
def test_it_is_loaded_as_it_was_quantized(tmp_path: Path) -> None:
    """Packed on the GPU, with the logits of `kt_expert_dtype: int4`."""
    base = saved(QWEN3, tmp_path / "base", sharded=True)
    quantize_to_int4(base, tmp_path / "out")
    place = {"resident": 2, "streamed": 3}
    model = load_kt_model(tmp_path / "out", make_config("torch", kt_expert_placement=place))
    own = load_kt_model(base, make_config("torch", kt_expert_placement=place, kt_expert_dtype="int4"))
    assert all(isinstance(part.weights.down, PackedMatrices) for part in streamed_parts(model))
    assert torch.equal(logits_of(model, QWEN3.inputs()), logits_of(own, QWEN3.inputs()))
    with pytest.raises(KTAMXConfigError, match="quantized already"):
        load_kt_model(tmp_path / "out", make_config("torch", kt_expert_dtype="int8"))


def test_merged_into_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Widened and merged in bf16, which is said: as merged into a checkpoint of the widened weights."""
    base = saved(QWEN3, tmp_path / "base", sharded=True)
    quantize_to_int4(base, tmp_path / "out")
    content = tensors(tmp_path / "out")
    wide = {
        name: widened(content, name.removesuffix(".weight")) if ".experts." in name else tensor
        for name, tensor in tensors(base).items()
    }
    plain = saved(QWEN3, tmp_path / "plain")
    write(plain, wide)
    model = get_peft_model(load_kt_model(plain, make_config("torch", kt_lora_rank=8)), lora_config(QWEN3))
    fill_lora(model, 4)
    model.save_pretrained(tmp_path / "adapter")
    for name in ("out", "plain"):
        convert(tmp_path / "adapter", tmp_path / f"merged-{name}", "merged", base=tmp_path / name)
    assert "widened, and the merged checkpoint is in bfloat16" in caplog.text
    merged, expected = tensors(tmp_path / "merged-out"), tensors(tmp_path / "merged-plain")
    assert merged.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in merged.items())
    assert "quantization_config" not in json.loads((tmp_path / "merged-out" / "config.json").read_text())
