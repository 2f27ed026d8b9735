"""What a checkpoint may look like: fused or one tensor an expert, any floating dtype, 8 bits with scales, odd names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from kt_hf import KTAMXConfigError, apply_kt_moe, load_kt_model
from kt_hf.checkpoint import ExpertCheckpoint
from tests.support.cases import Case, make_config
from tests.support.checkpoints import EIGHT_BITS, edit, fuse, make_8_bits, saved, set_config, tensors, write
from tests.support.layers import RANK
from tests.support.models import FAMILIES, Family, base_weights
from tests.support.patched import logits_of
from tests.support.reference import experts_forward, relative_error

V3 = FAMILIES["deepseek_v3"]
QWEN3 = FAMILIES["qwen3_moe"]
BLOCK = (32, 16)  # the tiny model's stand-in for 128 × 128: some matrices have smaller blocks at their edges


def experts_of(folder: Path, dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    checkpoint = ExpertCheckpoint(folder, AutoConfig.from_pretrained(folder))
    found = {layer: checkpoint.read(layer, dtype) for layer in checkpoint.layers}
    return {layer: (weights.gate_up, weights.down) for layer, weights in found.items()}


def same_logits(folder: Path, family: Family, case: Case, dtype: torch.dtype | str) -> None:
    config = make_config(case.backend, kt_lora_rank=RANK)
    stock = apply_kt_moe(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), config)
    model = load_kt_model(folder, config, dtype=dtype)
    assert model.dtype is stock.dtype
    assert torch.equal(logits_of(model, family.inputs()), logits_of(stock, family.inputs()))


def test_fused(family: Family, case: Case, tmp_path: Path) -> None:
    fuse(saved(family, tmp_path, case.dtype), family(case.dtype))
    same_logits(tmp_path, family, case, case.dtype)


@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float16, torch.float32, "auto"], ids=str)
@pytest.mark.parametrize("source", [torch.float16, torch.float32], ids=str)
def test_other_dtypes(source: torch.dtype, wanted: torch.dtype | str, case: Case, tmp_path: Path) -> None:
    """Rounded once, to the model's dtype, as transformers does."""
    family = QWEN3
    family(torch.float32).to(source).save_pretrained(tmp_path)
    same_logits(tmp_path, family, case, wanted)


def test_dtypes_may_differ_between_experts(tmp_path: Path) -> None:
    saved(QWEN3, tmp_path, torch.float32)

    def change(content: dict[str, Tensor]) -> None:
        for name in content:
            if ".experts.3." in name or ".up_proj" in name:
                content[name] = content[name].half()
            elif ".experts.5." in name:
                content[name] = content[name].bfloat16()

    edit(tmp_path, change)
    content = tensors(tmp_path)
    for layer, (gate_up, down) in experts_of(tmp_path, torch.bfloat16).items():
        for expert in range(QWEN3.num_experts):
            gate, up = gate_up[expert].chunk(2)
            for actual, name in ((gate, "gate_proj"), (up, "up_proj"), (down[expert], "down_proj")):
                assert torch.equal(actual, content[f"{layer}.{expert}.{name}.weight"].bfloat16())


def test_a_base_model_without_its_head(tmp_path: Path) -> None:
    """Saved by the class without a head, the names lack their `model.`."""
    model = QWEN3(torch.bfloat16)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "whole")
    model.model.save_pretrained(tmp_path / "base")
    assert not any(name.startswith("model.") for name in tensors(tmp_path / "base"))
    whole = load_kt_model(tmp_path / "whole", make_config("torch"))
    base = load_kt_model(tmp_path / "base", make_config("torch"))
    assert torch.equal(logits_of(whole, QWEN3.inputs()), logits_of(base, QWEN3.inputs()))


