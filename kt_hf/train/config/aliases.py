"""The names that users of LLaMA-Factory, axolotl and TRL know, and what became of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# Another name -> TRL's or ours, with the same meaning.
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
    "kto_chosen_weight": "desirable_weight",
    "kto_rejected_weight": "undesirable_weight",
    "reward_function": "reward_funcs",
    "reward_functions": "reward_funcs",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "neat_packing": "packing",
    "modules_to_save": "additional_target",
    "revision": "model_revision",
    "kt_cpu_activation": "kt_expert_activations",
    "kt_share_backward_bb": "kt_share_backward_weights",
}
# Another name -> (name, function of the value).
TRANSLATED: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "disable_gradient_checkpointing": ("activation_checkpointing", lambda value: not value),
    "group_by_length": ("train_sampling_strategy", lambda value: "group_by_length" if value else "random"),
    "use_reentrant_gc": ("activation_checkpointing_kwargs", lambda value: {"use_reentrant": value}),
    "train_on_prompt": ("completion_only_loss", lambda value: not value),
    "pref_loss": ("loss_type", lambda value: [value] if isinstance(value, str) else value),
    "pure_bf16": ("torch_dtype", lambda value: "bfloat16" if value else None),
}
# Of these names the value is true or false.
BOOLEANS = ("disable_gradient_checkpointing", "use_reentrant_gc", "train_on_prompt", "group_by_length", "pure_bf16")
_BY_PROCESSOR = "sizes of images are the processor's own (preprocessor_config.json)"
_NO_VIDEOS = "videos are not trained"
_BY_TARGET = "a tower is left alone unless lora_target names its layers"
_BY_ITSELF = "it is decided by the files and the machine"
# Taken without effect, and why.
IGNORED = {
    "overwrite_cache": "nothing is cached between runs",
    "use_fast_tokenizer": "the fast tokenizer is always used",
    "low_cpu_mem_usage": "weights are never held twice while loading",
    "save_safetensors": "adapters are always saved as safetensors",
    "preprocessing_batch_size": "TRL chooses it",
    "flash_attn": "transformers picks the attention kernel; attn_implementation names one",
    "upcast_layernorm": "LoRA trains in fp32 anyway",
    "compute_accuracy": "TRL logs the accuracy of tokens itself",
    "infer_backend": "no inference takes part",
    "infer_dtype": "no inference takes part",
    "ray_run_name": "Ray takes no part",
    "image_max_pixels": _BY_PROCESSOR,
    "image_min_pixels": _BY_PROCESSOR,
    "video_max_pixels": _NO_VIDEOS,
    "video_min_pixels": _NO_VIDEOS,
    "video_fps": _NO_VIDEOS,
    "video_maxlen": _NO_VIDEOS,
    "media_dir": "paths of images begin at the data's file, or where kt-hf is started",
    "freeze_vision_tower": _BY_TARGET,
    "freeze_multi_modal_projector": _BY_TARGET,
    "kt_threadpool_count": "threads are planned for the machine's NUMA nodes; kt_tp_enabled: false keeps to one",
    "kt_model_max_length": "buffers grow with the batches; kt_max_len bounds them",
    "kt_force_fused_expert_lora": "each expert has LoRA of its own",
    "kt_skip_expert_loading": "experts are always streamed to the operators",
    "kt_weight_lifecycle": _BY_ITSELF,
}
# Stage -> names that are taken without effect in it, and why.
_ONE_LOSS = {"pref_loss": "it is for stage: dpo"}
_NO_CUT = "GRPO cuts no prompt; max_completion_length bounds the answers"
NOT_IN_STAGE = {
    **dict.fromkeys(("kto", "orpo", "rm"), _ONE_LOSS),
    "grpo": dict.fromkeys(("cutoff_len", "max_length", "max_seq_length"), _NO_CUT),
}
# Refused unless null or false, and what to write instead.
REMOVED = {
    "kt_optimize_rule": "leave it out: experts are found by themselves, rule files are not used",
    "cpu_infer": "write kt_num_threads",
    "chunk_size": "write kt_max_len",
    "kt_non_expert_weight_path": "leave it out: all but the experts is read from model_name_or_path",
    "kt_expert_checkpoint_path": "leave it out: experts are read from model_name_or_path, or from kt_weight_path",
    "kt_use_lora_experts": "leave it out: the routed experts themselves have LoRA",
    "kt_lora_expert_num": "leave it out: the routed experts themselves have LoRA",
    "kt_lora_expert_intermediate_size": "leave it out: the routed experts themselves have LoRA",
    "use_unsloth": "leave it out: Unsloth's models have no experts that can be computed on the CPU",
    "use_unsloth_gc": "write activation_checkpointing",
    "load_in_4bit": "write quantization_bit: 4 (linear layers outside the experts)",
    "load_in_8bit": "write quantization_bit: 8 (linear layers outside the experts)",
    "create_new_adapter": "leave it out: adapter_name_or_path is trained on; kt-hf export --to merged merges one",
    "streaming": "leave it out: data is read before training",
    "tokenized_path": "leave it out: data is tokenised at each start",
    "loraplus_lr_embedding": "leave it out: loraplus_lr_ratio alone is taken",
    "use_dora": "leave it out: DoRA is not supported on experts",
    "pissa_init": "leave it out: PiSSA is not supported on experts",
    "pissa_convert": "leave it out: PiSSA is not supported on experts",
    "use_galore": "leave it out: LoRA is what is trained",
    "use_apollo": "leave it out: LoRA is what is trained",
    "use_badam": "leave it out: LoRA is what is trained",
    "use_muon": "leave it out: torch's Muon takes no experts' LoRA",
    "use_adam_mini": "write optim",
    "use_llama_pro": "leave it out: LoRA is what is trained",
    "use_swanlab": "write report_to: swanlab",
    "rope_scaling": "write it into the model's config.json",
    "shift_attn": "leave it out: the model's own attention is used",
    "resize_vocab": "leave it out: the vocabulary is the model's",
    "add_tokens": "leave it out: the vocabulary is the model's",
    "ref_model": "leave it out: the reference is the model without its adapter",
    "reward_model": "leave it out: stage: grpo takes reward_funcs, functions of a Python file",
    "pref_ftx": "leave it out: TRL's DPO adds the loss of SFT by loss_type: [sigmoid, sft] with loss_weights",
    "simpo_gamma": "leave it out: SimPO is none of TRL's losses of DPO",
    "do_predict": "leave it out: kt-hf train trains",
    "predict_with_generate": "leave it out: evaluation is by the loss",
    "export_dir": "leave it out: `kt-hf export ADAPTER FOLDER --to merged` writes a merged model",
    "gpu_memory_utilization": "leave it out: no inference server takes part",
    "device_map": "leave it out: the trainer places the model, kt_hf the experts",
    "max_prompt_length": "TRL cuts prompt and answer together: write max_length (stage: grpo cuts no prompt)",
}
# What expert weights are in kt_config.kt_expert_weight_format -> what to write; None: the files tell it themselves.
EXPERT_FORMATS = {
    "bf16": None,
    "fp8": None,
    "int8": "write kt_backend: AMXInt8 (quantised while loading, or once by `kt-hf quantize` for kt_weight_path)",
    "int4": "write kt_backend: AMXInt4 (quantised while loading, or once by `kt-hf quantize` for kt_weight_path)",
}
# Names of axolotl, LLaMA-Factory, Unsloth and plain habit -> what to write here.
MEANT = {
    **dict.fromkeys(
        ("batch_size", "micro_batch_size", "train_batch_size", "mini_batch_size", "bs"), "per_device_train_batch_size"
    ),
    **dict.fromkeys(("eval_batch_size", "val_batch_size"), "per_device_eval_batch_size"),
    **dict.fromkeys(("base_model", "model", "model_name", "model_path", "model_id"), "model_name_or_path"),
    **dict.fromkeys(("lr", "learningrate"), "learning_rate"),
    **dict.fromkeys(("epochs", "num_epochs", "n_epochs", "max_epochs"), "num_train_epochs"),
    **dict.fromkeys(("steps", "num_steps", "max_train_steps"), "max_steps"),
    **dict.fromkeys(
        ("sequence_len", "seq_len", "seq_length", "sequence_length", "max_seq_len", "max_len", "context_length",
         "model_max_length"), "cutoff_len",
    ),
    **dict.fromkeys(("grad_accum", "gradient_accumulation", "accumulation_steps"), "gradient_accumulation_steps"),
    **dict.fromkeys(
        ("datasets", "data", "data_path", "dataset_path", "dataset_name", "train_file", "train_data", "data_files"),
        "dataset",
    ),
    **dict.fromkeys(("test_datasets", "eval_data", "validation_file", "val_dataset", "valid_data"), "eval_dataset"),
    **dict.fromkeys(("val_set_size", "test_size", "validation_split"), "val_size"),
    **dict.fromkeys(("output", "out_dir", "save_dir", "output_path"), "output_dir"),
    **dict.fromkeys(("lora_r", "rank", "r"), "lora_rank"),
    **dict.fromkeys(("alpha",), "lora_alpha"),
    **dict.fromkeys(("lora_target_modules", "target_modules", "lora_target_linear"), "lora_target"),
    **dict.fromkeys(("lora_modules_to_save",), "additional_target"),
    **dict.fromkeys(("lora_model_dir", "adapter_path", "adapter_dir", "lora_path"), "adapter_name_or_path"),
    **dict.fromkeys(("adapter", "peft_type"), "finetuning_type"),
    **dict.fromkeys(("optimizer",), "optim"),
    **dict.fromkeys(("lr_scheduler", "scheduler"), "lr_scheduler_type"),
    **dict.fromkeys(("warmup",), "warmup_steps"),
    **dict.fromkeys(("sample_packing", "pack"), "packing"),
    **dict.fromkeys(("train_on_inputs",), "train_on_prompt"),
    **dict.fromkeys(("chat_template", "prompt_template", "conversation_template"), "template"),
    **dict.fromkeys(("flash_attention", "attention_implementation", "sdp_attention", "xformers_attention"),
                    "attn_implementation"),
    **dict.fromkeys(("resume", "resume_from", "auto_resume_from_checkpoints"), "resume_from_checkpoint"),
    **dict.fromkeys(("wandb_project", "use_wandb", "logger", "report"), "report_to"),
    **dict.fromkeys(("evals_per_epoch", "eval_interval", "val_steps"), "eval_steps"),
    **dict.fromkeys(("saves_per_epoch", "save_interval", "checkpoint_every"), "save_steps"),
    **dict.fromkeys(("log_interval", "log_every"), "logging_steps"),
    **dict.fromkeys(("num_workers",), "dataloader_num_workers"),
    **dict.fromkeys(("clip_grad", "gradient_clipping", "grad_clip"), "max_grad_norm"),
    **dict.fromkeys(("precision", "compute_dtype", "model_dtype"), "torch_dtype"),
    **dict.fromkeys(("threads", "num_threads", "cpu_threads"), "kt_num_threads"),
    **dict.fromkeys(("backend",), "kt_backend"),
    **dict.fromkeys(("loraplus_ratio", "lora_plus_ratio"), "loraplus_lr_ratio"),
}  # fmt: skip
# Values of other programs -> what to do instead, the end of a sentence.
INSTEAD = {
    "stage=ppo": "; TRL has no PPO any more: stage: grpo learns from rewards too",
    "stage=rlhf": "; stage: grpo learns from rewards",
    "stage=reward": "; a reward model is stage: rm",
    "stage=pretrain": "; plain text is stage: pt",
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
