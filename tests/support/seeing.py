"""Tiny models that see, with their processors, in a folder as a user would have them: no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from tokenizers import AddedToken

from tests.support.families import config_of
from tests.support.tiny import tokenizer

_QWEN = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_GEMMA = ("<|image|>", "<|image>", "<image|>", "<|audio|>", "<|video|>", "<|audio>", "<audio|>")
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}IMAGE{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_seeing(family: str, folder: Path) -> Path:
    """A tiny Qwen3-VL-MoE or Gemma 4 with experts, in fp32, and its processor."""
    words = tokenizer(None)
    extra = _QWEN if family == "qwen3_vl_moe" else _GEMMA
    words.add_special_tokens({"additional_special_tokens": [AddedToken(word, special=True) for word in extra]})
    ids = dict(zip(extra, words.convert_tokens_to_ids(list(extra)), strict=True))
    processor = (_qwen if family == "qwen3_vl_moe" else _gemma)(words)
    processor.save_pretrained(folder)
    config = config_of(family)
    if family == "qwen3_vl_moe":
        config.image_token_id, config.video_token_id = ids["<|image_pad|>"], ids["<|video_pad|>"]
        config.vision_start_token_id, config.vision_end_token_id = ids["<|vision_start|>"], ids["<|vision_end|>"]
    else:
        sizes = dict.fromkeys(("hidden_size", "intermediate_size"), 32) | {"patch_size": 4, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "position_embedding_size": 256}
        vision = transformers.Gemma4VisionConfig(**sizes)
        config = transformers.Gemma4Config(text_config=config, vision_config=vision, audio_config=None)
        config.image_token_id, config.boi_token_id, config.eoi_token_id = (ids[word] for word in extra[:3])
    text = config.get_text_config()
    text.vocab_size = len(words) + 4
    text.eos_token_id = words.eos_token_id
    name = {"qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration", "gemma4": "Gemma4ForConditionalGeneration"}[family]
    if hasattr(text, "vocab_size_per_layer_input"):
        text.vocab_size_per_layer_input = text.vocab_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        getattr(transformers, name)._from_config(config).float().save_pretrained(folder)
    return folder


def _qwen(words: Any) -> Any:
    image = transformers.Qwen2VLImageProcessor(patch_size=4, merge_size=2, min_pixels=64, max_pixels=1024)
    video = transformers.Qwen3VLVideoProcessor(patch_size=4, merge_size=2)
    template = _TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    return transformers.Qwen3VLProcessor(image, words, video, chat_template=template)


def _gemma(words: Any) -> Any:
    names = ("image_token", "boi_token", "eoi_token", "audio_token", "video_token", "boa_token", "eoa_token")
    named = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words.backend_tokenizer, eos_token=words.eos_token, pad_token=words.pad_token,
        extra_special_tokens=dict(zip(names, _GEMMA, strict=True)),
    )  # fmt: skip
    image = transformers.Gemma4ImageProcessor(patch_size=4, max_soft_tokens=70)
    video = transformers.Gemma4VideoProcessor(patch_size=4, max_soft_tokens=70)
    audio, template = transformers.Gemma4AudioFeatureExtractor(), _TEMPLATE.replace("IMAGE", "<|image|>")
    return transformers.Gemma4Processor(audio, image, named, video, chat_template=template, image_seq_length=70)


def images_in(folder: Path, count: int) -> list[str]:
    """Files of images of one color each, by their names."""
    names = []
    for index in range(count):
        names.append(f"{index}.png")
        Image.new("RGB", (32, 24), (255 * (index % 2), 40 * index, 90)).save(folder / names[-1])
    return names
