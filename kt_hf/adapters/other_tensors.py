"""What an adapter holds beside the experts' LoRA, sorted by module: LoRA, retrained tokens, and whole parameters.

PEFT writes for a module X, as the settings are:

    X.lora_A.weight, X.lora_B.weight                a linear layer's LoRA          target_modules
    X.lora_embedding_A, X.lora_embedding_B          an embedding's LoRA            target_modules
    X.token_adapter.trainable_tokens_delta          new rows of an embedding       trainable_token_indices
    X.weight, X.bias, …                             the module as a whole          modules_to_save, bias
    X.weight, X.base_layer.weight, X.token_adapter.base_layer.weight
                                                    embeddings and head            if they are resized, or targets
    X.original_module.…, X.modules_to_save.…        the same once more             where both are said
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import KTAMXError
from ..system.files import Lazy

_LORA = re.compile(r"(.+)\.(lora_[A-Za-z_]+?(?:\.weight|\.bias)?)$")
_TOKENS = ".token_adapter.trainable_tokens_delta"
_WRAPPED = re.compile(r"\.(?:token_adapter\.)?base_layer(?=\.)")
_COPY = re.compile(r"\.(?:original_module|modules_to_save)(?=\.)")
# Input and output embeddings, as families call them.
_EMBEDDINGS = re.compile(r"(?:^|\.)(?:\w*embed\w*|wte|lm_head|output|head)$")
LINEAR, EMBEDDING = ("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")


@dataclass
class OtherModule:
    """What an adapter has for one module that is no expert.

    Attributes:
        name: Full name in the model, "model.layers.3.self_attn.q_proj".
        lora: What PEFT calls the tensor ("lora_A.weight") -> tensor.
        tokens: Rows that take the place of those of `trainable_token_indices`, [n, hidden]; None without.
        whole: Parameter of the module ("weight") -> its value, as large as the parameter.
    """

    name: str
    lora: dict[str, Lazy] = field(default_factory=dict)
    tokens: Lazy | None = None
    whole: dict[str, Lazy] = field(default_factory=dict)


def sort_tensors(
    tensors: Mapping[str, Lazy], prefix: str, config: Mapping[str, Any], where: Path
) -> dict[str, OtherModule]:
    """The tensors by module.

    Args:
        tensors: Keys of adapter_model.safetensors, with `prefix`.
        prefix: What is no part of the modules' names.
        config: Of the adapter, checked.
        where: For messages.

    Raises:
        KTAMXError: A tensor that the settings do not account for: PEFT would load it over the base model's.
    """
    modules: dict[str, OtherModule] = {}
    rest: dict[str, tuple[str, Lazy]] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(prefix)
        match = _LORA.match(name)
        if match and (match[2] in LINEAR + EMBEDDING or match[2].startswith(("lora_magnitude", "lora_A", "lora_B"))):
            modules.setdefault(match[1], OtherModule(match[1])).lora[match[2]] = tensor
        elif name.endswith(_TOKENS):
            module = name.removesuffix(_TOKENS)
            modules.setdefault(module, OtherModule(module)).tokens = tensor
        else:
            rest[key] = (name, tensor)
    names = {name for name, _ in rest.values()}
    for key, (name, tensor) in rest.items():
        module, _, parameter = plain_name(name).rpartition(".")
        alone = _COPY.search(name) and _COPY.sub("", name) not in names
        if not module or alone or not _is_accounted_for(module, parameter, config):
            raise KTAMXError(f"{where}: {key} is no LoRA tensor, and not of modules_to_save.")
        whole = modules.setdefault(module, OtherModule(module)).whole
        if not _COPY.search(name) or parameter not in whole:
            whole[parameter] = tensor
    return modules


def plain_name(name: str) -> str:
    """The base model's name of a parameter, without what PEFT has put into it."""
    return _COPY.sub("", _WRAPPED.sub("", name))


def _is_accounted_for(module: str, parameter: str, config: Mapping[str, Any]) -> bool:
    """Whether PEFT writes this parameter as a whole with these settings."""
    names = tuple(config.get("modules_to_save") or ())
    parts = module.split(".")
    # As PEFT has it: modules_to_save=["norm"] is of every module whose name ends so, "k_norm" too.
    if names and any(".".join(parts[: i + 1]).endswith(names) for i in range(len(parts))):
        return True
    if parameter == "bias" and config.get("bias", "none") != "none":
        return True
    return parameter == "weight" and bool(_EMBEDDINGS.search(module))
