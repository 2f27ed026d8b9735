"""Conversions: what stock PEFT makes of them, and that every way back gives the tensors that went in."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from kt_hf.adapters import convert, load_adapter, verify_adapter
from tests.support.cases import TORCH_FP32, Case
from tests.support.layers import ALPHA, RANK
from tests.support.models import FAMILIES, Family
from tests.support.patched import adapted_model, fill_lora, logits_of, lora_config, patched_model

ADAPTER, CONFIG, FUSED = "adapter_model.safetensors", "adapter_config.json", "fused_expert_lora.safetensors"


def saved(family: Family, folder: Path, case: Case = TORCH_FP32, **config: object) -> tuple[Path, Tensor]:
    """A kt adapter with random A and B, and the logits of the model that saved it."""
    from peft import get_peft_model as adapt

    model = adapt(patched_model(family, case), lora_config(family, **config))
    fill_lora(model, seed=2)
    model.save_pretrained(folder)
    return folder, logits_of(model, family.inputs())


def assert_equal_tensors(actual: Path, expected: Path) -> None:
    there, wanted = load_file(actual / ADAPTER), load_file(expected / ADAPTER)
    assert set(there) == set(wanted)
    assert not [
        key for key in wanted if there[key].dtype != wanted[key].dtype or not torch.equal(there[key], wanted[key])
    ]


def stock_logits(family: Family, adapter: Path) -> Tensor:
    """What PEFT gives on the unpatched fp32 model; nothing of the adapter may be left over."""
    model = PeftModel.from_pretrained(family(), adapter)
    names = {name.replace(".default.", ".") for name, _ in model.named_parameters() if "lora_" in name}
    assert names == set(load_file(adapter / ADAPTER))
    return logits_of(model, family.inputs())


VARIANTS: dict[str, dict[str, object]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {r".*experts\.down_proj": 4, "o_proj": 2}, "alpha_pattern": {"down_proj": 5}},
    "other scaling of up": {"alpha_pattern": {"up_proj": 5}},
    "ranks of gate and up": {"rank_pattern": {"up_proj": 4}, "alpha_pattern": {"up_proj": 6}},
    "down alone": {"target_modules": ["q_proj", "down_proj"]},
    "gate and up alone": {"target_modules": ["o_proj", "gate_proj", "up_proj"]},
    "gate alone": {"target_modules": ["o_proj", "gate_proj"]},
    "experts alone": {"target_modules": r".*experts\.(gate|up|down)_proj"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_peft_and_back(family: Family, tmp_path: Path, variant: str) -> None:
    if variant == "down alone" and "q_proj" not in family.attention:
        pytest.skip("no q_proj")
    kt, expected = saved(family, tmp_path / "kt", **VARIANTS[variant])
    peft = convert(kt, tmp_path / "peft", to="peft")
    assert (stock_logits(family, peft) - expected).abs().max() < 1e-5
    back = convert(peft, tmp_path / "back", to="kt")
    assert verify_adapter(back)
    model = PeftModel.from_pretrained(patched_model(family, TORCH_FP32), back)
    if variant == "other scaling of up":  # which up's B takes up, for the fused layer has one
        assert (logits_of(model, family.inputs()) - expected).abs().max() < 1e-5
    else:
        assert_equal_tensors(back, kt)
        assert torch.equal(logits_of(model, family.inputs()), expected)


@pytest.mark.parametrize("to", ["per-expert", "fused"])
@pytest.mark.parametrize("variant", ["plain", "rslora"])
def test_there_and_back(family: Family, tmp_path: Path, variant: str, to: str) -> None:
    kt, expected = saved(family, tmp_path / "kt", **VARIANTS[variant])
    other = convert(kt, tmp_path / "other", to=to)
    back = convert(other, tmp_path / "back", to="kt")
    assert_equal_tensors(back, kt)
    model = load_adapter(patched_model(family, TORCH_FP32), other, trainable=False)
    assert torch.equal(logits_of(model, family.inputs()), expected)


def test_bf16_stays(tmp_path: Path) -> None:
    family = FAMILIES["qwen3_moe"]
    kt, _ = saved(family, tmp_path / "kt")
    save_file({key: value.bfloat16() for key, value in load_file(kt / ADAPTER).items()}, kt / ADAPTER)
    (kt / "kt_adapter_manifest.json").unlink()
    for to in ("peft", "per-expert", "fused"):
        back = convert(convert(kt, tmp_path / to, to=to), tmp_path / f"{to}-back", to="kt")
        assert_equal_tensors(back, kt)


def test_keys_of_each_format(tmp_path: Path) -> None:
    family = FAMILIES["mixtral"]
    kt, _ = saved(family, tmp_path / "kt", target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"])
    tensors = load_file(kt / ADAPTER)
    prefix = "base_model.model.model.layers.1"
    gate_a = tensors[f"{prefix}.mlp.experts.gate_proj.lora_A.weight"]
    down_b = tensors[f"{prefix}.mlp.experts.down_proj.lora_B.weight"]
    query = f"{prefix}.self_attn.q_proj.lora_A.weight"

    hub = load_file(convert(kt, tmp_path / "hub", to="per-expert") / ADAPTER)
    assert len(hub) == 4 + 2 * 8 * 6
    assert torch.equal(hub[f"{prefix}.block_sparse_moe.experts.3.w1.lora_A.weight"], gate_a[3])
    assert torch.equal(hub[f"{prefix}.block_sparse_moe.experts.7.w2.lora_B.weight"], down_b[7])
    assert set(json.loads((tmp_path / "hub" / CONFIG).read_text())["target_modules"]) == {"q_proj", "w1", "w2", "w3"}

    folder = convert(kt, tmp_path / "fused", to="fused")
    fused, rest = load_file(folder / FUSED), load_file(folder / ADAPTER)
    assert set(fused) == {
        f"layers.{n}.experts.{p}_lora_{s}" for n in (0, 1) for p in ("gate", "up", "down") for s in "ab"
    }
    assert torch.equal(fused["layers.1.experts.gate_lora_a"], gate_a)
    assert torch.equal(fused["layers.1.experts.down_lora_b"], down_b)
    assert torch.equal(rest[query], tensors[query])
    assert len(rest) == 4

    stock = load_file(convert(kt, tmp_path / "peft", to="peft") / ADAPTER)
    down = stock[f"{prefix}.mlp.experts.lora_B.weight"]
    up_a = stock[f"{prefix}.mlp.experts.base_layer.lora_A.weight"]
    up_b = stock[f"{prefix}.mlp.experts.base_layer.lora_B.weight"]
    gate_b = tensors[f"{prefix}.mlp.experts.gate_proj.lora_B.weight"]
    assert (down.shape, up_a.shape, up_b.shape) == ((64, 8 * 8), (8 * 16, 64), (2 * 96, 16 * 8))
    expert, rank = 5, 2
    assert torch.equal(down[:, rank * 8 + expert], down_b[expert, :, rank])
    assert torch.equal(up_a[expert * 16 + rank], gate_a[expert, rank])
    assert torch.equal(up_b[:96, rank * 8 + expert], gate_b[expert, :, rank])
    assert not up_b[96:, rank * 8 + expert].any()


def test_sglang(family: Family, tmp_path: Path) -> None:
    kt, _ = saved(family, tmp_path / "kt")
    tensors = load_file(kt / ADAPTER)
    content = torch.load(convert(kt, tmp_path / "experts.pt"), weights_only=True)
    assert content.pop("metadata") == {
        "lora_rank": RANK,
        "lora_alpha": ALPHA,
        "num_layers": len(family.moe_layers),
        "num_experts": family.num_experts,
        "hidden_size": family.hidden,
        "intermediate_size": family.intermediate,
    }
    assert set(content) == {f"layer_{layer}" for layer in family.moe_layers}
    for layer in family.moe_layers:
        found = content[f"layer_{layer}"]
        assert set(found) == {f"{p}_lora_{s}" for p in ("gate", "up", "down") for s in "ab"}
        for name, value in found.items():
            projection, _, side = name.split("_")
            key = f"base_model.model.model.layers.{layer}.mlp.experts.{projection}_proj.lora_{side.upper()}.weight"
            assert value.dtype == tensors[key].dtype
            assert torch.equal(value, tensors[key])


def test_sglang_of_several_ranks_and_scalings(tmp_path: Path) -> None:
    """One rank and one alpha for all: padded, and the ratio in B, so that s·B·A stays."""
    family = FAMILIES["qwen3_moe"]
    kt, _ = saved(family, tmp_path / "kt", **VARIANTS["patterns"], use_rslora=True)
    tensors, config = load_file(kt / ADAPTER), json.loads((kt / CONFIG).read_text())
    content = torch.load(convert(kt, tmp_path / "experts.pt"), weights_only=True)
    scaling = content["metadata"]["lora_alpha"] / content["metadata"]["lora_rank"]
    alphas, ranks = {"down": 5}, {"down": 4}
    for layer in family.moe_layers:
        for name in ("gate", "up", "down"):
            key = f"base_model.model.model.layers.{layer}.mlp.experts.{name}_proj.lora"
            own = alphas.get(name, config["lora_alpha"]) / ranks.get(name, RANK) ** 0.5
            expected = own * tensors[f"{key}_B.weight"] @ tensors[f"{key}_A.weight"]
            found = content[f"layer_{layer}"]
            actual = scaling * found[f"{name}_lora_b"] @ found[f"{name}_lora_a"]
            assert found[f"{name}_lora_a"].shape[1] == RANK
            assert torch.allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_an_adapter_stock_peft_trained(family: Family, tmp_path: Path) -> None:
    """Its gate_up LoRA has no zero blocks: gate and up each get a copy of A."""
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=list(family.attention), task_type="CAUSAL_LM",
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )  # fmt: skip
    stock = get_peft_model(family(), config)
    fill_lora(stock, seed=3)
    stock.save_pretrained(tmp_path / "stock")
    expected = logits_of(stock, family.inputs())
    model = load_adapter(patched_model(family, TORCH_FP32), tmp_path / "stock", trainable=False)
    assert (logits_of(model, family.inputs()) - expected).abs().max() < 1e-5
    assert model._kt_wrappers[0].gate_proj.r == {"default": RANK}
    # and out again: stock PEFT gets the same function, at twice the rank
    again = convert(convert(tmp_path / "stock", tmp_path / "kt", to="kt"), tmp_path / "again", to="peft")
    assert (stock_logits(family, again) - expected).abs().max() < 1e-5


class ListExperts(torch.nn.ModuleList):
    """Experts as transformers 4 had them, of the weights of fused ones."""

    def __init__(self, fused: torch.nn.Module) -> None:
        super().__init__()
        for gate_up, down in zip(fused.gate_up_proj, fused.down_proj, strict=True):
            expert = torch.nn.Module()
            for name, weight in zip(("gate_proj", "up_proj", "down_proj"), (*gate_up.chunk(2), down), strict=True):
                linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
                linear.weight.data = weight.detach().clone()
                expert.add_module(name, linear)
            self.append(expert)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for index, expert in enumerate(self):
            token, slot = (ids == index).nonzero(as_tuple=True)
            inner = torch.nn.functional.silu(expert.gate_proj(x[token])) * expert.up_proj(x[token])
            out.index_add_(0, token, expert.down_proj(inner) * weights[token, slot, None])
        return out


def test_an_adapter_of_single_experts(family: Family, tmp_path: Path) -> None:
    """Made by PEFT on a model whose experts are a ModuleList of the same weights, as on transformers 4."""
    model = family()
    for layer in family.moe_layers:
        mlp = model.model.layers[layer].mlp
        mlp.experts = ListExperts(mlp.experts)
    model.config.model_type = "none"  # or PEFT rewrites the targets, for transformers 5 has these experts fused
    adapted = get_peft_model(model, lora_config(family))
    fill_lora(adapted, seed=4)
    adapted.save_pretrained(tmp_path / "list")
    expected = logits_of(adapted, family.inputs())
    assert f"base_model.model.model.layers.{family.moe_layers[0]}.mlp.experts.0.up_proj.lora_A.weight" in load_file(
        tmp_path / "list" / ADAPTER
    )
    loaded = load_adapter(patched_model(family, TORCH_FP32), tmp_path / "list", trainable=False)
    assert (logits_of(loaded, family.inputs()) - expected).abs().max() < 1e-5
    assert not torch.allclose(expected, logits_of(adapted_model(family, TORCH_FP32), family.inputs()), atol=1e-2)


def test_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """scripts/convert_moe_lora.py with the options people know: --input (the file), --config, --output."""
    kt, _ = saved(FAMILIES["qwen3_moe"], tmp_path / "kt")
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((kt / ADAPTER).read_bytes())
    script = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "convert_moe_lora.py"))["main"]
    words = ["convert", "--input", str(alone), "--config", str(kt / CONFIG), "--output", str(tmp_path / "x.pt")]
    monkeypatch.setattr("sys.argv", words)
    assert script() == 0
    expected = torch.load(convert(kt, tmp_path / "y.pt"), weights_only=True)
    actual = torch.load(tmp_path / "x.pt", weights_only=True)
    assert actual["metadata"] == expected["metadata"]
    assert torch.equal(actual["layer_2"]["up_lora_b"], expected["layer_2"]["up_lora_b"])
    assert script() == 1
    assert "exists already" in capsys.readouterr().err
