"""Tiny random models of every family of transformers that has experts, made by shrinking the family's default config.

Sizes are set by their fields' names, in the config and in the configs inside of it, so that a family takes a line in
`CLASSES`, and a line in `SPECIAL` where its fields say more than sizes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

VOCAB = 96
# Field -> size, of any config that has the field.
SIZES = {
    "vocab_size": VOCAB, "unpadded_vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96,
    "moe_intermediate_size": 96, "shared_expert_intermediate_size": 32, "shared_experts_intermediate_size": 32,
    "shared_intermediate_size": 32, "dense_intermediate_size": 48, "expert_ffn_hidden_size": 96,
    "ffn_hidden_size": 96, "share_expert_dim": 32, "moe_hidden_size": 64,
    "num_hidden_layers": 3, "num_layers": 2, "num_dense_layers": 1, "first_k_dense_replace": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_sliding_attention_heads": 4,
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16, "kv_channels": 16,
    "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "moe_num_experts": 8,
    "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_k": 2, "moe_topk": 2, "top_k_experts": 2,
    "n_group": 2, "num_expert_group": 2, "topk_group": 1,
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "index_topk": 8, "index_head_dim": 16, "index_n_heads": 2, "index_block_size": 4, "index_topk_blocks": 2,
    "max_position_embeddings": 128, "sliding_window": 8, "sliding_window_size": 8, "attention_chunk_size": 8,
    "swiglu_limit": 0.5,
    "linear_num_heads": 4, "linear_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_chunk_size": 8, "mamba_dt_rank": 8,
    "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "chunk_size": 8, "n_groups": 2,
    "depth": 2, "encoder_layers": 2, "decoder_layers": 2, "out_hidden_size": 64, "image_size": 16,
    "patch_size": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_attention_heads": 4, "d_model": 64,
    "num_heads": 4, "num_nextn_predict_layers": 0, "num_mtp_layers": 0, "initializer_range": 0.1,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# Model type -> fields that say more than sizes: of the text config, or of a config beside it by that one's name.
SPECIAL: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 3},
    "beam": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "dbrx": {
        "num_hidden_layers": 2,
        "n_heads": 4,
        "max_seq_len": 128,
        "rope_parameters": ROPE,
        "ffn_config": {"moe_top_k": 2, "hidden_size": 64},
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
    },
    "deepseek_ocr2": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 8, "num_experts_per_tok": 2},
    "ernie4_5_vl_moe": {"moe_intermediate_size": [96, 96], "rope_parameters": ROPE | {"mrope_section": [3, 3, 2]}},
    "gemma4": {"enable_moe_block": True, "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8},
    "glm4v_moe": {"rope_parameters": ROPE | {"mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}},
    "glm5_next": {"index_kpool": 4, "hc_mult": 2, "qk_rope_head_dim": 0, "num_hidden_layers": 4},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "hy_v4_vl": {"rope_parameters": ROPE | {"mrope_section": [2, 1, 1]}},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "longcat_flash": {"zero_expert_num": 4, "head_dim": 8},
    "nllb_moe": {"pad_token_id": 1},
    "muse_spark": {"audio_config": {"num_hidden_layers": 4, "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}},
    "qwen3_5_moe": {"num_hidden_layers": 4},
    "qwen3_next": {"num_hidden_layers": 4},
    "qwen4_exp": {
        "num_hidden_layers": 4,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "step3p7": {"pad_token_id": 1, "mlp_layer_types": ["dense", "sparse", "sparse"], "swiglu_limits": [0.0, 0.5, 0.0]},
    "zaya": {"num_experts_per_tok": 1},
}
# Model type -> class.
CLASSES = {
    "afmoe": "AfmoeForCausalLM",
    "axk1": "AXK1ForCausalLM",
    "axk2": "AXK2ForCausalLM",
    "bailing_hybrid": "BailingHybridForCausalLM",
    "cohere2_moe": "Cohere2MoeForCausalLM",
    "deepseek_ocr2": "DeepseekOcr2ForConditionalGeneration",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v32": "DeepseekV32ForCausalLM",
    "dots1": "Dots1ForCausalLM",
    "dots3_note": "Dots3NoteForCausalLM",
    "ernie4_5_moe": "Ernie4_5_MoeForCausalLM",
    "ernie4_5_vl_moe": "Ernie4_5_VLMoeForConditionalGeneration",
    "exaone_moe": "ExaoneMoeForCausalLM",
    "flex_olmo": "FlexOlmoForCausalLM",
    "flint": "FlintForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "glm4_moe_lite": "Glm4MoeLiteForCausalLM",
    "glm4v_moe": "Glm4vMoeForConditionalGeneration",
    "glm_moe_dsa": "GlmMoeDsaForCausalLM",
    "granitemoe": "GraniteMoeForCausalLM",
    "granitemoe_swa": "GraniteMoeSWAForCausalLM",
    "granitemoehybrid": "GraniteMoeHybridForCausalLM",
    "granitemoeshared": "GraniteMoeSharedForCausalLM",
    "hunyuan_v1_moe": "HunYuanMoEV1ForCausalLM",
    "hy_v3": "HYV3ForCausalLM",
    "jamba": "JambaForCausalLM",
    "kimi_linear": "KimiLinearForCausalLM",
    "kolibri1": "Kolibri1ForCausalLM",
    "laguna": "LagunaForCausalLM",
    "lara_mini": "LaraMiniForCausalLM",
    "mellum": "MellumForCausalLM",
    "mimo_v2_flash": "MiMoV2FlashForCausalLM",
    "minimax": "MiniMaxForCausalLM",
    "minimax_m2": "MiniMaxM2ForCausalLM",
    "mistral4": "Mistral4ForCausalLM",
    "mistral_large4": "MistralLarge4ForConditionalGeneration",
    "mixtral": "MixtralForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "phimoe": "PhimoeForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_5_moe": "Qwen3_5MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen3_next": "Qwen3NextForCausalLM",
    "qwen3_omni_moe": "Qwen3OmniMoeThinkerForConditionalGeneration",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
    "qwen4_exp": "Qwen4ExpForCausalLM",
    "solar_open": "SolarOpenForCausalLM",
    "unlimited_ocr": "UnlimitedOcrForConditionalGeneration",
    "zaya": "ZayaForCausalLM",
    "gemma4": "Gemma4ForCausalLM",
    "nemotron_h": "NemotronHForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "deepseek_v4": "DeepseekV4ForCausalLM",
    "llama4": "Llama4ForCausalLM",
    "diffusion_gemma": "DiffusionGemmaModel",
    "step3p7": "Step3p7ForConditionalGeneration",
    "minimax_m3_vl": "MiniMaxM3VLForCausalLM",
    "muse_spark": "MuseSparkForConditionalGeneration",
    "inkling": "InklingForCausalLM",
    "inkling2": "Inkling2ForCausalLM",
    "inkling2_loop": "Inkling2LoopForCausalLM",
    "dbrx": "DbrxForCausalLM",
    "lfm2_moe": "Lfm2MoeForCausalLM",
    "aria": "AriaTextForCausalLM",
    "jetmoe": "JetMoeForCausalLM",
    "longcat_flash": "LongcatFlashForCausalLM",
    "beam": "BeamForCausalLM",
    "doge": "DogeForCausalLM",
    "glm5_next": "Glm5NextForConditionalGeneration",
    "hy_v4": "HYV4ForCausalLM",
    "hy_v4_vl": "HYV4VLForConditionalGeneration",
    "nllb_moe": "NllbMoeForConditionalGeneration",
    "openai_privacy_filter": "OpenAIPrivacyFilterModel",
    "switch_transformers": "SwitchTransformersForConditionalGeneration",
}
# Model type -> why it is not trained here.
REFUSED = {
    "doge": "no routed experts",
    "jetmoe": "experts of a form that is not supported",
    "nllb_moe": "no routed experts",
    "openai_privacy_filter": "is a token classifier",
    "switch_transformers": "experts of a form that is not supported",
}


def config_of(family: str) -> PreTrainedConfig:
    """The family's config, made small; the test is skipped where transformers does not have the family yet."""
    if not hasattr(transformers, CLASSES[family]):
        pytest.skip(f"transformers {transformers.__version__} has no {CLASSES[family]}")
    kind = getattr(transformers, CLASSES[family]).config_class
    return _small(kind, SPECIAL.get(family, {}))


