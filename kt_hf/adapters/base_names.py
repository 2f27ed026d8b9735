"""What a tensor of a base checkpoint is in the model: by transformers' table for the family of its config.json.

Without a config.json the names of common families are known.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.model_names import FUSED, OF_FUSED, ModelNames, ModelTensor
from ..discovery import skeleton
from ..errors import KTAMXConfigError, KTAMXError
from ..shapes import ALIASES, PROJECTIONS

_NAMES = {**ALIASES, **{name: name for name in PROJECTIONS}}
_EXPERT = re.compile(rf"(.*\bexperts)\.(\d{{1,9}})\.({'|'.join(_NAMES)})\.weight$")


@dataclass(frozen=True)
class Embeddings:
    """Names of the model's input and output embeddings, None if it has none; tied: the second are the first."""

    input: str | None
    output: str | None
    tied: bool


class BaseNames:
    """The names of a base checkpoint.

    Args:
        base: Its folder.

    Attributes:
        embeddings: What the configuration says of them; None without a config.json.
        table: The family's names; None without a config.json.
        sharing: Module -> another one with the same weights, both ways; not embeddings.

    Raises:
        KTAMXConfigError: A config.json that transformers does not take.
    """

    def __init__(self, base: Path) -> None:
        """Build the model of `base`, the folder of a checkpoint, on the meta device; no weights are read."""
        self._model = _model_of(base)
        self.embeddings = None if self._model is None else _embeddings(self._model)
        self.table = None if self._model is None else ModelNames(self._model)
        self.sharing = {} if self._model is None else _sharing(self._model, self.embeddings)

    def find(self, name: str, shape: Sequence[int]) -> ModelTensor:
        """What the checkpoint's tensor of this name and shape is."""
        return self.table.find(name, shape) if self.table else _by_name(name)


def _by_name(name: str) -> ModelTensor:
    """By the name alone: one tensor an expert and projection, Mixtral's names for the same, or fused."""
    plain = name.replace("block_sparse_moe", "mlp")
    if match := _EXPERT.match(plain):
        return ModelTensor(match[1], "", (_NAMES[match[3]],), int(match[2]))
    if match := FUSED.match(plain):
        return ModelTensor(match[1], "", OF_FUSED[match[2]])
    module, _, parameter = name.rpartition(".")
    return ModelTensor(module, parameter)


def _model_of(base: Path) -> Any:
    """The base's model without memory; None without a config.json."""
    if not (base / "config.json").is_file():
        return None
    from transformers import AutoConfig

    from ..system.json_fields import read_json

    read_json(base / "config.json").object()
    try:
        return skeleton(AutoConfig.from_pretrained(base))
    except KTAMXError:
        raise
    except Exception as error:  # what a configuration of wrong values makes transformers raise is anything
        raise KTAMXConfigError(
            f"base={str(base)!r}: transformers cannot make the model of its config.json: {' '.join(str(error).split())}"
        ) from error


def _embeddings(model: Any) -> Embeddings:
    names = {id(module): name for name, module in model.named_modules()}
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    return Embeddings(names.get(id(inputs)), names.get(id(outputs)), tied and outputs is not None)


def _sharing(model: Any, embeddings: Embeddings | None) -> dict[str, str]:
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    pairs = [tuple(name.rpartition(".")[0] for name in pair) for pair in tied.items()]
    apart = [pair for pair in pairs if embeddings is None or embeddings.output not in pair]
    return {one: other for pair in apart for one, other in (pair, pair[::-1])}
