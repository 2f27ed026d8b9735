"""Tiny models that see, with their processors, in a folder as a user would have them: no network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from tokenizers import AddedToken

from tests.support.families import SIZES, config_of
from tests.support.tiny import tokenizer

_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}IMAGE{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Seeing:
    """A family that sees.

    Attributes:
        kind: Its model's class.
        tokens: Token -> the field of its configuration that has its id; "" for none.
        processor: Of a tokenizer that has these tokens.
        config: The tiny model's, of the language model's.
    """

    kind: str
    tokens: dict[str, str]
    processor: Callable[[Any], Any]
    config: Callable[[Any], Any] = lambda config: config


def save_seeing(family: str, folder: Path) -> Path:
    """A tiny model of a family of `FAMILIES`, in fp32, and its processor."""
    parts, words = FAMILIES[family], tokenizer(None)
    extra = list(parts.tokens)
    words.add_special_tokens({"additional_special_tokens": [AddedToken(word, special=True) for word in extra]})
    parts.processor(words).save_pretrained(folder)
    config = parts.config(config_of(family))
    for field, number in zip(parts.tokens.values(), words.convert_tokens_to_ids(extra), strict=True):
        if field:
            setattr(config, field, number)
    text = config.get_text_config()
    text.vocab_size = len(words) + 4
    text.eos_token_id, text.pad_token_id = words.eos_token_id, words.pad_token_id
    if hasattr(text, "vocab_size_per_layer_input"):
        text.vocab_size_per_layer_input = text.vocab_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        getattr(transformers, parts.kind)._from_config(config).float().save_pretrained(folder)
    return folder


def _qwen(words: Any) -> Any:
    image = transformers.Qwen2VLImageProcessor(patch_size=4, merge_size=2, min_pixels=64, max_pixels=1024)
    video = transformers.Qwen3VLVideoProcessor(patch_size=4, merge_size=2)
    template = _TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    return transformers.Qwen3VLProcessor(image, words, video, chat_template=template)


def _glm(words: Any) -> Any:
    size = {"shortest_edge": 128, "longest_edge": 2048}  # pixels, of two frames
    image = transformers.Glm4vImageProcessor(patch_size=4, merge_size=2, size=size)
    video = transformers.Glm4vVideoProcessor(patch_size=4, merge_size=2)
    template = _TEMPLATE.replace("IMAGE", "<|begin_of_image|><|image|><|end_of_image|>")
    return transformers.Glm4vProcessor(image, words, video, chat_template=template)


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


def _gemma_config(text: Any) -> Any:
    sizes = dict.fromkeys(("hidden_size", "intermediate_size"), 32) | {"patch_size": 4, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "position_embedding_size": 256}
    vision = transformers.Gemma4VisionConfig(**sizes)
    return transformers.Gemma4Config(text_config=text, vision_config=vision, audio_config=None)


def _qwen3_5_config(text: Any) -> Any:
    fields = ("hidden_size", "intermediate_size", "depth", "num_heads", "patch_size", "out_hidden_size")
    vision = transformers.Qwen3_5MoeVisionConfig(**{name: SIZES[name] for name in fields}, num_position_embeddings=64)
    text.rope_parameters |= {"mrope_section": [1, 1, 0]}  # of two frequencies
    return transformers.Qwen3_5MoeConfig(text_config=text, vision_config=vision)


_QWEN = {
    "<|vision_start|>": "vision_start_token_id",
    "<|vision_end|>": "vision_end_token_id",
    "<|image_pad|>": "image_token_id",
    "<|video_pad|>": "video_token_id",
}
_GLM = {
    "<|begin_of_image|>": "image_start_token_id",
    "<|end_of_image|>": "image_end_token_id",
    "<|begin_of_video|>": "video_start_token_id",
    "<|end_of_video|>": "video_end_token_id",
    "<|image|>": "image_token_id",
    "<|video|>": "video_token_id",
}
_GEMMA = {"<|image|>": "image_token_id", "<|image>": "boi_token_id", "<image|>": "eoi_token_id"} | dict.fromkeys(
    ("<|audio|>", "<|video|>", "<|audio>", "<audio|>"), ""
)
FAMILIES = {
    "qwen3_vl_moe": Seeing("Qwen3VLMoeForConditionalGeneration", _QWEN, _qwen),
    "qwen3_5_moe": Seeing("Qwen3_5MoeForConditionalGeneration", _QWEN, _qwen, _qwen3_5_config),
    "glm4v_moe": Seeing("Glm4vMoeForConditionalGeneration", _GLM, _glm),
    "gemma4": Seeing("Gemma4ForConditionalGeneration", _GEMMA, _gemma, _gemma_config),
}


def images_in(folder: Path, count: int) -> list[str]:
    """Files of images of one color each, by their names."""
    names = []
    for index in range(count):
        names.append(f"{index}.png")
        Image.new("RGB", (32, 24), (255 * (index % 2), 40 * index, 90)).save(folder / names[-1])
    return names
