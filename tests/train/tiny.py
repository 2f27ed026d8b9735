"""A tiny random Mixtral with a byte-level tokenizer in a folder, as a user would have a model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

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
