"""DeepSeek-V4 as its hub has it, beside transformers: names, FP8 with scales of powers of two, experts of MXFP4."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, DeepseekV4ForCausalLM, FineGrainedFP8Config

from kt_hf import load_kt_model
from tests.support.cases import make_config
from tests.support.checkpoints import set_config, tensors, write
from tests.support.families import VOCAB, tiny
from tests.support.low_bit_files import mxfp4_of_deepseek_v4
from tests.support.reference import relative_error

BLOCK = 128
EIGHT_BITS = re.compile(r"\.(attn\.w(q_a|q_b|kv|o_a|o_b)|shared_experts\.w[123])\.weight$")
QUANTIZATION = {
    "quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}  # fmt: skip


def fp8(weight: Tensor) -> dict[str, Tensor]:
    """A scale of a block of 128 x 128, neighbors' a power of two apart."""
    blocks = [-(-size // BLOCK) for size in weight.shape]
    exponents = 119 + torch.arange(blocks[0])[:, None] % 2 + torch.arange(blocks[1]) % 2
    wide = torch.exp2(exponents - 127.0).repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    values = (weight.float() / wide[: weight.shape[0], : weight.shape[1]]).to(torch.float8_e4m3fn)
    return {"weight": values, "scale": exponents.to(torch.uint8).view(torch.float8_e8m0fnu)}


def hub_name(name: str) -> str:
    """DeepSeek's own: no prefix, `embed`, `hc_head_fn`."""
    name = name.removeprefix("model.").replace("embed_tokens.", "embed.")
    return name.replace("hc_head.hc_", "hc_head_")


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    tiny("deepseek_v4", torch.bfloat16).save_pretrained(tmp_path)
    content: dict[str, Tensor] = {}
    for name, tensor in tensors(tmp_path).items():
        name, parts = hub_name(name), None
        if ".experts." in name:
            parts = mxfp4_of_deepseek_v4(tensor)[0]
        elif EIGHT_BITS.search(name):
            parts = fp8(tensor)
        changed = {name.removesuffix("weight") + part: value for part, value in (parts or {}).items()}
        content |= changed or {name: tensor}
    assert sum(value.dtype == torch.int8 for value in content.values()) == 3 * 8 * 3
    assert sum(value.dtype == torch.float8_e4m3fn for value in content.values()) == 3 * 8
    write(tmp_path, content)
    set_config(tmp_path, quantization_config=QUANTIZATION, expert_dtype="fp4")
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"] == QUANTIZATION
    return tmp_path


def dequantized(folder: Path) -> DeepseekV4ForCausalLM:
    """By transformers."""
    stored = FineGrainedFP8Config(**{k: v for k, v in QUANTIZATION.items() if k != "quant_method"}, dequantize=True)
    config = AutoConfig.from_pretrained(folder)
    model, info = DeepseekV4ForCausalLM.from_pretrained(
        folder, config=config, quantization_config=stored, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not info["missing_keys"]
    return model.eval()


@pytest.mark.slow
def test_equal_to_what_transformers_widens(hub: Path) -> None:
    """Every parameter outside the experts to the bit; the logits in fp32."""
    expected = dequantized(hub)
    model = load_kt_model(hub, make_config("torch"), dtype=torch.bfloat16).eval()
    parameters = dict(expected.named_parameters())
    ours = {name: p for name, p in model.named_parameters() if name in parameters}
    assert len(parameters) - len(ours) == 2 * 3
    assert all(torch.equal(p, parameters[name]) for name, p in ours.items())
    ids = torch.randint(VOCAB, (2, 12), generator=torch.Generator().manual_seed(5))
    wide = load_kt_model(hub, make_config("torch"), dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = expected.float()(input_ids=ids).logits
        assert relative_error(wide(input_ids=ids).logits, wanted) < 2e-6
        plain = tiny("deepseek_v4")(input_ids=ids).logits
    assert relative_error(wanted, plain) > 0.01
