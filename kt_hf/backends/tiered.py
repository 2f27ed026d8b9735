"""A layer's experts split over several backends: some on the GPU, computed while the CPU computes the others.

Each part gets the same tokens, with experts numbered as the part holds them and -1 for all experts of other parts. The
parts' outputs and input gradients are added: exact, for a backend gives nothing for -1. The order of work in both
directions:

1. The inputs' copies to the CPU are issued, and in forward that of the row counts which a streamed part needs.
2. The parts on the GPU are launched. Nothing waits for them.
3. The copies are waited for. A streamed part is launched with its counts, which takes the host a moment; then the parts
   on the CPU are computed.
4. Their results are copied back and added to the others', on the GPU, without a wait.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..shapes import ExpertShape
from .base import CountsRows, ExpertsBackend, Gradients, SavedForward
from .finite_checks import all_finite, is_finite
from .transfer import Arriving, runs, to_device, to_host


class Part:
    """A backend and the experts of the layer it holds: its expert i is the layer's `experts[i]`.

    Args:
        backend: The backend, of `len(experts)` experts.
        experts: Their ids in the layer, ascending.
        total: Number of experts of the layer.
        device: The device of the ids that `part_ids` gets.
    """

    def __init__(self, backend: ExpertsBackend, experts: Sequence[int], total: int, device: torch.device) -> None:
        self.backend = backend
        self.experts = torch.tensor(list(experts), dtype=torch.int64, device="cpu")
        # The part's number of each of the layer's experts, -1 if it has none; the last entry is that of id -1.
        table = torch.full((total + 1,), -1, dtype=torch.int64, device="cpu")
        table[self.experts] = torch.arange(len(self.experts), device="cpu")
        self._table = table.to(device)
        self._runs = list(runs(self.experts.tolist()))
        self._rows = self.experts.to(device)

    @property
    def counted(self) -> bool:
        """Whether the backend must know on the host how many rows each expert has (`CountsRows`)."""
        return isinstance(self.backend, CountsRows)

    @property
    def on_cpu(self) -> bool:
        """Whether the backend computes on the CPU, and does not stand for a streamed one (tests stream to the CPU)."""
        return self.backend.device.type == "cpu" and not self.counted

    def part_ids(self, ids: Tensor) -> Tensor:
        """The layer's expert ids [T, K] as the part's: int64, -1 for experts of other parts, on the ids' device."""
        return self._table[ids]  # -1 is the last entry

    def taken(self, whole: Tensor) -> Tensor:
        """The part's experts of a tensor of all, [E, ...] -> [part's E, ...], in the backend's dtype."""
        if whole.device == self._rows.device and whole.is_cuda:
            return whole.index_select(0, self._rows).to(self.backend.dtype)
        size = (len(self.experts), *whole.shape[1:])
        part = torch.empty(size, dtype=self.backend.dtype, device=whole.device)
        for first, last, row in self._runs:
            part[row : row + last - first].copy_(whole[first:last])
        return part

    def put(self, part: Tensor, whole: Tensor) -> None:
        """Copy a tensor [part's E, ...] into the part's experts of `whole` [E, ...], in the dtype of `whole`."""
        if whole.device == self._rows.device and whole.is_cuda:
            whole.index_copy_(0, self._rows, part.to(whole.dtype))  # one launch
            return
        for first, last, row in self._runs:  # a copy that converts needs no memory between
            whole[first:last].copy_(part[row : row + last - first])


@dataclass
class _TieredForward(SavedForward):
    parts: list[SavedForward | None]
    x: Tensor
    weights: Tensor
    ids: list[Tensor]  # of each part, in its numbers


