"""The names that users of LLaMA-Factory, axolotl and TRL know, and what became of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# Older name -> TRL's or ours, with the same meaning.
RENAMED = {
    "cutoff_len": "max_length",
    "max_seq_length": "max_length",
    "preprocessing_num_workers": "dataset_num_proc",
    "warmup_ratio": "warmup_steps",  # below 1 it is a share of all steps
    "evaluation_strategy": "eval_strategy",
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
    "dtype": "torch_dtype",
    "enable_liger_kernel": "use_liger_kernel",
    "pref_beta": "beta",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "neat_packing": "packing",
}
# Older name -> (name, function of the value).
TRANSLATED: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "disable_gradient_checkpointing": ("activation_checkpointing", lambda value: not value),
    "group_by_length": ("train_sampling_strategy", lambda value: "group_by_length" if value else "random"),
    "use_reentrant_gc": ("activation_checkpointing_kwargs", lambda value: {"use_reentrant": value}),
    "train_on_prompt": ("completion_only_loss", lambda value: not value),
    "pref_loss": ("loss_type", lambda value: [value] if isinstance(value, str) else value),
}
# Of these older names the value is true or false.
BOOLEANS = ("disable_gradient_checkpointing", "use_reentrant_gc", "train_on_prompt", "group_by_length")
# Taken without effect, and why.
IGNORED = {
    "overwrite_cache": "nothing is cached between runs",
    "use_fast_tokenizer": "the fast tokenizer is always used",
    "low_cpu_mem_usage": "weights are never held twice while loading",
    "save_safetensors": "adapters are always saved as safetensors",
    "preprocessing_batch_size": "TRL chooses it",
    "flash_attn": "transformers picks the attention kernel (sdpa)",
    "upcast_layernorm": "LoRA trains in fp32 anyway",
}
# Refused, and what to write instead.
REMOVED = {
    "kt_optimize_rule": "leave it out: experts are found by themselves, rule files are not used",
    "cpu_infer": "write kt_num_threads",
    "chunk_size": "write kt_max_len",
    "use_unsloth": "leave it out: Unsloth's models have no experts that can be computed on the CPU",
    "quantization_bit": "leave it out: bitsandbytes cannot quantise packed experts",
    "load_in_4bit": "leave it out: bitsandbytes cannot quantise packed experts",
    "load_in_8bit": "leave it out: bitsandbytes cannot quantise packed experts",
    "adapter_name_or_path": "use resume_from_checkpoint to go on with a run",
    "streaming": "leave it out: data is read before training",
    "tokenized_path": "leave it out: data is tokenised at each start",
    "loraplus_lr_ratio": "leave it out: LoRA+ is not supported",
    "use_dora": "leave it out: DoRA is not supported on experts",
    "pissa_init": "leave it out: PiSSA is not supported on experts",
    "gpu_memory_utilization": "leave it out: no inference server takes part",
    "device_map": "leave it out: the trainer places the model, kt_hf the experts",
    "max_prompt_length": "TRL cuts prompt and answer together: write max_length",
}
# LLaMA-Factory's templates, which people's files name. Only the fall-backs are used: tokenizers bring their own.
FALLBACK_TEMPLATES = ("chatml", "alpaca")
TEMPLATES = {
    *FALLBACK_TEMPLATES,
    *(
        "default",
        "empty",
        "deepseek",
        "deepseek2",
        "deepseek3",
        "deepseekr1",
        "deepseekcoder",
        "qwen",
        "qwen2",
        "qwen3",
    ),
    *("qwen3_nothink", "mistral", "mistral_small", "mixtral", "llama2", "llama3", "glm4", "glm4_moe", "minimax"),
    *("olmo", "olmoe", "ernie", "ernie_nothink", "hunyuan", "kimi", "gpt", "phi", "phi4", "gemma", "vicuna", "zephyr"),
    *("smollm", "smollm2", "granite3", "dots", "bailing", "seed_oss", "yi", "internlm2", "baichuan2", "chatglm3"),
}
# What LLaMA-Factory's short data set names stand for on the hub.
KNOWN_DATASETS = {
    "alpaca_en": "llamafactory/alpaca_en",
    "alpaca_zh": "llamafactory/alpaca_zh",
    "alpaca_gpt4_en": "llamafactory/alpaca_gpt4_en",
    "alpaca_gpt4_zh": "llamafactory/alpaca_gpt4_zh",
}
