"""Whether a model takes images, and what makes tensors of them."""

from __future__ import annotations

from typing import Any

from ..errors import KTAMXConfigError
from .config.settings import RunKeys
from .models import in_a_line, revision_of


def sees(config: Any) -> bool:
    """Whether a model of this configuration takes images."""
    return getattr(config, "vision_config", None) is not None


def load_processor(keys: RunKeys, tokenizer: Any) -> Any:
    """The processor of a model that sees, with the run's tokenizer.

    Raises:
        KTAMXConfigError: There is none, or a package it needs is missing.
    """
    from transformers import AutoProcessor, ProcessorMixin

    name = keys.model_name_or_path
    try:
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=keys.trust_remote_code, **revision_of(keys))
    except Exception as error:  # ImportError of torchvision, say
        raise KTAMXConfigError(
            f"model_name_or_path={name!r}: the data have images, and its processor cannot be made: {in_a_line(error)}"
        ) from None
    if not isinstance(processor, ProcessorMixin) or getattr(processor, "image_processor", None) is None:
        raise KTAMXConfigError(
            f"model_name_or_path={name!r}: the data have images, and the folder has no processor for them "
            "(processor_config.json or preprocessor_config.json): copy it from the model."
        )
    processor.chat_template = processor.chat_template or tokenizer.chat_template
    processor.tokenizer = tokenizer
    return processor
