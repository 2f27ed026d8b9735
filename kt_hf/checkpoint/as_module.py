"""Experts that a checkpoint holds as the model's module does: transposed, interleaved, with biases, or in 2-D.

The layer's tensors are read as they are, and brought to the layout that is computed by the module's `Form`. In MXFP4
(`gate_up_proj_blocks`, `gate_up_proj_scales`) rows are outputs already, whatever the module has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..backends import ExpertWeights
from ..backends.packed import PackedExperts, PackedMatrices
from ..discovery import FLOATING
from ..errors import KTAMXError
from ..forms.stacked import Form
from .formats import finite
from .tensor_files import StoredTensor, read_tensors

_STACKS = ("gate_up_proj", "up_proj", "down_proj")


def as_module(stored: Mapping[str, StoredTensor]) -> bool:
    """Whether a layer's tensors have the names of a module of the model, by the names behind the module's."""
    return any(name.removesuffix("_blocks") in (*_STACKS, "mlp.w1") for name in stored)


class ModuleTensors:
    """A layer's experts in a checkpoint, as the model's module names them; nothing is read before `read`.

    Args:
        layer: The module's name, for messages.
        form: What the module is like.
        stored: What the checkpoint has of it, by the names behind the module's.

    Raises:
        KTAMXError: A tensor is missing, or of another shape or dtype than the model's config says.
    """

    def __init__(self, layer: str, form: Form, stored: Mapping[str, StoredTensor]) -> None:
        self._layer, self._form = layer, form
        self.mxfp4 = f"{_STACKS[0]}_blocks" in stored
        self._stored = {name: self._checked(name, size, stored) for name, size in self._sizes().items()}

    @property
    def size(self) -> int:
        """Bytes in the files."""
        return sum(tensor.size for tensor in self._stored.values())

    @property
    def kept_size(self) -> float:
        """Bytes of the weights as they are kept: packed, or in bf16."""
        weights = (math.prod(t.shape) for name, t in self._stored.items() if not name.endswith("_bias"))
        return sum(weights) * (1 if self.mxfp4 else 2)

    def check_values(self) -> None:
        """Read the scales of MXFP4, and look through them.

        Raises:
            KTAMXError: One is not a finite number, naming file and tensor.
        """
        for name, stored in self._stored.items():
            if name.endswith("_scales"):
                scales = torch.empty(stored.shape, dtype=stored.dtype, device="cpu")
                read_tensors([(stored, scales)])
                if not finite(scales):
                    raise KTAMXError(f"{stored} of weights in MXFP4 has a scale that is not a finite number.")

    def read(self, dtype: torch.dtype, low_bit: Sequence[int] = ()) -> ExpertWeights:
        """The layer's weights in the layout that is computed, on the CPU.

        Args:
            dtype: Floating, of what is not packed.
            low_bit: Ids of experts that stay in MXFP4; all others are widened.

        Raises:
            KTAMXError: A file has changed since it was checked.
        """
        memory = {name: torch.empty(t.shape, dtype=t.dtype, device="cpu") for name, t in self._stored.items()}
        read_tensors([(self._stored[name], target) for name, target in memory.items()])
        if self.mxfp4:
            return self._packed(memory, dtype, list(low_bit))
        module = SimpleNamespace()
        for name in list(memory):
            *inside, last = name.split(".")  # `mlp.w1`
            place: Any = module
            for part in inside:
                place.__dict__.setdefault(part, SimpleNamespace())
                place = getattr(place, part)
            setattr(place, last, memory.pop(name).to(dtype))
        gate_up, down, gate_up_bias, down_bias = self._form.taken(module)
        return ExpertWeights(gate_up, down, gate_up_bias=gate_up_bias, down_bias=down_bias)

    def _packed(self, memory: dict[str, Tensor], dtype: torch.dtype, low_bit: list[int]) -> ExpertWeights:
        """Experts of MXFP4: rows are brought in order, codes stay what they are."""
        form, stacks = self._form, list[PackedMatrices]()
        for name in ("gate_up_proj", "down_proj"):
            parts = [memory.pop(f"{name}_blocks").flatten(2), memory.pop(f"{name}_scales")]
            if name == "gate_up_proj":
                parts = [form.apart(part, 1) for part in parts]
            stacks.append(PackedMatrices("e2m1", parts[0], parts[1]))
        gate_up, down = stacks
        gate_up_bias, down_bias = (memory[f"{name}_bias"].to(dtype) for name in ("gate_up_proj", "down_proj"))
        rest = [e for e in range(form.num_experts) if e not in set(low_bit)]
        wide = ExpertWeights(
            gate_up.select(rest).dequantized(dtype) if rest else torch.empty(0, *gate_up.shape[1:], dtype=dtype),
            down.select(rest).dequantized(dtype) if rest else torch.empty(0, *down.shape[1:], dtype=dtype),
            gate_up_bias=form.apart(gate_up_bias, 1),
            down_bias=down_bias,
        )
        if not low_bit:
            return wide
        kept = PackedExperts(low_bit, gate_up.select(low_bit), down.select(low_bit))
        return replace(wide, low_bit=kept)

    def _sizes(self) -> dict[str, tuple[int, ...]]:
        """The tensors that there must be, and their shapes."""
        form = self._form
        E, H, I = form.num_experts, form.hidden_size, form.intermediate_size  # noqa: E741
        if form.flat:
            return {f"mlp.{name}": (E * I, H) for name in ("w1", "v1", "w2")}
        rows = form.gate.halves * I
        first = "gate_up_proj" if form.gate.gated else "up_proj"
        sizes: dict[str, tuple[int, ...]] = {}
        for name, (out, inside) in {first: (rows, H), "down_proj": (H, I)}.items():
            if self.mxfp4:
                sizes |= {f"{name}_blocks": (E, out, inside // 32, 16), f"{name}_scales": (E, out, inside // 32)}
            else:
                sizes[name] = (E, inside, out) if form.transposed else (E, out, inside)
            if form.biased:
                sizes[f"{name}_bias"] = (E, out)
        return sizes

    def _checked(self, name: str, size: tuple[int, ...], stored: Mapping[str, StoredTensor]) -> StoredTensor:
        tensor = stored.get(name)
        if tensor is None:
            there = f"the checkpoint has {', '.join(sorted(stored)[:4])} of it" if stored else "nothing of it is there"
            raise KTAMXError(f"{self._layer}.{name} is missing; {there}. from_pretrained and apply_kt_moe may read it.")
        if tensor.shape != size:
            raise KTAMXError(f"{tensor} has the shape {list(tensor.shape)}; by the model's config it is {list(size)}.")
        bytes_ = name.endswith(("_blocks", "_scales"))
        if tensor.dtype not in ((torch.uint8,) if bytes_ else FLOATING):
            raise KTAMXError(f"{tensor} is of {tensor.dtype}, which is not known there.")
        return tensor
