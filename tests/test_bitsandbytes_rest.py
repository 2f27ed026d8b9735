"""bitsandbytes for the linear layers outside the experts: on the CPU, where it has kernels too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model

from kt_hf import KTAMXConfigError, KTConfig, apply_kt_moe, kt_lora_config, load_kt_model
from kt_hf.bitsandbytes_rest import bits_and_bytes, for_rest, saved_bytes
from tests.support.models import FAMILIES
from tests.support.patched import fill_lora

bnb = pytest.importorskip("bitsandbytes")

CPU = KTConfig(kt_backend="torch", kt_lora_rank=8)
KINDS = {4: "Linear4bit", 8: "Linear8bitLt"}
IDS = torch.randint(0, 30, (2, 8), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=["qwen3_moe", "qwen2_moe", "deepseek_v3"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    FAMILIES[request.param](torch.bfloat16).save_pretrained(folder)
    return folder


def kinds(model: Any) -> dict[str, str]:
    return {name: type(module).__name__ for name, module in model.named_modules()}


@pytest.mark.parametrize("bits", [4, 8])
def test_linear_layers_alone_are_quantized_and_train(checkpoint: Path, bits: int) -> None:
    """Attention, shared experts and dense MLPs; no router, no gate of shared experts, no head, no experts."""
    if bits == 8 and "deepseek" in str(checkpoint) and not torch.cuda.is_available():
        pytest.skip("bitsandbytes 0.50.2 raises in int8 on the CPU in backward of DeepSeek's attention")
    model = load_kt_model(checkpoint, CPU, quantization_config=bits_and_bytes(bits))
    found = {name for name, kind in kinds(model).items() if kind == KINDS[bits]}
    assert found
    assert all(name.endswith("_proj") or "_proj_" in name or name.endswith("_a") for name in found), found
    assert not any(".gate." in name + "." or "shared_expert_gate" in name or "lm_head" in name for name in found)
    if "qwen2" in str(checkpoint) or "deepseek" in str(checkpoint):
        assert any("shared_expert" in name for name in found)
    adapted = get_peft_model(model, kt_lora_config(model))
    fill_lora(adapted, seed=1)
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    without = [
        name for name, p in adapted.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert any(".self_attn." in name for name in trained)
    assert any(".experts." in name for name in trained)
    assert not [name for name in without if ".experts." not in name], without
    assert all(p.dtype == torch.float32 for p in adapted.parameters() if p.requires_grad)


def test_logits_and_gradients_are_those_of_the_widened_weights(checkpoint: Path) -> None:
    """Of a plain model whose linear layers have what bitsandbytes' are worth.

    In fp32: in bf16 PEFT rounds LoRA's part before it is added to a quantized layer's output, and after it in a plain
    one, which is enough for another choice of experts.
    """
    low = load_kt_model(
        checkpoint, CPU, dtype=torch.float32, quantization_config=bits_and_bytes(4, dtype=torch.float32)
    )
    plain = load_kt_model(checkpoint, CPU, dtype=torch.float32)
    for name, module in low.named_modules():
        if type(module).__name__ == "Linear4bit":
            wide = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            assert wide.dtype == torch.float32
            plain.get_submodule(name).weight.data.copy_(wide)
    logits, grads = [], []
    for model in (low, plain):
        adapted = get_peft_model(model, kt_lora_config(model))
        fill_lora(adapted, seed=1)
        out = adapted(input_ids=IDS, labels=IDS)
        out.loss.backward()
        logits.append(out.logits.detach())
        grads.append({name: p.grad for name, p in adapted.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert (grad - grads[1][name]).norm() <= 1e-4 * grads[1][name].norm() + 1e-7, name


def test_adapters_are_saved_and_loaded(checkpoint: Path, tmp_path: Path) -> None:
    adapted = get_peft_model(model := load_kt_model(checkpoint, CPU, quantization_config=bits_and_bytes(4)),
                             kt_lora_config(model))  # fmt: skip
    fill_lora(adapted, seed=1)
    adapted.save_pretrained(tmp_path)
    again = load_kt_model(checkpoint, CPU, quantization_config=bits_and_bytes(4))
    again = PeftModel.from_pretrained(again, tmp_path)
    with torch.no_grad():
        assert torch.equal(adapted.eval()(IDS).logits, again.eval()(IDS).logits)


def test_gradients_after_an_evaluation_are_those_before(checkpoint: Path) -> None:
    """On AVX512-BF16, bitsandbytes' own layers lose theirs: a forward in evaluation packs for an operator without."""
    model = load_kt_model(checkpoint, CPU, quantization_config=bits_and_bytes(4))
    adapted = get_peft_model(model, kt_lora_config(model))
    fill_lora(adapted, seed=1)
    found = []
    for _ in range(2):
        adapted.train()(input_ids=IDS, labels=IDS).loss.backward()
        found.append({name: p.grad for name, p in adapted.named_parameters() if p.grad is not None})
        adapted.zero_grad()
        with torch.no_grad():
            adapted.eval()(input_ids=IDS)
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(grad, found[1][name]) for name, grad in found[0].items())


def test_a_model_that_transformers_quantized_is_patched(checkpoint: Path) -> None:
    """transformers leaves routed experts alone, for they are no linear layers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.bfloat16, quantization_config=bits_and_bytes(4)
    )
    adapted = get_peft_model(apply_kt_moe(model, CPU), kt_lora_config(model))
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    assert any(".experts." in name and p.grad is not None for name, p in adapted.named_parameters())


def test_what_is_refused(checkpoint: Path) -> None:
    with pytest.raises(KTAMXConfigError, match=r"quantization_config=str: .*BitsAndBytesConfig"):
        load_kt_model(checkpoint, CPU, quantization_config="nf4")
    outline = FAMILIES["qwen3_moe"](torch.bfloat16)
    with pytest.raises(KTAMXConfigError, match="in low bits already"):
        for_rest(bits_and_bytes(4), outline, packed_already=True)
    config = for_rest(bits_and_bytes(4, double=False), outline, packed_already=False)
    linear = sum(m.weight.numel() for n, m in outline.named_modules() if n.endswith("_proj") and hasattr(m, "weight"))
    assert saved_bytes(config, outline, 2) == pytest.approx(linear * (2 - 0.5625), rel=1e-3)
