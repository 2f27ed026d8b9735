"""The weights of a checkpoint outside of its routed experts, some of low bits: checked, and widened as read."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..backends.packed import EIGHT_BIT
from ..discovery import FLOATING
from ..errors import KTAMXError
from .eight_bit import SCALES
from .expert_names import linear_name, of_activations
from .expert_reader import Matrix, Wide, check_values, read_matrices
from .formats import Parts
from .quantization import Quantization
from .tensor_files import StoredTensor, TensorFiles

_ROUTED = re.compile(r"(?:^|\.)experts\.")


class DenseRest:
    """All tensors of a checkpoint but its routed experts', by the names that they have in a plain checkpoint.

    Args:
        files: The checkpoint's tensors.
        quantization: How the configuration says that weights are stored.
        skipped: Patterns of names that the model leaves out.

    Attributes:
        plain: Tensors as they are.
        low_bit: Weights of low bits.

    Raises:
        KTAMXError: A weight is stored in a way that is not known, or a part of it is missing or does not fit.
    """

    def __init__(self, files: TensorFiles, quantization: Quantization, skipped: Iterable[str] = ()) -> None:
        patterns = [re.compile(pattern) for pattern in skipped]
        self.plain: dict[str, StoredTensor] = {}
        self.low_bit: dict[str, Matrix] = {}
        layers: dict[str, dict[str, StoredTensor]] = {}
        for name, tensor in files.tensors.items():
            if _ROUTED.search(name) or any(pattern.search(name) for pattern in patterns):
                continue
            layer, part = linear_name(name) or (name, "")
            if part in ("", "bias"):
                self.plain[name] = tensor
            elif not of_activations(part):
                layers.setdefault(layer, {})[part] = tensor
        for layer, parts in layers.items():
            if _is_plain(parts):
                self.plain |= {tensor.name: tensor for tensor in parts.values()}
            else:
                self.low_bit[f"{layer}.weight"] = low_bit_matrix(layer, parts, quantization)
        for tensor in self.plain.values():
            if tensor.dtype == torch.float8_e4m3fn:
                raise KTAMXError(f"{tensor} is of {tensor.dtype}, but its scales are missing.")

    def check(self, model: nn.Module) -> None:
        """Refuse weights of low bits that are not the model's, as far as it has them under their names.

        Args:
            model: Its `skeleton`.

        Raises:
            KTAMXError: One has another shape than the model's, or values that cannot be computed with.
        """
        sizes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        for name, matrix in self.low_bit.items():
            known = [n for n in (name, f"model.{name}", name.removeprefix("model.")) if n in sizes]
            if known and sizes[known[0]] != matrix.shape:
                raise KTAMXError(
                    f"{matrix.first} is of a weight of the shape {list(matrix.shape)}; by the model's config it is "
                    f"{list(sizes[known[0]])}."
                )
        check_values(self.low_bit.values())

    def outline(self) -> dict[str, Tensor]:
        """The tensors without their values, on the meta device; those of low bits in bf16."""
        shapes = {name: (stored.shape, stored.dtype) for name, stored in self.plain.items()}
        shapes |= {name: (matrix.shape, torch.bfloat16) for name, matrix in self.low_bit.items()}
        return {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in shapes.items()}

    def load(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Read all of it, plain tensors in their dtype and the others widened.

        Args:
            dtype: Floating, of the widened ones.

        Raises:
            KTAMXError: A file has changed since it was checked.
        """
        stored = {name: Matrix(tensor.shape, {"weight": tensor}) for name, tensor in self.plain.items()} | self.low_bit
        dtypes = {name: tensor.dtype for name, tensor in self.plain.items()}
        tensors = {
            name: torch.empty(matrix.shape, dtype=dtypes.get(name, dtype), device="cpu")
            for name, matrix in stored.items()
        }
        read_matrices([(matrix, Wide(tensors[name])) for name, matrix in stored.items()])
        return tensors


def _is_plain(parts: Parts) -> bool:
    """Whether tensors that are named like a weight's parts are parameters of their own."""
    weight = parts.get("weight")
    if weight is None:
        return not {"weight_packed", "qweight", "blocks"} & set(parts)
    others = set(parts) - {"weight"}
    if weight.dtype in FLOATING:
        return not others & {*SCALES[:2], "weight_packed", "qweight", "blocks"}
    return not others and weight.dtype not in (*EIGHT_BIT, torch.uint8)


def low_bit_matrix(layer: str, parts: Parts, quantization: Quantization) -> Matrix:
    """A weight of low bits.

    Args:
        layer: Name of the linear layer.
        parts: Its tensors.
        quantization: How the configuration says that weights are stored.

    Raises:
        KTAMXError: It is stored in a way that is not known, or a part is missing or does not fit.
    """
    form = quantization.format_of(layer, parts)
    if form is None:
        raise KTAMXError(f"{next(iter(parts.values()))} belongs to no weight of low bits.")
    shape = form.shape_of(parts)
    return Matrix(shape, parts, form, form.kind(parts, shape))
