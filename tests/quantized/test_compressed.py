"""`kt-hf quantize --to int4`: a checkpoint in compressed-tensors' layout, of the weights that the quantizer gives."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from kt_hf import KTAMXConfigError
from kt_hf.backends.packed import PackedMatrices
from kt_hf.backends.quantizer import quantized
from kt_hf.cli import app
from kt_hf.quantized.compressed import quantize_to_int4
from tests.support.checkpoints import fuse, saved, set_config, tensors
from tests.support.models import FAMILIES

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
