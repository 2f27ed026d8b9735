"""GRPO with TRL's GRPOTrainer as anyone would write it; the three lines marked (kt_hf) move the routed experts to the
CPU. Without them it is an ordinary TRL script.

    python scripts/grpo.py --model Qwen/Qwen3-30B-A3B --data questions.jsonl --output_dir outputs/grpo

Data: `prompt`, and `answer`, by which the reward function below judges what the model writes. The patched model itself
generates; the reference is the model without its adapter. Every field of GRPOConfig is an option.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from trl import GRPOConfig, GRPOTrainer

from kt_hf import KTConfig, KTMoECallback, apply_kt_moe  # (kt_hf)


@dataclass
class Arguments:
    """What GRPOConfig does not have."""

    model: str
    data: str  # a JSON Lines file
    lora_rank: int = 8


def right(completions: list[Any], answer: list[str], **kwargs: Any) -> list[float]:
    """1 for what holds the answer, else 0; completions are text, or messages where prompts are."""
    texts = [completion if isinstance(completion, str) else completion[0]["content"] for completion in completions]
    return [float(expected in text) for expected, text in zip(answer, texts, strict=True)]


def main() -> None:
    arguments, args = HfArgumentParser((Arguments, GRPOConfig)).parse_args_into_dataclasses()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="bfloat16")
    model = apply_kt_moe(model, KTConfig())  # (kt_hf)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    trainer = GRPOTrainer(
        model,
        reward_funcs=[right],
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
