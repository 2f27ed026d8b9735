"""What a tensor of a checkpoint is in the model, by transformers' own table of the family.

Checkpoints name and lay out weights as their authors did. transformers has renamings for each family, and conversions
that stack, join or turn tensors; they are asked with a model that takes no memory.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..forms.stacked import Form, form_of

FUSED = re.compile(r"(.*\bexperts)\.(gate_up_proj|up_proj|down_proj)(?:\.weight)?$")
OF_FUSED: dict[str, tuple[str, ...]] = {
    "gate_up_proj": ("gate_proj", "up_proj"), "up_proj": ("up_proj",), "down_proj": ("down_proj",),
}  # fmt: skip
# DBRX: all experts' matrices below each other, the down projection's turned.
_FLAT = re.compile(r"(.*\bexperts)\.mlp\.(w1|v1|w2)$")
_OF_FLAT = {"w1": "gate_proj", "v1": "up_proj", "w2": "down_proj"}
_NUMBER = re.compile(r"\.(\d{1,9})\.[^.]+\.weight$")


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


class ModelNames:
    """The names of a family's checkpoints.

    Args:
        model: The family's model; its parameters on any device, the meta device too.
    """

    def __init__(self, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        table = get_model_conversion_mapping(model)
        self._model = model
        self._converters = [entry for entry in table if isinstance(entry, WeightConverter)]
        self._renamings = [entry for entry in table if not isinstance(entry, WeightConverter)]
        self._by_pattern = {pattern: entry for entry in self._converters for pattern in entry.source_patterns}
        self._parameters = model.state_dict()

    def find(self, name: str, shape: Sequence[int]) -> ModelTensor:
        """What the checkpoint's tensor of this name and shape is."""
        from transformers.core_model_loading import rename_source_key

        renamed, pattern = rename_source_key(
            name, self._renamings, self._converters, self._model.base_model_prefix, self._parameters
        )
        converter = self._by_pattern.get(pattern) if pattern else None
        parameter = self._parameters.get(renamed)
        alike = parameter is not None and tuple(parameter.shape) == tuple(shape)
        operations = converter.operations if converter else ()
        # A Transpose that looks at the sizes leaves what has the model's already.
        steps = [type(step).__name__ for step in operations if not (alike and getattr(step, "check_dims", False))]
        flat, fused = _FLAT.match(renamed), FUSED.match(renamed)
        if flat and parameter is not None and parameter.dim() == 2 and not steps:
            return ModelTensor(flat[1], "", (_OF_FLAT[flat[2]],), None, transposed=flat[2] == "w2", flat=True)
        if fused is None or parameter is None or parameter.dim() != 3:
            module, _, last = renamed.rpartition(".")
            pieces = self._pieces(renamed, converter) if steps in (["Split"], ["Chunk"]) else ()
            return ModelTensor(module, last, pieces=pieces, operations="" if pieces else ", ".join(steps))
        form = form_of(self._model.get_submodule(fused[1]))
        part = list(converter.source_patterns).index(pattern) if converter else 0
        return _experts(fused, name, steps, part, form if isinstance(form, Form) else None)

    def renamed(self, name: str) -> str:
        """What transformers' renamings alone make of a name: another one for some of a model's own names."""
        from transformers.core_model_loading import rename_source_key

        return str(rename_source_key(name, self._renamings, [])[0])

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
    experts, every = fused[1], OF_FUSED[fused[2]]
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
