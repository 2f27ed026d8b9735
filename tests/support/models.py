"""Tiny random models of five families, built from their configs: no network, the same weights for the same seed.

Weights are drawn in fp32 and rounded to bf16 before the cast, so a model in fp32 and one in bf16 hold equal values
and differ by arithmetic alone. They are large enough that the experts decide the loss (test_models.py checks it).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests.support.reference import BaseWeights

VOCAB = 128
EXPERT_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Family:
    """How to build one family's tiny model, and what a test needs to know of its structure."""

    name: str
    model_class: type[PreTrainedModel]
    make_config: Callable[[], PreTrainedConfig]
    hidden: int
    intermediate: int
    top_k: int
    moe_layers: tuple[int, ...]
    attention: tuple[str, ...]
    dense_layers: tuple[int, ...] = ()
    shared: str | None = None
    num_experts: int = 8
    token_seed: int = 0

    def __call__(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
        config = self.make_config()
        config.dtype = dtype
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.model_class(config).float()
            _scale_weights(model)
        return model.to(torch.bfloat16).to(dtype).eval()

    @property
    def target_modules(self) -> list[str]:
        """What a user would write into LoraConfig to reach attention and every MLP."""
        return [*self.attention, *EXPERT_PROJECTIONS]

    def inputs(self, batch: int = 2, length: int = 12, seed: int | None = None) -> torch.Tensor:
        """Token ids [batch, length].

        With the defaults, no token's routing is a near tie, so that rounding to bf16 changes the numbers and not the
        experts chosen: token_seed is picked for it, and test_models.py checks it.
        """
        rng = torch.Generator().manual_seed(self.token_seed if seed is None else seed)
        return torch.randint(VOCAB, (batch, length), generator=rng)


@torch.no_grad()
def _scale_weights(model: PreTrainedModel) -> None:
    for module in expert_modules(model).values():
        module.gate_up_proj.mul_(1.5)
        module.down_proj.mul_(2)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.1)  # zero as built: a router that ignored it would not be noticed
    for name, parameter in model.named_parameters():
        if re.search(r"norm\w*\.weight$", name):
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


def expert_modules(model: nn.Module) -> dict[int, nn.Module]:
    """Decoder layer index -> the module called "experts", in layer order, patched or not."""
    found = {}
    for name, module in model.named_modules():
        if match := re.search(r"layers\.(\d+)\.mlp\.experts$", name):
            found[int(match[1])] = module
    return dict(sorted(found.items()))


def base_weights(model: nn.Module) -> dict[int, BaseWeights]:
    """fp32 clones of every layer's expert weights; call it before patching takes them away."""
    found = {}
    for index, module in expert_modules(model).items():
        gate, up = module.gate_up_proj.detach().clone().float().chunk(2, dim=1)
        found[index] = BaseWeights(gate, up, module.down_proj.detach().clone().float())
    return found


COMMON = {
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "num_attention_heads": 4,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
MLA = {
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
}
QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
MLA_TAIL = ("kv_a_proj_with_mqa", "kv_b_proj", "o_proj")


def _mixtral() -> PreTrainedConfig:
    return MixtralConfig(
        **COMMON,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
    )


def _qwen2_moe() -> PreTrainedConfig:
    return Qwen2MoeConfig(
        **COMMON,
        hidden_size=96,
        intermediate_size=128,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=96,
        num_hidden_layers=2,
        num_key_value_heads=4,
        num_experts=8,
        num_experts_per_tok=2,
    )


def _qwen3_moe() -> PreTrainedConfig:
    # The dense layer in the middle tells a layer's index from its place in the list of patched layers.
    return Qwen3MoeConfig(
        **COMMON,
        hidden_size=128,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=3,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        mlp_only_layers=[1],
    )


def _deepseek_v2() -> PreTrainedConfig:
    return DeepseekV2Config(
        **COMMON,
        **MLA,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=64,
        n_shared_experts=2,
        q_lora_rank=None,
        topk_method="greedy",
    )


def _deepseek_v3() -> PreTrainedConfig:
    return DeepseekV3Config(
        **COMMON,
        **MLA,
        hidden_size=96,
        intermediate_size=128,
        moe_intermediate_size=32,
        n_shared_experts=1,
        q_lora_rank=32,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=1.5,
        num_mtp_layers=0,
    )


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("mixtral", MixtralForCausalLM, _mixtral, 64, 96, 2, (0, 1), QKVO, token_seed=4),
        Family("qwen2_moe", Qwen2MoeForCausalLM, _qwen2_moe, 96, 64, 2, (0, 1), QKVO, shared="shared_expert"),
        Family("qwen3_moe", Qwen3MoeForCausalLM, _qwen3_moe, 128, 32, 2, (0, 2), QKVO, dense_layers=(1,)),
        Family(
            "deepseek_v2",
            DeepseekV2ForCausalLM,
            _deepseek_v2,
            64,
            64,
            3,
            (1, 2),
            ("q_proj", *MLA_TAIL),
            dense_layers=(0,),
            shared="shared_experts",
            token_seed=7,
        ),
        Family(
            "deepseek_v3",
            DeepseekV3ForCausalLM,
            _deepseek_v3,
            96,
            32,
            3,
            (1, 2),
            ("q_a_proj", "q_b_proj", *MLA_TAIL),
            dense_layers=(0,),
            shared="shared_experts",
            token_seed=4,
        ),
    )
}
