"""What a tensor of a base checkpoint is in the model: checkpoints name and lay out weights as their authors did.

transformers has a table for each family (renamings, and conversions that stack, join or turn tensors); it is asked with
a model of the base's configuration that takes no memory. Without a config.json the names of common families are known.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..discovery import skeleton
from ..errors import KTAMXConfigError, KTAMXError
from ..forms.stacked import Form, form_of
from ..shapes import ALIASES, PROJECTIONS

_NAMES = {**ALIASES, **{name: name for name in PROJECTIONS}}
_EXPERT = re.compile(rf"(.*\bexperts)\.(\d{{1,9}})\.({'|'.join(_NAMES)})\.weight$")
_FUSED = re.compile(r"(.*\bexperts)\.(gate_up_proj|up_proj|down_proj)(?:\.weight)?$")
# DBRX: all experts' matrices below each other, the down projection's turned.
_FLAT = re.compile(r"(.*\bexperts)\.mlp\.(w1|v1|w2)$")
_OF_FLAT = {"w1": "gate_proj", "v1": "up_proj", "w2": "down_proj"}
_NUMBER = re.compile(r"\.(\d{1,9})\.[^.]+\.weight$")
_OF_FUSED: dict[str, tuple[str, ...]] = {
    "gate_up_proj": ("gate_proj", "up_proj"), "up_proj": ("up_proj",), "down_proj": ("down_proj",),
}  # fmt: skip


@dataclass(frozen=True)
class ModelTensor:
    """What a tensor of the checkpoint is in the model.

    Attributes:
        module, parameter: "model.layers.3.self_attn.q_proj" and "weight"; of experts their module, and "".
        projections: Of experts: those that the tensor holds, in the order of its rows; () of all others.
        expert: The only expert that it holds; None where it is a stack of all.
        transposed: Rows and columns are exchanged.
        interleaved: Rows of the projections take turns.
        flat: The stack is of two dimensions, experts below each other.
        pieces: Of other modules' weights that are stored as one, (module, rows) in their order; () where it is one.
        operations: What transformers does to get the parameter, where that is something else; "" where nothing.
    """

    module: str
    parameter: str
    projections: tuple[str, ...] = ()
    expert: int | None = None
    transposed: bool = False
    interleaved: bool = False
    flat: bool = False
    pieces: tuple[tuple[str, int], ...] = ()
    operations: str = ""


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

    Raises:
        KTAMXConfigError: A config.json that transformers does not take.
    """

    def __init__(self, base: Path) -> None:
        """Build the model of `base`, the folder of a checkpoint, on the meta device; no weights are read."""
        self._model = _model_of(base)
        self.embeddings = None if self._model is None else _embeddings(self._model)
        if self._model is not None:
            self._read_table(self._model)

    def _read_table(self, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        table = get_model_conversion_mapping(model)
        self._converters = [entry for entry in table if isinstance(entry, WeightConverter)]
        self._renamings = [entry for entry in table if not isinstance(entry, WeightConverter)]
        self._by_pattern = {pattern: entry for entry in self._converters for pattern in entry.source_patterns}
        self._parameters = model.state_dict()

    def find(self, name: str) -> ModelTensor:
        """What the checkpoint's tensor of this name is."""
        if self._model is None:
            return _by_name(name)
        from transformers.core_model_loading import rename_source_key

        renamed, pattern = rename_source_key(
            name, self._renamings, self._converters, self._model.base_model_prefix, self._parameters
        )
        converter = self._by_pattern.get(pattern) if pattern else None
        steps = [type(step).__name__ for step in converter.operations] if converter else []
        parameter = self._parameters.get(renamed)
        flat, fused = _FLAT.match(renamed), _FUSED.match(renamed)
        if flat and parameter is not None and parameter.dim() == 2 and not steps:
            return ModelTensor(flat[1], "", (_OF_FLAT[flat[2]],), None, transposed=flat[2] == "w2", flat=True)
        if fused is None or parameter is None or parameter.dim() != 3:
            module, _, last = renamed.rpartition(".")
            pieces = self._pieces(renamed, converter) if steps in (["Split"], ["Chunk"]) else ()
            return ModelTensor(module, last, pieces=pieces, operations="" if pieces else ", ".join(steps))
        form = form_of(self._model.get_submodule(fused[1]))
        part = list(converter.source_patterns).index(pattern) if converter else 0
        return _experts(fused, name, steps, part, form if isinstance(form, Form) else None)

    def _pieces(self, renamed: str, converter: Any) -> tuple[tuple[str, int], ...]:
        """Modules of which the checkpoint has one weight above the other, as attention's projections in one matrix."""
        targets = list(converter.target_patterns)
        names = [renamed.replace(targets[0], target) for target in targets]
        if converter.operations[0].dim != 0 or any(name not in self._parameters for name in names):
            return ()
        return tuple((name.rpartition(".")[0], int(self._parameters[name].shape[0])) for name in names)


def _experts(fused: re.Match[str], name: str, steps: list[str], part: int, form: Form | None) -> ModelTensor:
    """Experts' weights, of a fused parameter that is made of the checkpoint's tensors in these steps.

    Args:
        fused: The parameter's name, apart.
        name: Of the checkpoint's tensor.
        steps: The names of what transformers does.
        part: Of several tensors that become one, which.
        form: How the model holds its experts; None if that is not known.
    """
    experts, every = fused[1], _OF_FUSED[fused[2]]
    number = _NUMBER.search(name)
    if number and form is not None and int(number[1]) >= form.num_experts and form.call == "identity":
        return ModelTensor(f"{experts}.{number[1]}", "weight")  # an expert that gives the token itself
    if steps in ([], ["Transpose"], ["Interleave"]):
        turned = (form is not None and form.transposed) != (steps == ["Transpose"])
        in_turns = len(every) == 2 and (form is not None and form.interleaved) != (steps == ["Interleave"])
        return ModelTensor(experts, "", every, None, turned, in_turns)
    if steps == ["Concatenate"] and len(every) == 2:
        return ModelTensor(experts, "", (every[part],))
    if steps in (["MergeModulelist"], ["MergeModulelist", "Concatenate"]) and number and part < len(every):
        return ModelTensor(experts, "", (every[part],), int(number[1]))
    return ModelTensor(experts, "", every, operations=", ".join(steps))


def _by_name(name: str) -> ModelTensor:
    """By the name alone: one tensor an expert and projection, Mixtral's names for the same, or fused."""
    plain = name.replace("block_sparse_moe", "mlp")
    if match := _EXPERT.match(plain):
        return ModelTensor(match[1], "", (_NAMES[match[3]],), int(match[2]))
    if match := _FUSED.match(plain):
        return ModelTensor(match[1], "", _OF_FUSED[match[2]])
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
