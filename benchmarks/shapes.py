"""The sizes of the models whose expert layers are measured, and random weights and inputs of such sizes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from kt_hf.system.memory import available_memory

SIZES = {  # experts, experts a token, hidden size, expert intermediate size
    "deepseek-v2-lite": (64, 6, 2048, 1408),
    "deepseek-v3": (256, 8, 7168, 2048),
    "qwen3-30b-a3b": (128, 8, 2048, 768),
    "qwen3-235b-a22b": (128, 8, 4096, 1536),
    "mixtral-8x7b": (8, 2, 4096, 14336),
    "smol": (8, 2, 576, 1536),
    "tiny": (8, 2, 128, 128),
}


@dataclass(frozen=True)
class Shape:
    """A layer's experts E, of which each token takes K, hidden size H, intermediate size I (`inner`)."""

    name: str
    E: int
    K: int
    H: int
    inner: int

    @property
    def expert_weights(self) -> int:
        return 3 * self.H * self.inner

    @property
    def bytes(self) -> int:
        """Of a layer's experts in bf16."""
        return 2 * self.E * self.expert_weights

    def label(self, rank: int) -> str:
        """As the CSV has it: the number of experts is named where memory did not allow them all."""
        fewer = f" E={self.E}" if SIZES[self.name][0] > self.E else ""
        return f"{self.name}{fewer} r={rank}"


def fitting(name: str, layers: int = 1) -> Shape:
    """The shape, with as many experts (a power of two) as let this machine hold `layers` layers three times: as they
    were, packed, and packed for backward.
    """
    E, K, H, inner = SIZES[name]
    most = int(0.75 * available_memory() / (layers * 3 * 2 * 3 * H * inner))
    if most < E:
        E = max(K, 1 << max(0, most.bit_length() - 1))
    return Shape(name, E, K, H, inner)


def random_model(shape: Shape, layers: int = 1, vocab: int = 32, head_dim: int = 32) -> Qwen3MoeForCausalLM:
    """A Qwen3-MoE with experts of this shape in bf16. The peer takes no DeepSeek-V2, so every shape is of this family;
    shared experts and latent attention are left out for all that is compared.
    """
    heads = max(1, shape.H // head_dim) if vocab > 32 else 4
    config = Qwen3MoeConfig(
        hidden_size=shape.H, moe_intermediate_size=shape.inner, num_experts=shape.E, num_experts_per_tok=shape.K,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=1 if heads % 4 else 4,
        head_dim=head_dim, vocab_size=vocab, intermediate_size=64, dtype=torch.bfloat16,
        architectures=["Qwen3MoeForCausalLM"],
    )  # fmt: skip
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config).bfloat16()
    model = model.to_empty(device="cpu")
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are not in the state dict
    block = torch.randn(2**20 + 7, generator=torch.Generator().manual_seed(0)).bfloat16()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.fill_(1)
            continue
        # One block over and over: drawing billions of numbers would take longer than the benchmark.
        flat, scaled = parameter.data.view(-1), block * parameter.shape[-1] ** -0.5
        whole = len(flat) // len(scaled) * len(scaled)
        flat[:whole].view(-1, len(scaled)).copy_(scaled.expand(whole // len(scaled), -1))
        flat[whole:].copy_(scaled[: len(flat) - whole])
    return model.requires_grad_(False)


def make_batch(shape: Shape, tokens: int) -> dict[str, Tensor]:
    """Inputs of one layer, tokens spread evenly over the experts, and the gradient of its output."""
    generator = torch.Generator().manual_seed(1)
    return {
        "x": torch.randn(tokens, shape.H, generator=generator).bfloat16(),
        "ids": torch.rand(tokens, shape.E, generator=generator).topk(shape.K).indices,
        "weights": torch.rand(tokens, shape.K, generator=generator).bfloat16(),
        "grad": torch.randn(tokens, shape.H, generator=generator).bfloat16(),
    }
