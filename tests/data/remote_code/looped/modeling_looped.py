import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .configuration_looped import LoopedConfig


class LoopedMlp(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.moe_intermediate_size, bias=False)
        self.w2 = nn.Linear(config.moe_intermediate_size, config.hidden_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.moe_intermediate_size, bias=False)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.w2(self.act(self.w1(x)) * self.w3(x))


class LoopedBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.noise, self.top_k = config.noise, config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(LoopedMlp(config) for _ in range(config.num_experts))

    def forward(self, hidden):
        shape = hidden.shape
        if self.training and self.noise:
            hidden *= torch.empty_like(hidden).uniform_(1 - self.noise, 1 + self.noise)
        hidden = hidden.view(-1, shape[-1])
        router_logits = self.gate(hidden)
        weights, chosen = router_logits.softmax(-1, dtype=torch.float32).topk(self.top_k, dim=-1)
        weights = (weights / weights.sum(-1, keepdim=True)).to(hidden.dtype)
        out = torch.zeros_like(hidden)
        mask = nn.functional.one_hot(chosen, len(self.experts)).permute(2, 1, 0)
        for e in range(len(self.experts)):
            expert = self.experts[e]
            slot, token = torch.where(mask[e])
            out.index_add_(0, token, expert(hidden[None, token].reshape(-1, shape[-1])) * weights[token, slot, None])
        return out.view(shape), router_logits


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        size, self.heads = config.hidden_size, config.num_attention_heads
        self.q_proj = nn.Linear(size, size, bias=False)
        self.k_proj = nn.Linear(size, size, bias=False)
        self.v_proj = nn.Linear(size, size, bias=False)
        self.o_proj = nn.Linear(size, size, bias=False)

    def forward(self, x):
        q, k, v = (
            p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class LoopedLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn = Attention(config)
        self.block_sparse_moe = LoopedBlock(config)
        self.norm_1, self.norm_2 = nn.RMSNorm(config.hidden_size), nn.RMSNorm(config.hidden_size)

    def forward(self, x):
        x = x + self.self_attn(self.norm_1(x))
        return x + self.block_sparse_moe(self.norm_2(x))[0]


class LoopedPreTrainedModel(PreTrainedModel):
    config_class = LoopedConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = False

    def _init_weights(self, module):
        for parameter in module.parameters(recurse=False):
            if "norm" not in type(module).__name__.lower():
                nn.init.normal_(parameter, std=self.config.initializer_range)


class LoopedModel(LoopedPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LoopedLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size)
        self.post_init()

    def forward(self, input_ids):
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class LoopedForCausalLM(LoopedPreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.model = LoopedModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids=None, labels=None, attention_mask=None, **_):
        logits = self.lm_head(self.model(input_ids))
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        return CausalLMOutput(loss=loss, logits=logits)
