"""Preference training with TRL's DPOTrainer as anyone would write it; the three lines marked (kt_hf) move the routed
experts to the CPU. Without them it is an ordinary TRL script.

    python scripts/dpo.py --model Qwen/Qwen3-30B-A3B --data pairs.jsonl --output_dir outputs/dpo

Data: `prompt`, `chosen` and `rejected`. The reference is the model with its adapter switched off. Every field of
DPOConfig is an option; `--precompute_ref_log_probs` computes the reference once, before training, which spares the
experts two forwards of each step.
"""

from __future__ import annotations

from dataclasses import dataclass

from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from trl import DPOConfig, DPOTrainer

from kt_hf import KTConfig, KTMoECallback, apply_kt_moe  # (kt_hf)


@dataclass
class Arguments:
    """What DPOConfig does not have."""

    model: str
    data: str  # a JSON Lines file
    lora_rank: int = 8


def main() -> None:
    arguments, args = HfArgumentParser((Arguments, DPOConfig)).parse_args_into_dataclasses()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="bfloat16")
    model = apply_kt_moe(model, KTConfig())  # (kt_hf)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    trainer = DPOTrainer(
        model,
        args=args,
        train_dataset=load_dataset("json", data_files=arguments.data, split="train"),
        processing_class=AutoTokenizer.from_pretrained(arguments.model),
        peft_config=LoraConfig(r=arguments.lora_rank, lora_alpha=2 * arguments.lora_rank, target_modules=targets),
        callbacks=[
            KTMoECallback(),  # (kt_hf)
        ],
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    main()
