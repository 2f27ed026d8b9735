"""Fingerprints of tensors: a few rows tell two models apart without reading either whole."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends import ExpertWeights, PackedLayerFiles
from ..backends.packed import PackedMatrices
from ..backends.quantizer import alike_rows, quantized
from ..discovery import FLOATING
from .tensor_files import StoredTensor, TensorFiles, read_tensors

_ROWS = 32
Rows = Callable[[str, int, int, int], Tensor]


@dataclass(frozen=True)
class Fingerprint:
    """What a few rows of a tensor tell of it.

    Attributes:
        shape: Of the whole tensor.
        dtype: That the tensor had, as PyTorch names it, without `torch.`.
        sha256: Of the rows in bf16, hexadecimal.
    """

    shape: list[int]
    dtype: str
    sha256: str


def fingerprint_of(tensor: Tensor) -> Fingerprint:
    """The fingerprint of a tensor in memory, on any device.

    Its checksum is the same in every dtype that the values were widened to.
    """
    rows = tensor.detach().flatten(0, -2) if tensor.dim() > 1 else tensor.detach()[None]
    index = torch.tensor(_sample(len(rows)), device=rows.device)
    return _fingerprint(list(tensor.shape), tensor.dtype, rows[index])


def fingerprints_of_weights(weights: ExpertWeights) -> dict[str, Fingerprint]:
    """The fingerprints of a layer's experts: `gate_up_proj` [E, 2I, H], `down_proj` [E, H, I], and biases if any.

    They are the same whether or not some experts are still in low bits.
    """
    biases = {"gate_up_proj_bias": weights.gate_up_bias, "down_proj_bias": weights.down_bias}
    of_biases = {name: fingerprint_of(bias) for name, bias in biases.items() if bias is not None}
    if weights.low_bit is None:
        of_weights = {"gate_up_proj": fingerprint_of(weights.gate_up), "down_proj": fingerprint_of(weights.down)}
        return of_weights | of_biases
    packed = weights.low_bit
    return of_biases | {
        "gate_up_proj": _fingerprint_of_parts(weights, weights.gate_up, packed.gate_up, packed.experts),
        "down_proj": _fingerprint_of_parts(weights, weights.down, packed.down, packed.experts),
    }


def _fingerprint_of_parts(
    weights: ExpertWeights, wide: Tensor, packed: PackedMatrices, experts: Sequence[int]
) -> Fingerprint:
    """Of all experts' matrices: those of `experts` are in `packed`, the others in `wide`."""
    number, (height, columns) = len(wide) + len(experts), wide.shape[1:]
    rows = []
    for index in _sample(number * height):
        expert, row = divmod(index, height)
        if expert in experts:
            rows.append(packed.row(experts.index(expert), row, wide.dtype))
        else:
            rows.append(wide[weights.rows_of([expert])[0], row])
    return _fingerprint([number, height, columns], wide.dtype, torch.stack(rows))


def fingerprint(weights: ExpertWeights | PackedLayerFiles, to: str = "bf16") -> Tensor:
    """[4] int64 on the CPU that tell a layer's base weights from others', by a sample of them.

    Args:
        weights: The layer's, of all experts.
        to: A `kt_expert_dtype`, to which they will be quantized; "bf16" if they stay as they are.
    """
    if isinstance(weights, PackedLayerFiles):
        return _in_numbers(weights.fingerprint)
    marks = fingerprints_of_weights(weights)
    if to != "bf16" and weights.low_bit is None:
        stacks = {"gate_up_proj": weights.gate_up.detach(), "down_proj": weights.down.detach()}
        sizes, dtype = {name: list(stack.shape) for name, stack in stacks.items()}, weights.gate_up.dtype
        marks |= _marks_by_rows(sizes, dtype, lambda name, e, first, stop: stacks[name][e, first:stop], to)
    return _in_numbers(combined(marks))


def fingerprint_by_rows(sizes: Mapping[str, list[int]], dtype: torch.dtype, rows: Rows, to: str) -> Tensor:
    """As `fingerprint`, of weights that are not in memory.

    Args:
        sizes: [E, rows, columns] of `gate_up_proj` and `down_proj`.
        dtype: Of the weights, floating.
        rows: Gives rows of a matrix: (name, expert, first, the one after the last) to [n, columns].
        to: As for `fingerprint`.
    """
    return _in_numbers(combined(_marks_by_rows(sizes, dtype, rows, to)))


def _marks_by_rows(sizes: Mapping[str, list[int]], dtype: torch.dtype, rows: Rows, to: str) -> dict[str, Fingerprint]:
    marks = {}
    for name, size in sizes.items():
        sample = []
        for expert, row in (divmod(index, size[1]) for index in _sample(size[0] * size[1])):
            if to == "bf16":
                sample.append(rows(name, expert, row, row + 1)[0])
            else:
                first, stop = alike_rows(to, row, size[1])
                block = rows(name, expert, first, stop)[None].cpu()
                sample.append(quantized(block, to).row(0, row - first, dtype))
        marks[name] = _fingerprint(size, dtype, torch.stack(sample))
    return marks


def _in_numbers(digest: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(digest), dtype=torch.int64).clone()


def combined(fingerprints: Mapping[str, Fingerprint]) -> str:
    """One hexadecimal sha256 of several fingerprints, by their names."""
    return hashlib.sha256("".join(fingerprints[name].sha256 for name in sorted(fingerprints)).encode()).hexdigest()


def fingerprints_of_files(files: TensorFiles, layers: list[str]) -> dict[str, Fingerprint]:
    """The fingerprints of tensors outside the experts: of the first and the last block with experts, and of no block.

    A fine-tuned model may share routers or norms with the one it was made of, but hardly all of its attention.

    Args:
        files: The checkpoint's tensors.
        layers: Names of the experts modules, in order.
    """
    blocks = [re.split(r"(?<=\d)\.", name, maxsplit=1)[0] + "." for name in (layers[0], layers[-1])]
    fingerprints = {}
    for name, tensor in files.tensors.items():
        in_block = name.startswith(tuple(blocks)) and ".experts." not in name
        if (in_block or not re.search(r"\.\d+\.", name)) and tensor.dtype in FLOATING and 1 <= len(tensor.shape) <= 2:
            fingerprints[name] = _fingerprint_of_stored(tensor)
    return fingerprints


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
