"""A tiny random Mixtral with a byte-level tokenizer in a folder, as a user would have a model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from kt_hf.train.config.read import read_arguments
from kt_hf.train.run import run

ROOT = Path(__file__).parents[2]
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The same with the answers marked, as TRL needs it to train on several of a conversation.
MARKED = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>\n{% endgeneration %}"
    "{% else %}{{ message.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(chat_template: str | None = CHAT) -> PreTrainedTokenizerFast:
    """Bytes and three special tokens: a vocabulary of 259."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: index for index, token in enumerate([*alphabet, *specials])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(specials)
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=specials[0], pad_token=specials[0])
    made.chat_template = chat_template
    return made


def save_model(folder: Path, chat_template: str | None = CHAT, layers: int = 2) -> Path:
    """A Mixtral of hidden size 64 with four experts in bf16, and its tokenizer."""
    config = MixtralConfig(
        vocab_size=259, hidden_size=64, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=512,
        dtype=torch.bfloat16, bos_token_id=None, eos_token_id=256,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer(chat_template).save_pretrained(folder)
    return folder


def write_yaml(file: Path, **settings: object) -> Path:
    file.write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return file


def environment(home: Path) -> dict[str, str]:
    """Of a subprocess: the source tree, one thread, no network, caches in `home`."""
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"), "1")
    return os.environ | offline | {
        "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(home / "hf"),
        "COLUMNS": "200",
    }  # fmt: skip


def kt_hf(*arguments: str, cwd: Path, timeout: float = 500) -> subprocess.CompletedProcess[str]:
    """`kt-hf ARGUMENTS` in a new process."""
    return subprocess.run(
        [sys.executable, "-m", "kt_hf.cli", *arguments],
        cwd=cwd,
        env=environment(cwd),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def trained(folder: Path, model: Path, rows: list[dict[str, Any]], *overrides: str) -> tuple[dict[str, Any], str]:
    """(summary, what was printed) of a step on `rows`."""
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = write_yaml(
        folder / "run.yaml",
        model_name_or_path=str(model), dataset=str(folder / "data.jsonl"), output_dir=str(folder / "out"),
        max_steps=1, logging_steps=1, max_length=128, per_device_train_batch_size=2, kt_backend="torch",
        save_strategy="no", activation_checkpointing=False,
    )  # fmt: skip
    console = Console(record=True, width=200, quiet=False, file=(folder / "log").open("w"))
    return run(read_arguments(file, overrides), console), console.export_text()
