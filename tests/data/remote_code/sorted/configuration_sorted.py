from transformers import PreTrainedConfig


class SortedConfig(PreTrainedConfig):
    model_type = "sorted"

    def __init__(
        self, hidden_size=64, moe_intermediate_size=96, num_experts=8, num_experts_per_tok=2, noise=0.0, **more
    ):
        self.hidden_size = hidden_size
        self.moe_intermediate_size = moe_intermediate_size
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.noise = noise
        self.num_hidden_layers = 2
        self.num_attention_heads = 4
        self.num_key_value_heads = 4
        self.vocab_size = 96
        self.initializer_range = 0.1
        super().__init__(**more)