def _small(kind: type[PreTrainedConfig], special: dict[str, Any]) -> PreTrainedConfig:
    default = kind()
    text = default.get_text_config()
    values: dict[str, Any] = {}
    for name in default.sub_configs:
        part = getattr(default, name, None)
        if part is not None:
            inner = special if part.get_text_config() is text else special.get(name, {})
            values[name] = _small(type(part), inner)
    fields = default.to_dict()
    values |= {name: size for name, size in SIZES.items() if name in fields}
    if "qk_rope_head_dim" in fields:  # multi-head latent attention: as many heads of keys, head_dim follows
        values.pop("head_dim", None)
        values["num_key_value_heads"] = values["num_attention_heads"]
    own = {name: value for name, value in special.items() if name not in default.sub_configs}
    return kind(**values | (own if default is text else {}))


def tiny(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """The family's tiny model, with random weights that are exact in bf16.

    The test is skipped where this transformers has the family's experts in a form that is refused, and a later one not.
    """
    config = config_of(family)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, CLASSES[family])._from_config(config).float()
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):  # zero as built: a router that ignored it went unnoticed
                buffer.normal_(std=0.1)
            elif name.endswith("tid2eid"):  # experts by token
                buffer.copy_(torch.stack([torch.randperm(8)[: buffer.shape[1]] for _ in buffer]))
    fused = any(name.endswith("gate_up_proj") for name, _ in model.named_parameters())
    if family == "aria" and not fused:
        pytest.skip(f"transformers {transformers.__version__} does not have Aria's experts in fused form")
    for parameter in model.parameters():  # not the buffers, which a checkpoint does not have
        parameter.data = parameter.data.to(torch.bfloat16).to(dtype)
    return model.eval()