def test_layers_the_model_does_not_have_are_left_out(tmp_path: Path) -> None:
    """DeepSeek-V3 comes with a layer for multi-token prediction."""
    saved(V3, tmp_path)
    extra = {n.replace("layers.2.", "layers.61."): t for n, t in tensors(tmp_path).items() if "layers.2." in n}
    edit(tmp_path, lambda content: content.update(extra))
    same_logits(tmp_path, V3, Case("torch", torch.bfloat16, 0, 0, 0), torch.bfloat16)


@pytest.mark.parametrize("kind", EIGHT_BITS)
def test_8_bits_are_dequantised(kind: str, case: Case, tmp_path: Path) -> None:
    """Experts, shared experts, attention: against weights de-quantised by this test, exactly; and near the original."""
    folder, plain = saved(V3, tmp_path / "fp8"), saved(V3, tmp_path / "plain")
    original = base_weights(V3(torch.float32))
    exact = make_8_bits(folder, BLOCK, kind)
    write(plain, {name: tensor.to(case.dtype) for name, tensor in exact.items()})
    config = make_config(case.backend, kt_lora_rank=RANK)
    expected = apply_kt_moe(AutoModelForCausalLM.from_pretrained(plain, dtype=case.dtype), config)
    actual = load_kt_model(folder, config, dtype=case.dtype)
    assert actual.dtype is case.dtype
    assert getattr(actual.config, "quantization_config", None) is None
    assert torch.equal(logits_of(actual, V3.inputs()), logits_of(expected, V3.inputs()))
    parameters = dict(expected.named_parameters())
    assert all(torch.equal(parameter, parameters[name]) for name, parameter in actual.named_parameters())
    for layer, base in zip(actual._kt_wrappers, original.values(), strict=True):
        x, ids = torch.randn(32, V3.hidden), torch.arange(32)[:, None].repeat(1, 1) % V3.num_experts
        weights = torch.ones(32, 1)
        output = layer(x.to(case.dtype), ids, weights)
        assert 0.003 < relative_error(output, experts_forward(x.to(case.dtype), ids, weights, base)) < 0.06


@pytest.mark.parametrize("block", [(128, 128), (32, 16), (20, 7)], ids=str)
@pytest.mark.parametrize("kind", EIGHT_BITS)
def test_experts_of_8_bits_against_the_fp32_product(kind: str, block: tuple[int, int], tmp_path: Path) -> None:
    exact = make_8_bits(saved(V3, tmp_path), block, kind)
    original = base_weights(V3(torch.float32))
    for (layer, (gate_up, down)), base in zip(
        experts_of(tmp_path, torch.float32).items(), original.values(), strict=True
    ):
        for expert in range(V3.num_experts):
            gate, up = gate_up[expert].chunk(2)
            for actual, name in ((gate, "gate_proj"), (up, "up_proj"), (down[expert], "down_proj")):
                assert torch.equal(actual, exact[f"{layer}.{expert}.{name}.weight"])
        assert (
            0.003 < relative_error(gate_up, torch.cat((base.gate, base.up), 1)) < 0.035
        )  # FP8 has three bits after the first
        assert 0.003 < relative_error(down, base.down) < 0.035


def test_fp8_fused(tmp_path: Path) -> None:
    """As transformers itself would write an FP8 model: stacks with a stack of scales."""
    exact = make_8_bits(saved(V3, tmp_path), BLOCK)
    content = tensors(tmp_path)
    stacked = {name: tensor for name, tensor in content.items() if ".experts." not in name}
    for index in V3.moe_layers:
        layer = f"model.layers.{index}.mlp.experts"
        for tail in ("", "_scale_inv"):
            parts = {
                name: torch.stack([content[f"{layer}.{e}.{name}.weight{tail}"] for e in range(V3.num_experts)])
                for name in ("gate_proj", "up_proj", "down_proj")
            }
            stacked[f"{layer}.gate_up_proj{tail}"] = torch.cat((parts["gate_proj"], parts["up_proj"]), 1)
            stacked[f"{layer}.down_proj{tail}"] = parts["down_proj"]
    write(tmp_path, stacked)
    for layer, (gate_up, down) in experts_of(tmp_path, torch.float32).items():
        names = [[f"{layer}.{e}.{n}_proj.weight" for n in ("gate", "up")] for e in range(V3.num_experts)]
        assert torch.equal(gate_up, torch.stack([torch.cat([exact[name] for name in pair]) for pair in names]))
        assert torch.equal(down[5], exact[f"{layer}.5.down_proj.weight"])


