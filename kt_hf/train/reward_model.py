"""Reward models (`stage: rm`): transformers' class with a score head for a family, and what follows for a run."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from ..errors import KTAMXConfigError
from .config.settings import RunKeys

HEAD = "score"  # what transformers calls the head in every such class, and PEFT trains as a whole


def as_reward_model(config: Any) -> Any:
    """The configuration of the family's model with a score head, one number an answer; `config` itself, changed.

    Raises:
        KTAMXConfigError: transformers has no such class for the family.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise KTAMXConfigError(
            f"stage=rm: a reward model needs a class with a score head, and transformers {transformers.__version__} "
            f"has none for {config.model_type} (ForSequenceClassification). It has one for mixtral, qwen2_moe, "
            "qwen3_moe, qwen3_next, deepseek_v2, deepseek_v3, minimax, gpt_oss and others: take one of "
            "these, or train stage: dpo."
        )
    config.architectures = [MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)].__name__]
    config.num_labels = 1
    return config


def with_score_head(model: Any) -> Any:
    """The reward model whose layers are those of a language model in memory; its head begins with random values."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    config = as_reward_model(copy.deepcopy(model.config))
    with torch.device("meta"):
        made = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]._from_config(config)
    setattr(made, made.base_model_prefix, model.base_model)
    made.score = made.score.to_empty(device="cpu").to(model.dtype)
    torch.nn.init.normal_(made.score.weight, std=config.get_text_config().initializer_range)
    return made


def check_head(keys: RunKeys) -> None:
    """Refuse an adapter to start from whose score head was never trained: PEFT would leave it as it is, untrained.

    Raises:
        KTAMXConfigError: The adapter is no reward model's.
    """
    from ..adapters.adapter import CONFIG
    from ..system.json_fields import read_json

    if not keys.adapter_name_or_path:
        return
    file = Path(keys.adapter_name_or_path) / CONFIG
    saved = read_json(file).object().get("modules_to_save") if file.is_file() else None
    if saved is None or HEAD not in saved.texts():
        raise KTAMXConfigError(
            f"adapter_name_or_path={keys.adapter_name_or_path!r} has no trained {HEAD} head: stage: rm goes on from an "
            "adapter of stage: rm alone. Merge it (kt-hf export --to merged), and train a reward model on that."
        )
