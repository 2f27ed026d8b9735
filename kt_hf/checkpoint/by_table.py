"""Experts that a checkpoint has under other names or in another layout than the model, read by transformers' table.

Granite's `input_linear`, Aria's `fc1`, Step-3's gate and up in two stacks, Qwen3-VL's transposed ones: `ModelNames`
says what each tensor is, and the layer's are brought to the layout that is computed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import ExpertWeights
from ..discovery import FLOATING
from ..errors import KTAMXConfigError, KTAMXError, KTAMXModelNotSupportedError
from ..forms.stacked import Form
from .model_names import ModelNames, ModelTensor
from .tensor_files import StoredTensor

_INSTEAD = "Use from_pretrained and apply_kt_moe."


class TableTensors:
    """A layer's experts in a checkpoint, by what transformers makes of them; nothing is read before `read`.

    Args:
        layer: Name of the model's experts module, for messages.
        form: What the module is like.
        stored: The checkpoint's tensors of the layer, with what each is.

    Raises:
        KTAMXError: A tensor is missing or doubled, or of another shape than the model's config says.
        KTAMXConfigError: One is of low bits.
        KTAMXModelNotSupportedError: One becomes the model's in a way that is not known, or there are biases.
    """

    def __init__(self, layer: str, form: Form, stored: Sequence[tuple[ModelTensor, StoredTensor]]) -> None:
        self._layer, self._form, self._stored = layer, form, stored
        if form.biased:
            raise KTAMXModelNotSupportedError(
                f"{layer} has biases, and its checkpoint other names: they cannot be streamed. {_INSTEAD}"
            )
        names = ["gate_proj", "up_proj", "down_proj"][0 if form.gate.gated else 1 :]
        self._shapes = dict.fromkeys(names, (form.intermediate_size, form.hidden_size))
        self._shapes["down_proj"] = (form.hidden_size, form.intermediate_size)
        left = {(e, name) for e in range(form.num_experts) for name in names}
        for target, tensor in stored:
            self._check(target, tensor)
            experts = range(form.num_experts) if target.expert is None else (target.expert,)
            for place in ((e, name) for e in experts for name in target.projections):
                if place not in left:
                    raise KTAMXError(f"{tensor} is {place[1]} of expert {place[0]} of {layer}, which is there already.")
                left.discard(place)
        if left:
            expert, name = min(left)
            raise KTAMXError(f"{layer}.{expert}.{name} is missing: no tensor of the checkpoint becomes it.")

    @property
    def size(self) -> int:
        """Bytes in the files."""
        return sum(tensor.size for _, tensor in self._stored)

    @property
    def kept_size(self) -> float:
        """Bytes of the weights as they are kept, in bf16."""
        return sum(2 * math.prod(tensor.shape) for _, tensor in self._stored)

    def check_values(self) -> None:
        """Nothing: it has no scales."""

    def read(self, dtype: torch.dtype, low_bit: Sequence[int] = ()) -> ExpertWeights:
        """The layer's weights in the layout that is computed, on the CPU.

        Args:
            dtype: Floating, of the weights.
            low_bit: Of no effect: nothing of it is of low bits.

        Raises:
            KTAMXError: A file has changed since it was checked.
        """
        form = self._form
        E, H, I = form.num_experts, form.hidden_size, form.intermediate_size  # noqa: E741
        gate_up = torch.empty(E, form.gate.halves * I, H, dtype=dtype, device="cpu")
        down = torch.empty(E, H, I, dtype=dtype, device="cpu")
        places = {"gate_proj": gate_up[:, :I], "up_proj": gate_up[:, -I:], "down_proj": down}
        for target, tensor in self._stored:
            self._put(target, tensor, places)
        return ExpertWeights(gate_up, down)

    def _put(self, target: ModelTensor, tensor: StoredTensor, places: Mapping[str, Tensor]) -> None:
        """Copy a tensor to where it is computed from, a stack expert by expert."""
        experts = range(self._form.num_experts) if target.expert is None else (target.expert,)
        for e in experts:
            matrix = (tensor if target.expert is not None else tensor.row(e)).load()
            matrix = matrix.t() if target.transposed else matrix
            count = len(target.projections)
            parts = [matrix[i::count] for i in range(count)] if target.interleaved else matrix.chunk(count)
            for name, part in zip(target.projections, parts, strict=True):
                places[name][e].copy_(part)

    def _check(self, target: ModelTensor, tensor: StoredTensor) -> None:
        if target.operations or target.flat:
            raise KTAMXModelNotSupportedError(
                f"{tensor} becomes {self._layer} by {target.operations or 'views'}, which cannot be streamed. "
                f"{_INSTEAD}"
            )
        if tensor.dtype not in FLOATING:
            raise KTAMXConfigError(
                f"{tensor} is of {tensor.dtype}: {self._layer} is saved under other names or otherwise laid out than "
                "in the model, which is read in bfloat16, float16 and float32 alone."
            )
        rows, columns = self._shapes[target.projections[0]]
        rows *= len(target.projections)
        matrix = (columns, rows) if target.transposed else (rows, columns)
        wanted: tuple[int, ...] = matrix if target.expert is not None else (self._form.num_experts, *matrix)
        more = self._form.call == "identity" and len(tensor.shape) == 3 and tensor.shape[0] >= self._form.num_experts
        if tensor.shape != wanted and not (more and tensor.shape[1:] == wanted[1:]):
            raise KTAMXError(
                f"{tensor} has the shape {list(tensor.shape)}; by the model's config it is {list(wanted)}."
            )


def by_table(model: Any, layers: Mapping[str, Form], files: Mapping[str, StoredTensor]) -> dict[str, TableTensors]:
    """The experts of a checkpoint by transformers' table for the model.

    Args:
        model: Its `skeleton`.
        layers: Name of each layer's experts module -> what it is like.
        files: The checkpoint's tensors by name.

    Raises:
        KTAMXError: As `TableTensors` does.
    """
    names, stored = ModelNames(model), {layer: list[tuple[ModelTensor, StoredTensor]]() for layer in layers}
    for name, tensor in files.items():
        target = names.find(name, tensor.shape)
        if target.projections and target.module in stored:
            stored[target.module].append((target, tensor))
    if not any(stored.values()):
        first = next(iter(layers))
        raise KTAMXModelNotSupportedError(
            f"No tensor of the checkpoint is {first}.gate_up_proj, or becomes it by transformers' table for "
            f"{type(model).__name__}: experts saved under other names cannot be streamed. {_INSTEAD}"
        )
    return {layer: TableTensors(layer, layers[layer], tensors) for layer, tensors in stored.items()}
