"""What servers read is right for readers that know r and lora_alpha alone: no rsLoRA, no patterns.

ktransformers is no dependency: KT_TEST_KTRANSFORMERS names its source tree, without which its test is skipped.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from kt_hf.adapters import check_export, convert, load_adapter
from tests.adapters.test_convert import ADAPTER, CONFIG, FUSED, VARIANTS, saved
from tests.support.cases import TORCH_FP32
from tests.support.layers import RANK
from tests.support.models import FAMILIES, Family
from tests.support.patched import logits_of, patched_model
from tests.support.tiny import environment

# As pairs of options; "both" is what no reader but PEFT would get right.
MANY = {
    "rslora": VARIANTS["rslora"],
    "patterns": VARIANTS["patterns"],
    "scaling of up": VARIANTS["other scaling of up"],
    "both": {**VARIANTS["patterns"], "use_rslora": True},
}
_SHORT = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def pairs_of(folder: Path) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Module, A and B of each LoRA in a folder, the experts' one by one."""
    tensors = load_file(folder / ADAPTER)
    if (folder / FUSED).exists():
        for name, stack in load_file(folder / FUSED).items():
            layer, projection, side = name.split(".")[1], name.split(".")[3].split("_")[0], name[-1].upper()
            for expert, tensor in enumerate(stack):
                module = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{projection}_proj"
                tensors[f"{module}.lora_{side}.weight"] = tensor
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            b = tensors[name.replace(".lora_A.", ".lora_B.")]
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            yield module.replace("block_sparse_moe", "mlp"), a, b


def weight_of(model: nn.Module, module: str) -> Tensor:
    """The weight, or the part of a stack, that a module's LoRA is added to."""
    experts, marker, rest = module.partition(".experts.")
    if not marker:
        return model.get_parameter(f"{module}.weight")
    expert, _, name = rest.partition(".")
    name = _SHORT.get(name, name)
    stack = model.get_submodule(f"{experts}.experts")
    if name == "down_proj":
        return stack.down_proj[int(expert)]
    return stack.gate_up_proj[int(expert)].chunk(2)[name == "up_proj"]


@torch.no_grad()
def read_by(factor: Callable[[float, int, int], float], family: Family, folder: Path) -> Tensor:
    """Logits of the unpatched model with s·B·A added, s of (lora_alpha, r, the tensor's own rank) and nothing else."""
    config, model = json.loads((folder / CONFIG).read_text()), family()
    for module, a, b in pairs_of(folder):
        weight_of(model, module).add_(factor(config["lora_alpha"], config["r"], len(a)) * b @ a)
    return logits_of(model, family.inputs())


@pytest.mark.parametrize("to", ["per-expert", "fused"])
@pytest.mark.parametrize("variant", MANY)
def test_readers_of_r_and_alpha_alone(variant: str, to: str, tmp_path: Path) -> None:
    """vLLM, SGLang: lora_alpha / r. llama.cpp: lora_alpha by the tensor's own rank. All of one size, as buffers are."""
    for name in ("mixtral", "deepseek_v2"):
        family = FAMILIES[name]
        kt, expected = saved(family, tmp_path / f"{name}-kt", **MANY[variant])
        folder = convert(kt, tmp_path / name, to=to)
        assert (read_by(lambda alpha, r, own: alpha / r, family, folder) - expected).abs().max() < 1e-5
        assert (read_by(lambda alpha, r, own: alpha / own, family, folder) - expected).abs().max() < 1e-5
        assert {len(a) for _, a, _ in pairs_of(folder)} == {RANK}
        config = json.loads((folder / CONFIG).read_text())
        assert not config["use_rslora"]
        assert not config["rank_pattern"]
        assert not config["alpha_pattern"]
        assert check_export(folder, kt) == []
        assert not torch.allclose(logits_of(family(), family.inputs()), expected, atol=1e-2)
        model = load_adapter(patched_model(family, TORCH_FP32), folder, trainable=False)
        assert (logits_of(model, family.inputs()) - expected).abs().max() < 1e-5


@pytest.mark.skipif(not os.environ.get("KT_TEST_KTRANSFORMERS"), reason="KT_TEST_KTRANSFORMERS names no source tree")
def test_ktransformers_converter_takes_it(tmp_path: Path) -> None:
    """It refuses several ranks, and leaves lora_alpha and use_rslora as they are; SGLang then reads lora_alpha / r."""
    family = FAMILIES["qwen3_moe"]
    kt, expected = saved(family, tmp_path / "kt", **MANY["both"])
    folder = convert(kt, tmp_path / "fused", to="fused")
    script = Path(os.environ["KT_TEST_KTRANSFORMERS"], "kt-kernel/scripts/convert_kt_to_sglang_adapter.py")
    words = [sys.executable, str(script), str(folder), str(tmp_path / "out"), "--base-model-name-or-path", "base"]
    ran = subprocess.run(words, env=environment(tmp_path), capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert (read_by(lambda alpha, r, own: alpha / r, family, tmp_path / "out") - expected).abs().max() < 1e-5


@pytest.mark.parametrize("variant", MANY)
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_stock_peft_reads_single_experts(name: str, variant: str, tmp_path: Path) -> None:
    """On transformers 5 PEFT stacks the single experts itself; Qwen3-MoE's dense MLPs it would leave out."""
    family = FAMILIES[name]
    targets = r".*(experts\.(gate|up|down)_proj|self_attn\.._proj)"
    kt, expected = saved(family, tmp_path / "kt", **{**MANY[variant], "target_modules": targets})
    model = PeftModel.from_pretrained(family(), convert(kt, tmp_path / "out", to="per-expert"))
    assert (logits_of(model, family.inputs()) - expected).abs().max() < 1e-5


def test_what_was_one_already_is_left_to_the_bit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    family = FAMILIES["qwen3_moe"]
    kt, _ = saved(family, tmp_path / "kt", use_rslora=True)
    with caplog.at_level(logging.WARNING):
        out = convert(kt, tmp_path / "out", to="per-expert")
    assert not caplog.records
    before, after = load_file(kt / ADAPTER), load_file(out / ADAPTER)
    name = "base_model.model.model.layers.2.mlp.experts{}.up_proj.lora_B.weight"
    assert torch.equal(after[name.format(".2")], before[name.format("")][2])
    settings = json.loads((kt / CONFIG).read_text())
    assert json.loads((out / CONFIG).read_text())["lora_alpha"] == pytest.approx(settings["lora_alpha"] * RANK**0.5)


def test_what_is_changed_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kt, _ = saved(FAMILIES["mixtral"], tmp_path / "kt", **VARIANTS["patterns"])
    with caplog.at_level(logging.WARNING):
        convert(kt, tmp_path / "out", to="per-expert")
    # down_proj of two layers has rank 4 and alpha 5, o_proj rank 2 with the alpha of all.
    assert f"4 modules are padded with zeros to rank {RANK}, B of 4 is multiplied" in caplog.text
