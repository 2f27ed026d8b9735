"""Writes the folders beside this file; tests/test_compatibility.py loads them with the code of today.

    PYTHONPATH=CHECKOUT_OF_0.1.0 python write.py adapters    # any CPU
    PYTHONPATH=CHECKOUT_OF_0.1.0 python write.py quantized   # a CPU with AVX512-BF16 or AMX

It uses nothing but what 0.1.0 had in public, and is kept as the record of how the files came about.
"""

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import torch
from peft import get_peft_model
from safetensors.torch import save_file
from transformers import MixtralConfig, MixtralForCausalLM, Trainer, TrainingArguments

from kt_hf import KTConfig, KTMoECallback, apply_kt_moe, kt_lora_config
from kt_hf.adapters import convert

HERE = Path(__file__).parent
IDS = torch.arange(24).reshape(2, 12) * 5 % 32


def base_model() -> None:
    """A one-layer Mixtral of 3 experts, top-2, in bf16. The weights are saved, not only their seed."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, num_local_experts=3, num_experts_per_tok=2, max_position_embeddings=32,
        initializer_range=0.1, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    MixtralForCausalLM(config).bfloat16().save_pretrained("model")


def patched(dtype: torch.dtype = torch.float32, **config: object) -> MixtralForCausalLM:
    model = MixtralForCausalLM.from_pretrained("model", dtype=dtype)
    return apply_kt_moe(model, KTConfig(**{"kt_backend": "torch", "kt_lora_rank": 2, "kt_num_threads": 1} | config))


def adapted(**config: object) -> torch.nn.Module:
    model = patched(**config)
    model = get_peft_model(model, kt_lora_config(model, lora_rank=2, lora_alpha=3))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits.float().contiguous()


def checksums(model: torch.nn.Module) -> dict[str, str]:
    """sha256 of each LoRA parameter's bytes."""
    return {
        name: hashlib.sha256(parameter.detach().contiguous().numpy().tobytes()).hexdigest()
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }


def trainer(model: torch.nn.Module, **settings: object) -> Trainer:
    rows = [{"input_ids": ids, "labels": ids} for ids in (torch.arange(8 * 10).reshape(8, 10) * 7 % 32)]
    arguments = TrainingArguments(
        output_dir="run", use_cpu=True, report_to=[], disable_tqdm=True, per_device_train_batch_size=2,
        learning_rate=0.01, lr_scheduler_type="constant", logging_steps=1, seed=0, save_strategy="steps", save_steps=2,
        dataloader_pin_memory=False, gradient_checkpointing=False, **settings,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=rows, callbacks=[KTMoECallback()])


def adapters() -> None:
    base_model()
    model = adapted()
    model.save_pretrained("kt")
    tensors = {"kt": logits(model)}
    expected: dict[str, object] = {"kt": checksums(model)}
    for to in ("peft", "per-expert", "fused"):
        convert("kt", to, to=to, base="model")

    run = trainer(adapted(), max_steps=2)
    run.train()
    shutil.move("run/checkpoint-2", "checkpoint-2")
    shutil.rmtree("run")
    Path("checkpoint-2/training_args.bin").unlink()  # holds the machine's paths; a Trainer that resumes needs it not
    tensors["checkpoint-2"], expected["checkpoint-2"] = logits(run.model), checksums(run.model)
    again = trainer(adapted(), max_steps=4)
    again.train(resume_from_checkpoint="checkpoint-2")
    losses = [entry["loss"] for entry in again.state.log_history if "loss" in entry]
    expected["losses of steps 1 to 4"] = losses
    tensors["after 4 steps"] = logits(again.model)
    shutil.rmtree("run")
    for card in Path().rglob("README.md"):  # PEFT's model cards
        if card.parent != Path():
            card.unlink()
    save_file(tensors, "expected.safetensors")
    Path("expected.json").write_text(json.dumps(expected, indent=1) + "\n")


def quantized() -> None:
    from kt_hf.quantized.command import run

    run("model", Path("int8"), "AMXInt8", pools=1)
    model = adapted(dtype=torch.bfloat16, kt_backend="AMXInt8", kt_weight_path="int8")
    save_file({"int8": logits(model)}, "expected-int8.safetensors")


if __name__ == "__main__":
    os.chdir(HERE)
    {"adapters": adapters, "quantized": quantized}[sys.argv[1]]()
