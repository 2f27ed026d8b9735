"""Marks of tensors: by a few rows of them, two models are told apart without reading either whole."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends import ExpertWeights, PackedLayerFiles
from ..backends.block_scaled import ScaledMatrices
from .tensor_files import StoredTensor, TensorFiles, read_tensors

FLOATING = (torch.bfloat16, torch.float16, torch.float32)
_ROWS = 32


@dataclass(frozen=True)
class Fingerprint:
    """Some rows of a tensor: its shape, the dtype it had, and a checksum of the rows in bf16."""

    shape: list[int]
    dtype: str
    sha256: str


def fingerprint_of(tensor: Tensor) -> Fingerprint:
    """The mark of a tensor in memory, the same for one dtype and another that its values were widened to."""
    rows = tensor.detach().flatten(0, -2) if tensor.dim() > 1 else tensor.detach()[None]
    index = torch.tensor(_sample(len(rows)), device=rows.device)
    return _fingerprint(list(tensor.shape), tensor.dtype, rows[index])


def fingerprints_of_weights(weights: ExpertWeights) -> dict[str, Fingerprint]:
    """Of a layer's experts, by the names of the parameters in transformers: the same if some are of 8 bits yet."""
    if weights.scaled is None:
        return {"gate_up_proj": fingerprint_of(weights.gate_up), "down_proj": fingerprint_of(weights.down)}
    there = weights.scaled
    return {
        "gate_up_proj": _fingerprint_of_parts(weights, weights.gate_up, there.gate_up, there.experts),
        "down_proj": _fingerprint_of_parts(weights, weights.down, there.down, there.experts),
    }


def _fingerprint_of_parts(
    weights: ExpertWeights, wide: Tensor, scaled: ScaledMatrices, experts: Sequence[int]
) -> Fingerprint:
    """Of all experts' matrices: those of `experts` are in `scaled`, the others in `wide`."""
    number, (height, columns) = len(wide) + len(experts), wide.shape[1:]
    rows = []
    for index in _sample(number * height):
        expert, row = divmod(index, height)
        if expert in experts:
            rows.append(scaled.row(experts.index(expert), row, wide.dtype))
        else:
            rows.append(wide[weights.rows_of([expert])[0], row])
    return _fingerprint([number, height, columns], wide.dtype, torch.stack(rows))


def fingerprint(weights: ExpertWeights | PackedLayerFiles) -> Tensor:
    """[4] int64 that tell a layer's base weights from others': the mark of a sample of them."""
    digest = (
        weights.fingerprint if isinstance(weights, PackedLayerFiles) else combined(fingerprints_of_weights(weights))
    )
    return torch.frombuffer(bytearray.fromhex(digest), dtype=torch.int64).clone()


def combined(marks: Mapping[str, Fingerprint]) -> str:
    """One mark of several, a hexadecimal sha256."""
    return hashlib.sha256("".join(marks[name].sha256 for name in sorted(marks)).encode()).hexdigest()


def fingerprints_of_files(files: TensorFiles, layers: list[str]) -> dict[str, Fingerprint]:
    """Of the tensors outside the experts in the first and the last of the blocks that have `layers`, and of no block.

    A fine-tuned model may share routers or norms with the one it was made of, but hardly all of its attention.
    """
    blocks = [re.split(r"(?<=\d)\.", name, maxsplit=1)[0] + "." for name in (layers[0], layers[-1])]
    found = {}
    for name, tensor in files.tensors.items():
        in_block = name.startswith(tuple(blocks)) and ".experts." not in name
        if (in_block or not re.search(r"\.\d+\.", name)) and tensor.dtype in FLOATING and 1 <= len(tensor.shape) <= 2:
            found[name] = _fingerprint_of_stored(tensor)
    return found


def _fingerprint_of_stored(tensor: StoredTensor) -> Fingerprint:
    rows = [tensor.row(i) for i in _sample(tensor.shape[0])] if len(tensor.shape) == 2 else [tensor]
    memory = torch.empty(len(rows), tensor.shape[-1], dtype=tensor.dtype)
    read_tensors(list(zip(rows, memory, strict=True)))
    return _fingerprint(list(tensor.shape), tensor.dtype, memory)


def _fingerprint(shape: list[int], dtype: torch.dtype, rows: Tensor) -> Fingerprint:
    data = rows.to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy()
    return Fingerprint(shape, str(dtype).removeprefix("torch."), hashlib.sha256(data.tobytes()).hexdigest())


def _sample(count: int) -> list[int]:
    """Evenly spaced indices, the first and the last among them."""
    if count <= _ROWS:
        return list(range(count))
    return [round(i * (count - 1) / (_ROWS - 1)) for i in range(_ROWS)]
