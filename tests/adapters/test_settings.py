"""Every setting of PEFT that trains something beside LoRA on linear layers: saved, loaded, exported and merged.

Logits are those of stock: the unpatched model with stock PEFT and the exported adapter, and its merge_and_unload.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from kt_hf import KTAMXConfigError, verify_adapter
from kt_hf.adapters import check_export, convert
from kt_hf.peft_compat.saving import check_trained
from tests.support.models import FAMILIES, VOCAB, Family
from tests.support.patched import logits_of, lora_config
from tests.support.saved_models import base_of, difference, fill, loaded

warnings.filterwarnings("ignore", message="Model with `tie_word_embeddings=True`")


@dataclass(frozen=True)
class Setting:
    """What is put into LoraConfig, `more` target modules beside attention and MLPs.

    stock_merges: merge_and_unload of stock gives the adapter's logits (it writes LoRA on a tied embedding into the head
    too, which the adapter does not).
    """

    config: dict[str, Any]
    more: tuple[str, ...] = ()
    stock_merges: bool = field(default=True)


SETTINGS = {
    "plain": Setting({}),
    "embeddings": Setting({"modules_to_save": ["embed_tokens"]}),
    "head": Setting({"modules_to_save": ["lm_head"]}),
    "embeddings and head": Setting({"modules_to_save": ["embed_tokens", "lm_head"]}),
    "embeddings kept tied": Setting({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "norms": Setting({"modules_to_save": ["norm"]}),
    "router": Setting({"modules_to_save": ["mlp.gate"]}),
    "biases": Setting({"bias": "all"}),
    "biases of LoRA": Setting({"bias": "lora_only"}),
    "LoRA on embeddings": Setting({}, ("embed_tokens",), stock_merges=False),
    "LoRA on the head": Setting({}, ("lm_head",), stock_merges=False),
    "LoRA on tied embeddings": Setting({"ensure_weight_tying": True}, ("embed_tokens",), stock_merges=False),
    "tokens": Setting({"trainable_token_indices": [1, 5, 100]}),
    "tokens of both": Setting({"trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [2, 3, 7]}}, (), False),
    "tokens and head": Setting({"trainable_token_indices": [1, 5], "modules_to_save": ["lm_head"]}, (), False),
    "tokens kept tied": Setting({"trainable_token_indices": [1, 5], "ensure_weight_tying": True}),
}
# What is refused before training: PEFT cannot compute it, or does not save the rows that were added to the other one.
REFUSED = {
    ("tokens and head", "tied"): "PEFT cannot compute that",
    ("tokens and head", "tied, grown"): "PEFT cannot compute that",
    ("LoRA on embeddings", "untied, grown"): "resized from 128 to 131.* not save lm_head",
    ("LoRA on tied embeddings", "untied, grown"): "resized from 128 to 131.* not save lm_head",
    ("LoRA on the head", "untied, grown"): "resized from 128 to 131.* not save model.embed_tokens",
}
VOCABULARIES = {"untied": (False, 0), "tied": (True, 0), "untied, grown": (False, 3), "tied, grown": (True, 3)}


def check_setting(family: Family, name: str, vocabulary: str, tmp_path: Path) -> None:
    setting, (tied, more_tokens) = SETTINGS[name], VOCABULARIES[vocabulary]
    base = base_of(family, tmp_path / "base", tied)
    config = lora_config(family, target_modules=[*family.target_modules, *setting.more], **setting.config)
    model = get_peft_model(loaded(base, more_tokens), config).eval()
    fill(model)
    if (name, vocabulary) in REFUSED:
        with pytest.raises(KTAMXConfigError, match=REFUSED[name, vocabulary]):
            check_trained(model)
        return
    check_trained(model)
    ids = torch.randint(VOCAB + more_tokens, (2, 12), generator=torch.Generator().manual_seed(3))
    ids[0, :4] = torch.tensor([1, 5, 2, VOCAB + more_tokens - 1])
    expected = logits_of(model, ids)
    assert difference(loaded(base, more_tokens), ids, expected) > 0.01
    adapter = tmp_path / "adapter"
    model.save_pretrained(adapter)

    assert verify_adapter(adapter, loaded(base, more_tokens))
    again = PeftModel.from_pretrained(loaded(base, more_tokens), adapter, is_trainable=True).eval()
    assert torch.equal(logits_of(again, ids), expected)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n, p in again.named_parameters() if p.requires_grad} == trained

    stock = convert(adapter, tmp_path / "stock", to="peft")
    check_export(stock, adapter)
    stock_model = PeftModel.from_pretrained(loaded(base, more_tokens, patched=False), stock).eval()
    assert difference(stock_model, ids, expected) < 1e-5
    if setting.stock_merges or not tied:
        assert difference(stock_model.merge_and_unload().eval(), ids, expected) < 1e-5
    merged = convert(adapter, tmp_path / "merged", to="merged", base=base)
    check_export(merged, adapter, base)
    result = loaded(merged, patched=False)
    assert result.get_input_embeddings().weight.shape[0] == VOCAB + more_tokens
    assert difference(result, ids, expected) < 1e-5
    if not tied:
        assert set(load_file(merged / "model.safetensors")) == set(load_file(base / "model.safetensors"))
    assert json.loads((merged / "config.json").read_text())["vocab_size"] == VOCAB + more_tokens


CASES = [(s, v) for s in SETTINGS for v in VOCABULARIES]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "vocabulary"), CASES, ids=[f"{s}, {v}" for s, v in CASES])
def test_every_setting(family: Family, name: str, vocabulary: str, tmp_path: Path) -> None:
    check_setting(family, name, vocabulary, tmp_path)


FAST = [("embeddings", "tied"), ("embeddings", "untied, grown"), ("norms", "untied"), ("tokens", "tied, grown"),
        ("LoRA on embeddings", "tied, grown")]  # fmt: skip


@pytest.mark.parametrize(("name", "vocabulary"), FAST, ids=[f"{s}, {v}" for s, v in FAST])
def test_settings(name: str, vocabulary: str, tmp_path: Path) -> None:
    check_setting(FAMILIES["qwen3_moe"], name, vocabulary, tmp_path)
