"""The models of the GPU benchmarks: DeepSeek-V2-Lite's shape, or Qwen3-MoE's with the same sizes, random weights."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DeepseekV3Config, Qwen3MoeConfig

from kt_hf.experts.projections import ExpertLora

CONFIG = Path(__file__).parents[2] / "kt_hf/builtin/model_configs/deepseek-ai/DeepSeek-V2-Lite-Chat.json"
TINY = {"hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 96, "vocab_size": 512, "kv_lora_rank": 16,
        "num_attention_heads": 2, "num_key_value_heads": 2, "n_routed_experts": 16, "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16, "head_dim": 16, "v_head_dim": 16}  # fmt: skip
QWEN = {"hidden_size": 2048, "moe_intermediate_size": 1408, "intermediate_size": 10944, "num_experts": 64,
        "num_experts_per_tok": 6, "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 128,
        "vocab_size": 102400, "mlp_only_layers": [0], "norm_topk_prob": True}  # fmt: skip
QWEN_30B = {"hidden_size": 2048, "moe_intermediate_size": 768, "intermediate_size": 6144, "num_experts": 128,
            "num_experts_per_tok": 8, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
            "vocab_size": 151936, "mlp_only_layers": [], "norm_topk_prob": True}  # fmt: skip
QWEN_235B = QWEN_30B | {"hidden_size": 4096, "moe_intermediate_size": 1536, "intermediate_size": 12288,
                        "num_attention_heads": 64}  # fmt: skip
QWENS = {"qwen3_moe": QWEN, "qwen3_30b": QWEN_30B, "qwen3_235b": QWEN_235B}


def make_config(family: str, shape: str, layers: int) -> Any:
    """`qwen3_30b` has the sizes of Qwen3-30B-A3B's layers, `qwen3_moe` those of DeepSeek-V2-Lite's, and so on.

    Every layer of `deepseek_v3` has experts.
    """
    if family in QWENS:
        real = QWENS[family]
        sizes = {name: TINY.get(name, value) for name, value in real.items()} if shape == "tiny" else real
        if shape == "tiny" and family != "qwen3_moe":
            sizes = sizes | {"num_experts": 16, "num_experts_per_tok": 4}
        config = Qwen3MoeConfig(**sizes, num_hidden_layers=layers, architectures=["Qwen3MoeForCausalLM"],
                                router_aux_loss_coef=0.0)  # fmt: skip  # TRL's auxiliary loss does not generate
    elif family == "deepseek_v3":
        sizes = {name: TINY[name] for name in TINY.keys() - {"head_dim"}} if shape == "tiny" else {}
        small = {"q_lora_rank": 16, "n_group": 4, "topk_group": 2} if shape == "tiny" else {}
        config = DeepseekV3Config(**sizes | small, num_hidden_layers=layers, first_k_dense_replace=0,
                                  architectures=["DeepseekV3ForCausalLM"])  # fmt: skip
    else:
        config = AutoConfig.from_pretrained(CONFIG)
        config.num_hidden_layers = layers
        for name, value in (TINY if shape == "tiny" else {}).items():
            setattr(config, name, value)
    config.use_cache = False
    return config


def experts_of(config: Any) -> int:
    return int(getattr(config, "n_routed_experts", None) or config.num_experts)


@torch.no_grad()
def make_model(config: Any, device: torch.device, stock: bool, own_memory: bool = False, experts: bool = True) -> Any:
    """Random weights: all but the experts on `device`; the experts shared by all layers on the CPU, or with `stock`
    each layer's own on `device`, or with `own_memory` on the CPU, or without `experts` on the meta device."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    shared: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            if name.endswith(".experts"):
                if not experts:
                    continue
                if key not in shared:
                    made = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device).normal_(std=0.02)
                    shared[key] = made if stock else made.cpu()
                value = shared[key].clone() if stock or own_memory else shared[key]
            else:
                value = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
                value = value.fill_(1) if "norm" in name else value.normal_(std=0.02)
            setattr(module, key, nn.Parameter(value, requires_grad=False))
        for key, buffer in list(module.named_buffers(recurse=False)):
            if key == "e_score_correction_bias":
                module.register_buffer(key, torch.zeros(buffer.shape, dtype=torch.float32, device=device))
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    left = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    left = [name for name in left if experts or ".experts." not in name]
    assert not left, f"still without values: {left}"
    return model


@torch.no_grad()
def make_fp8_checkpoint(config: Any, folder: Path, device: torch.device | str = "cpu") -> None:
    """Random weights as DeepSeek-V3's are saved, a file a layer: experts in FP8 with a scale for each 128 x 128.

    They are drawn on `device`: the 2.4 billion outside of three layers' experts take the CPU half a minute.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    rest: dict[str, Tensor] = {}
    experts: dict[str, dict[str, Tensor]] = {}
    for name, t in model.state_dict().items():
        if ".experts." in name:
            experts.setdefault(name.rpartition(".experts.")[0], {})[name.rpartition(".")[2]] = t
        else:
            made = torch.empty(t.shape, dtype=torch.bfloat16, device=device)
            rest[name] = (made.fill_(1) if "norm" in name else made.normal_(std=0.02)).cpu()
    weight_map = dict.fromkeys(rest, "rest.safetensors")
    save_file(rest, folder / "rest.safetensors", {"format": "pt"})
    random = torch.randn(4096).to(torch.float8_e4m3fn).view(torch.uint8)
    for number, (layer, stacks) in enumerate(experts.items()):
        content: dict[str, Tensor] = {}
        count, double, hidden = stacks["gate_up_proj"].shape
        wide = (double // 2, hidden)
        for (projection, size), e in itertools.product(
            (("gate", wide), ("up", wide), ("down", wide[::-1])), range(count)
        ):
            name, elements = f"{layer}.experts.{e}.{projection}_proj.weight", size[0] * size[1]
            values = random.roll(e).repeat(-(-elements // 4096))[:elements]
            content[name] = values.view(size).view(torch.float8_e4m3fn)
            content[f"{name}_scale_inv"] = torch.full([-(-n // 128) for n in size], 0.02)
        file = f"layer-{number}.safetensors"
        save_file(content, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(content, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = copy.deepcopy(config)
    config.quantization_config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)


def adapted(model: Any, rank: int, device: torch.device, experts_too: bool = True) -> Any:
    attention = {"q_proj", "k_proj", "v_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
    names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    targets = sorted(attention & names) + (["gate_proj", "up_proj", "down_proj"] if experts_too else [])
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)).to(device)
    model.enable_input_require_grads()
    return model.train()


@torch.no_grad()
def start_again(model: Any, lora_device: str, device: torch.device) -> None:
    """The LoRA values of a fresh run, equal in all runs, on the device asked for."""
    for module in model.modules():
        if isinstance(module, ExpertLora):
            module.follow_to_gpu = lora_device == "gpu"
            module.weight.data = module.weight.data.to(device if module.follow_to_gpu else "cpu")
    same_lora(model)


@torch.no_grad()
def same_lora(model: Any) -> None:
    """The LoRA values of a fresh run, equal in all runs, where the parameters are."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        parameter.grad = None
        if "lora_A" in name:
            bound = parameter.shape[-1] ** -0.5
            parameter.copy_(torch.rand(parameter.shape, generator=generator) * 2 * bound - bound)
        elif "lora_B" in name:
            parameter.zero_()


def set_checkpointing(model: Any, on: bool) -> None:
    if on:
        kwargs = {"use_reentrant": getattr(model, "reentrant", False)}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    else:
        model.gradient_checkpointing_disable()
