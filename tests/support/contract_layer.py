"""A tiny Mixtral for the cases that go through a whole layer."""

from typing import Any

from peft import PeftModel, get_peft_model
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from kt_hf import KTConfig, apply_kt_moe, kt_lora_config


def model() -> MixtralForCausalLM:
    config = MixtralConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=32, num_local_experts=8, num_experts_per_tok=2, initializer_range=0.1,
    )  # fmt: skip
    return MixtralForCausalLM(config).bfloat16()


def adapted(**lora: Any) -> PeftModel:
    patched = apply_kt_moe(model(), KTConfig(kt_backend="AMXBF16", kt_num_threads=1))
    return get_peft_model(patched, kt_lora_config(patched, **lora))


def layer() -> nn.Module:
    return adapted()._kt_wrappers[0]
