import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import CausalLMOutput

from .configuration_sorted import SortedConfig


class SortedMlp(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.moe_intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.moe_intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.moe_intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN["silu"]

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class SortedRouter(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.correction = nn.Parameter(torch.empty(config.num_experts))

    def forward(self, hidden):
        assert not self.training
        scores = (hidden.flatten(0, 1).float() @ self.weight.float().t()).sigmoid()
        chosen = (scores + self.correction).topk(self.top_k, dim=-1, sorted=False).indices
        weights = scores.gather(1, chosen)
        return chosen, 2.5 * weights / (weights.sum(-1, keepdim=True) + 1e-20)


class SortedBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.experts = nn.ModuleList(SortedMlp(config) for _ in range(config.num_experts))
        self.gate = SortedRouter(config)
        self.shared_experts = SortedMlp(config)

    def forward(self, hidden):
        chosen, weights = self.gate(hidden)
        if not self.training:
            out = self.routed(hidden.flatten(0, 1), chosen, weights).view(hidden.shape)
        return out + self.shared_experts(hidden)

    @torch.no_grad()
    def routed(self, rows, chosen, weights):
        order = chosen.view(-1).argsort()
        ends = torch.bincount(chosen.view(-1), minlength=len(self.experts)).cumsum(0).tolist()
        sorted_rows, parts, start = rows[order // chosen.shape[1]], [], 0
        for e, end in enumerate(ends):
            if end > start:
                parts.append(self.experts[e](sorted_rows[start:end]))
            start = end
        outputs = torch.cat(parts)
        unsorted = torch.empty_like(outputs)
        unsorted[order] = outputs
        unsorted = unsorted.view(*chosen.shape, -1).type(weights.dtype)
        return (unsorted * weights[..., None]).sum(1).type(rows.dtype)


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


class SortedLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = SortedBlock(config)
        self.norm_1, self.norm_2 = nn.RMSNorm(config.hidden_size), nn.RMSNorm(config.hidden_size)

    def forward(self, x):
        x = x + self.self_attn(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class SortedPreTrainedModel(PreTrainedModel):
    config_class = SortedConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = False

    def _init_weights(self, module):
        for parameter in module.parameters(recurse=False):
            if "norm" not in type(module).__name__.lower():
                nn.init.normal_(parameter, std=self.config.initializer_range)


class SortedModel(SortedPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(SortedLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size)
        self.post_init()

    def forward(self, input_ids):
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class SortedForCausalLM(SortedPreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.model = SortedModel(config)
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
