"""What the tests' writer says a stored weight is, is what the format's own library makes of it, to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support.low_bit_files import WAYS, Stored, int4


def weight() -> Tensor:
    return torch.randn(128, 256, generator=torch.Generator().manual_seed(1)).mul_(0.05)


@pytest.mark.parametrize("name", ["int4 group 32", "int4 group 128", "int4 zero-points", "int4 rows"])
def test_int4_of_compressed_tensors(name: str) -> None:
    base = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base")
    # It multiplies in the scales' dtype: of bf16, rounding is the same.
    parts, exact = int4(128)(weight()) if name == "int4 group 128" else WAYS[name].store(weight())
    assert torch.equal(_decompressed(base.PackedQuantizationCompressor, name, parts), exact)


def test_mxfp4_of_compressed_tensors() -> None:
    base = pytest.importorskip("compressed_tensors.compressors.mxfp4.base")
    parts, exact = WAYS["mxfp4 compressed"].store(weight())
    assert torch.equal(_decompressed(base.MXFP4PackedCompressor, "mxfp4 compressed", parts), exact)


def test_nvfp4_of_compressed_tensors() -> None:
    base = pytest.importorskip("compressed_tensors.compressors.nvfp4.base")
    parts, exact = WAYS["nvfp4 compressed"].store(weight())
    assert torch.equal(_decompressed(base.NVFP4PackedCompressor, "nvfp4 compressed", parts), exact)


def _decompressed(compressor: type, name: str, parts: dict[str, Tensor]) -> Tensor:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    scheme = quantization.QuantizationScheme(**WAYS[name].config["config_groups"]["group_0"])
    whole: Tensor = compressor.decompress(parts, scheme)["weight"]  # type: ignore[attr-defined]
    return whole.bfloat16()


@pytest.mark.parametrize("name", ["nf4", "nf4 nested"])
def test_nf4_of_bitsandbytes(name: str) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    parts, exact = WAYS[name].store(weight())
    saved = {part.removeprefix("weight."): value for part, value in parts.items() if part != "weight"}
    state = functional.QuantState.from_dict(saved, device=torch.device("cpu"))
    assert torch.equal(functional.dequantize_4bit(parts["weight"], state), exact)


def test_mxfp4_of_transformers_gpt_oss() -> None:
    """transformers has these experts transposed."""
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    parts, exact = _stack("mxfp4 gpt-oss")
    whole = mxfp4._convert_moe_packed_tensors(parts["blocks"], parts["scales"])
    assert torch.equal(whole.transpose(1, 2), exact)


def test_mxfp4_of_transformers_deepseek_v4() -> None:
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    parts, exact = WAYS["mxfp4 deepseek"].store(weight())
    assert torch.equal(fp8.Fp8Dequantize(None)._dequantize_one(parts["weight"], parts["scale"], torch.bfloat16), exact)


def _stack(name: str) -> Stored:
    return WAYS[name].store(torch.stack((weight(), -weight())))