def test_fp8_layers_for_multi_token_prediction_are_left_out(tmp_path: Path) -> None:
    make_8_bits(saved(V3, tmp_path), BLOCK)
    before = logits_of(load_kt_model(tmp_path, make_config("torch")), V3.inputs())
    extra = {n.replace("layers.2.", "layers.61."): t for n, t in tensors(tmp_path).items() if "layers.2." in n}
    edit(tmp_path, lambda content: content.update(extra))
    after = logits_of(load_kt_model(tmp_path, make_config("torch")), V3.inputs())
    assert torch.equal(after, before)


def test_other_tensors_may_be_called_so(tmp_path: Path) -> None:
    """A scale that is no weight's, and integers that are none."""
    expected = logits_of(load_kt_model(saved(QWEN3, tmp_path), make_config("torch")), QWEN3.inputs())
    more = {
        "model.extra": torch.ones(3),
        "model.extra_scale": torch.ones(1),
        "model.mask": torch.ones(4, dtype=torch.int8),
    }
    edit(tmp_path, lambda content: content.update(more))
    assert torch.equal(logits_of(load_kt_model(tmp_path, make_config("torch")), QWEN3.inputs()), expected)


def test_scales_of_a_weight_the_model_has_under_another_name_are_refused(tmp_path: Path) -> None:
    make_8_bits(saved(V3, tmp_path), BLOCK)

    def change(content: dict[str, Tensor]) -> None:
        name = "model.layers.0.self_attn.o_proj.weight"
        for tail in ("", "_scale_inv"):
            content[name.replace("o_proj", "out") + tail] = content.pop(name + tail)

    edit(tmp_path, change)
    with pytest.raises(
        ValueError, match=r"model\.safetensors: model\.layers\.0\.self_attn\.out\.weight is of torch\.float8_e4m3fn"
    ):
        load_kt_model(tmp_path, make_config("torch"))


def compressed(**weights: object) -> dict[str, object]:
    known = {"num_bits": 8, "strategy": "channel", "symmetric": True}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": known | weights}}}


@pytest.mark.parametrize(
    ("quantised", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "group_size=None"),
        ({"quant_method": "gptq", "bits": 8, "group_size": 128}, "bits=8"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "checkpoint_format": "marlin"}, "checkpoint_format='m"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"}, "version='gemv'"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "load_in_8bit=True"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type='fp4'"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "quant_algo='W4A8_AWQ'"),
        ({"quant_method": "aqlm"}, "quant_method='aqlm'"),
        ({"quant_method": "fp8", "weight_block_size": None}, "weight_block_size=None"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"weight_block_size=\[128\]"),
        (compressed(num_bits=4, symmetric=False, type="float"), "group_0 has weights of num_bits=4"),
        (compressed(num_bits=4, strategy="group", group_size=12), "group_size=12"),
        (compressed(symmetric=False), "group_0 .* symmetric=False"),
        (compressed(strategy="token"), "group_0 .* strategy='token'"),
        (compressed(strategy="block", block_structure=None), "block_structure=None"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "config_groups names no weights"),
        ({"quant_method": "compressed-tensors", "config_groups": [1]}, "config_groups names no weights"),
        (compressed() | {"transform_config": {"config_groups": {"u": {"type": "hadamard"}}}}, "transform_config"),
    ],
    ids=str,
)
def test_other_quantisation_is_refused(quantised: dict[str, object], message: str, tmp_path: Path) -> None:
    set_config(saved(QWEN3, tmp_path), quantization_config=quantised)
    with pytest.raises(KTAMXConfigError, match=f"quantization_config: {message}"):
        load_kt_model(tmp_path, make_config("torch"))
