"""What a backend is: experts of one layer, computed forward and backward, knowing nothing of autograd, PEFT or
Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..shapes import ExpertShape
from .block_scaled import ScaledExperts


@dataclass
class ExpertWeights:
    """The frozen weights of a layer's experts as transformers holds them: fused and stacked.

    Attributes:
        gate_up: [E, 2I, H], the gate's rows before the up-projection's.
        down: [E, H, I], of the same dtype and device.
        packed_as: The backend that has packed them, should packing be interrupted between that and its return.
        scaled: Experts that are of 8 bits yet, to be streamed so: gate_up and down are those of the others then.
    """

    gate_up: Tensor
    down: Tensor
    packed_as: ExpertsBackend | None = None
    scaled: ScaledExperts | None = None

    def rows_of(self, experts: Sequence[int]) -> list[int]:
        """Where experts of the layer are in gate_up and down."""
        if self.scaled is None:
            return list(experts)
        apart = set(self.scaled.experts)
        held = [e for e in range(len(self.gate_up) + len(apart)) if e not in apart]
        return [held.index(e) for e in experts]


class SavedForward:
    """A forward kept for its backward. Backends add what they need; it is opaque to everybody else."""


@dataclass
class Gradients:
    """What a backward gives.

    Attributes:
        hidden_states: [T, H], in the backend's dtype and on its device.
        top_k_weights: [T, K], fp32.
        lora: Six tensors in the order and shape of the backend's LoRA, or () at rank 0. They may be the backend's own
            buffers, overwritten by its next backward: use or copy them before.
        lora_is_free: They are not, but memory that nobody else uses.
    """

    hidden_states: Tensor
    top_k_weights: Tensor
    lora: tuple[Tensor, ...] = ()
    lora_is_free: bool = False


@dataclass
class Availability:
    """Whether a backend runs here, and in words why or why not."""

    ok: bool
    reason: str
    details: dict[str, Any] = field(default_factory=dict)


@runtime_checkable
class CountsRows(Protocol):
    """What a backend has besides, if it must know on the host how many rows each expert has: whoever waits for a GPU
    anyway brings the counts along, instead of `forward` waiting for them."""

    def row_counts(self, ids: Tensor) -> Tensor:
        """[E] int64 on `device`: the rows of each expert in ids [T, K]."""

    def forward_counted(
        self, x: Tensor, ids: Tensor, weights: Tensor, save: bool, counts: list[int]
    ) -> tuple[Tensor, SavedForward | None]:
        """As `forward`, which asks for the counts itself."""


class ExpertsBackend(Protocol):
    """Experts of one layer. Calls are not thread-safe: the caller holds `kt_hf.backends.CALL_LOCK`.

    Inputs of `forward` and `backward` are contiguous tensors on `device`: hidden states in `dtype`, ids int64 (each in
    [0, E) or -1 for no expert), routing weights fp32. On a GPU calls return when their work is launched, and what they
    return is read on the current stream; on the CPU it is in pinned memory where the process uses a GPU.
    """

    name: str
    shape: ExpertShape
    dtype: torch.dtype
    device: torch.device

    @property
    def torch_threads(self) -> int | None:
        """The most threads PyTorch should have beside it; None where it computes on PyTorch's itself."""

    @property
    def rank(self) -> int:
        """The LoRA rank held, 0 without LoRA."""

    @property
    def max_rank(self) -> int | None:
        """The largest rank `set_lora` takes; None if there is no limit."""

    @property
    def max_len(self) -> int | None:
        """Most tokens in a call; None if there is no limit."""

    def set_lora(self, tensors: tuple[Tensor, ...]) -> None:
        """Copy in six LoRA tensors of one rank, scalings folded into B, of any dtype and device. () switches LoRA off.
        Spoils saved forwards."""

    def lora_copy(self) -> tuple[Tensor, ...]:
        """A copy of what `set_lora` last took."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, save: bool) -> tuple[Tensor, SavedForward | None]:
        """Output [T, H] in `dtype`, and with `save` what `backward` needs."""

    def can_backward(self, saved: SavedForward) -> bool:
        """Whether `saved` is still what the backend would compute a backward of."""

    def backward(self, saved: SavedForward, grad_output: Tensor) -> Gradients:
        """Gradients for the forward that gave `saved`; grad_output is [T, H] in `dtype`."""

    def careful_backward(
        self, x: Tensor, ids: Tensor, weights: Tensor, grad_output: Tensor, bad: Tensor
    ) -> Gradients | None:
        """Gradients by a slower way, where `backward` gave some that are not finite for the tokens `bad` [T] (bool);
        None if there is no other way."""
