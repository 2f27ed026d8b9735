"""A reward model with TRL's RewardTrainer as anyone would write it; the three lines marked (kt_hf) move the routed
experts to the CPU. Without them it is an ordinary TRL script.

    python scripts/rm.py --model Qwen/Qwen3-30B-A3B --data pairs.jsonl --output_dir outputs/rm

Data: `chosen` and `rejected`, as the trainer takes them. The score head begins with random values (`--seed`), is
trained as a whole and saved with the adapter. Every field of RewardConfig is an option.
"""

from __future__ import annotations

from dataclasses import dataclass

from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser, set_seed
from trl import RewardConfig, RewardTrainer

from kt_hf import KTConfig, KTMoECallback, apply_kt_moe  # (kt_hf)


@dataclass
class Arguments:
    """What RewardConfig does not have."""

    model: str
    data: str  # a JSON Lines file
    lora_rank: int = 8


def main() -> None:
    arguments, args = HfArgumentParser((Arguments, RewardConfig)).parse_args_into_dataclasses()
    set_seed(args.seed)
    model = AutoModelForSequenceClassification.from_pretrained(arguments.model, num_labels=1, dtype="bfloat16")
    model = apply_kt_moe(model, KTConfig())  # (kt_hf)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    trainer = RewardTrainer(
        model,
        args=args,
        train_dataset=load_dataset("json", data_files=arguments.data, split="train"),
        processing_class=AutoTokenizer.from_pretrained(arguments.model),
        peft_config=LoraConfig(
            task_type="SEQ_CLS",  # by which PEFT trains and saves the score head
            r=arguments.lora_rank,
            lora_alpha=2 * arguments.lora_rank,
            target_modules=targets,
        ),
        callbacks=[
            KTMoECallback(),  # (kt_hf)
        ],
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    main()