class TieredBackend:
    """Experts of one layer held by several backends, each of them by exactly one.

    Args:
        parts: (backend, the experts it holds, ascending), those on the GPU first. The first decides the dtype.
        shape: The whole layer's sizes.

    `device` is the GPU if a part is on one: inputs come from there, and outputs and input gradients are left there.
    LoRA gradients are fp32, freshly allocated, on the device that `set_lora` last got tensors from.

    Attributes:
        cpu_seconds: Seconds that the parts on the CPU have computed so far.

    Raises:
        ValueError: The parts do not hold each of the layer's experts once.
    """

    def __init__(self, parts: Sequence[tuple[ExpertsBackend, Sequence[int]]], shape: ExpertShape) -> None:
        held = sorted(itertools.chain.from_iterable(experts for _, experts in parts))
        if held != list(range(shape.num_experts)):
            raise ValueError(f"experts {held} are not those of a layer of {shape.num_experts}, each of them once")
        devices = [backend.device for backend, _ in parts]
        self.device = next((d for d in devices if d.type != "cpu"), devices[0])
        self.dtype = parts[0][0].dtype
        self.shape = shape
        self.parts = [Part(backend, experts, shape.num_experts, self.device) for backend, experts in parts]
        self.name = "+".join(dict.fromkeys(backend.name for backend, _ in parts))
        self.cpu_seconds = 0.0
        self._lora_device = torch.device("cpu")
        numbered = list(enumerate(self.parts))
        self._on_cpu = [i for i, part in numbered if part.on_cpu]
        self._counted = [i for i, part in numbered if part.counted]
        self._at_once = [i for i, part in numbered if not part.on_cpu and not part.counted]

    @property
    def torch_threads(self) -> int | None:
        """The smallest of the parts' upper bounds for torch.set_num_threads; None if no part has one."""
        limits = (part.backend.torch_threads for part in self.parts)
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def engine(self) -> Any:
        """The `Engine` (kt-kernel's worker pools) of the part that has one; None if no part has."""
        return next((e for part in self.parts if (e := getattr(part.backend, "engine", None))), None)

    @property
    def rank(self) -> int:
        """The smallest LoRA rank that the parts hold, 0 without LoRA."""
        return min(part.backend.rank for part in self.parts)

    @property
    def max_rank(self) -> int | None:
        """The largest LoRA rank that all parts take; None if there is no limit."""
        return min((r for part in self.parts if (r := part.backend.max_rank) is not None), default=None)

    @property
    def max_len(self) -> int | None:
        """The most tokens in a call that all parts take; None if there is no limit."""
        return min((n for part in self.parts if (n := part.backend.max_len) is not None), default=None)

    def set_lora(self, tensors: tuple[Tensor, ...]) -> None:
        """Give each part its experts of six LoRA tensors of one rank; () switches LoRA off."""
        if tensors:
            self._lora_device = tensors[0].device
        for part in self.parts:
            part.backend.set_lora(tuple(part.taken(t) for t in tensors))

    def lora_copy(self) -> tuple[Tensor, ...]:
        """Copies of the six LoRA tensors of all experts, in `dtype`; () without LoRA."""
        pieces = [part.backend.lora_copy() for part in self.parts]
        return self._joined(pieces, self.dtype) if all(pieces) else ()

    def can_backward(self, saved: SavedForward) -> bool:
        """Whether every part can still compute its backward of `saved`."""
        return isinstance(saved, _TieredForward) and all(
            kept is not None and part.backend.can_backward(kept)
            for part, kept in zip(self.parts, saved.parts, strict=True)
        )

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, save: bool) -> tuple[Tensor, SavedForward | None]:
        """The sum of the parts' outputs, [T, H] in `dtype` on `device`, and with `save` what the parts saved."""
        part_ids = [part.part_ids(ids) for part in self.parts]
        arriving = self._inputs_to_cpu(x, weights, part_ids)
        results: dict[int, tuple[Tensor, SavedForward | None]] = {}
        for i in self._at_once:
            results[i] = self.parts[i].backend.forward(x, part_ids[i], weights, save)
        inputs, counts = self._arrived(arriving)
        for i in self._counted:
            backend: Any = self.parts[i].backend
            results[i] = backend.forward_counted(x, part_ids[i], weights, save, counts[i])
        begin = time.perf_counter()
        for i in self._on_cpu:
            results[i] = self.parts[i].backend.forward(*inputs[i], save)
        self.cpu_seconds += time.perf_counter() - begin
        total = self._sum([results[i][0] for i in sorted(results)])
        if not save:
            return total, None
        return total, _TieredForward([results[i][1] for i in sorted(results)], x, weights, part_ids)

    def backward(self, saved: SavedForward, grad_output: Tensor) -> Gradients:
        """The parts' gradients, added or put together; those of LoRA are fp32 and freshly allocated."""
        assert isinstance(saved, _TieredForward)
        sources = [grad_output, all_finite(grad_output)] if self._on_cpu else []
        arriving = to_host(sources, [self._cpu_dtypes()[0], torch.bool] if self._on_cpu else [])
        results: dict[int, Gradients] = {}
        for i in (*self._at_once, *self._counted):
            results[i] = self.parts[i].backend.backward(_kept(saved, i), grad_output)
        arrived = arriving.wait()
        begin = time.perf_counter()
        for i in self._on_cpu:
            results[i] = self._cpu_backward(i, saved, *arrived)
        self.cpu_seconds += time.perf_counter() - begin
        gradients = [results[i] for i in sorted(results)]
        hidden = self._sum([part.hidden_states for part in gradients])
        # Only where the expert is the part's: what a backend writes for -1 is no gradient.
        by_part = [
            to_device(part.top_k_weights, self.device).masked_fill(ids < 0, 0)
            for part, ids in zip(gradients, saved.ids, strict=True)
        ]
        lora = [part.lora for part in gradients]
        joined = self._joined(lora, torch.float32) if all(lora) else ()
        return Gradients(hidden, torch.stack(by_part).sum(0), joined, lora_is_free=True)

    def careful_backward(self, x: Tensor, ids: Tensor, weights: Tensor, grad_output: Tensor, bad: Tensor) -> None:
        """None: `backward` has done it, part by part."""
        return None

    def _cpu_backward(self, i: int, saved: _TieredForward, grad_output: Tensor, finite: Tensor) -> Gradients:
        part = self.parts[i]
        if not finite:  # the GPU's part carries NaN on, the operators might not
            T, K = saved.ids[i].shape
            sizes = part.backend.shape.lora_shapes(part.backend.rank) if part.backend.rank else ()
            lora = tuple(torch.full(size, torch.nan, device="cpu") for size in sizes)
            hidden = torch.full(grad_output.shape, torch.nan, device="cpu")
            return Gradients(hidden, torch.full((T, K), torch.nan, device="cpu"), lora)
        gradients = part.backend.backward(_kept(saved, i), grad_output)
        if not is_finite(gradients.hidden_states):
            bad = ~torch.isfinite(gradients.hidden_states).all(dim=1)
            inputs, _ = self._arrived(self._inputs_to_cpu(saved.x, saved.weights, saved.ids))
            gradients = part.backend.careful_backward(*inputs[i], grad_output, bad) or gradients
        return gradients

    def _cpu_dtypes(self) -> list[torch.dtype]:
        """The dtypes of hidden states and routing weights on the CPU; all parts there take the same."""
        return [self.parts[self._on_cpu[0]].backend.dtype if self._on_cpu else self.dtype, torch.float32]

    def _inputs_to_cpu(self, x: Tensor, weights: Tensor, ids: list[Tensor]) -> Arriving:
        """Begin to copy x, weights and the ids of each part on the CPU, and the row counts of each counted part."""
        backends: list[Any] = [part.backend for part in self.parts]
        inputs = [x, weights, *(ids[i] for i in self._on_cpu)] if self._on_cpu else []
        dtypes = [*self._cpu_dtypes(), *(torch.int64 for _ in self._on_cpu)] if self._on_cpu else []
        counts = [backends[i].row_counts(ids[i]) for i in self._counted]
        return to_host([*inputs, *counts], [*dtypes, *(torch.int64 for _ in counts)])

    def _arrived(self, arriving: Arriving) -> tuple[dict[int, tuple[Tensor, Tensor, Tensor]], dict[int, list[int]]]:
        """Part -> its x, ids and weights, of each part on the CPU; and part -> its row counts."""
        tensors = list(arriving.wait())
        counts = {i: tensors.pop().tolist() for i in reversed(self._counted)}
        if not tensors:
            return {}, counts
        x, weights, *ids = tensors
        return {i: (x, part_ids, weights) for i, part_ids in zip(self._on_cpu, ids, strict=True)}, counts

    def _sum(self, values: list[Tensor]) -> Tensor:
        """The sum of the parts' tensors, on `device` in `dtype`."""
        total = to_device(values[0], self.device, self.dtype)
        for value in values[1:]:
            total = total + to_device(value, self.device, self.dtype)
        return total

    def _joined(self, pieces: list[tuple[Tensor, ...]], dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Six tensors of all experts, in the layer's order, from the parts'; on the LoRA's device."""
        device = self._lora_device
        if device.type == "cpu":  # one wait for all that come from the GPU
            pieces = [to_host(piece, [t.dtype for t in piece]).wait() for piece in pieces]
        joined = []
        for tensors in zip(*pieces, strict=True):
            # The operators' are padded to the rank they were built for.
            rows, columns = (min(t.shape[axis] for t in tensors) for axis in (1, 2))
            whole = torch.empty(self.shape.num_experts, rows, columns, dtype=dtype, device=device)
            for part, piece in zip(self.parts, tensors, strict=True):
                part.put(to_device(piece, device)[:, :rows, :columns], whole)
            joined.append(whole)
        return tuple(joined)


def _kept(saved: _TieredForward, i: int) -> SavedForward:
    kept = saved.parts[i]
    assert kept is not None, "a forward without save has no backward"
    return kept
