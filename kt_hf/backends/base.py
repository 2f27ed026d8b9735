"""What a backend is: one layer's experts, computed forward and backward.

A backend knows nothing of autograd, PEFT or Trainer.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from ..shapes import ExpertShape
from .packed import PackedExperts, PackedMatrices

CALL_LOCK = threading.RLock()
"""Held around every call of a backend: the operators' scratch memory is the process's, whatever the layer."""
if hasattr(os, "register_at_fork"):
    # A fork made while another thread computes: nobody would ever give the child's copy of the lock back.
    os.register_at_fork(after_in_child=CALL_LOCK._at_fork_reinit)  # type: ignore[attr-defined]


@dataclass
class ExpertWeights:
    """The frozen weights of a layer's experts as transformers holds them: fused and stacked.

    Attributes:
        gate_up: [E, 2I, H], floating, on any device: the gate's rows before the up-projection's. Without a gate the
            up-projection's alone, [E, I, H].
        down: [E, H, I], of the same dtype and device.
        packed_as: The backend that holds the packed weights. It is set before packing returns, so that a caller who is
            interrupted in between finds it.
        low_bit: Experts kept in 4 or 8 bits. gate_up and down then hold the other experts only, in order.
        gate_up_bias: [E, 2I] of all experts, in the order of gate_up's rows; None without biases.
        down_bias: [E, H] of all experts; None without. Backends do not read it: the layer adds what it gives.
    """

    gate_up: Tensor
    down: Tensor
    packed_as: ExpertsBackend | None = None
    low_bit: PackedExperts | None = None
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    def rows_of(self, experts: Sequence[int]) -> list[int]:
        """The rows of `gate_up` and `down` where these experts of the layer are."""
        if self.low_bit is None:
            return list(experts)
        row = {e: i for i, e in enumerate(e for e in range(self.num_experts) if e not in set(self.low_bit.experts))}
        return [row[e] for e in experts]

    @property
    def num_experts(self) -> int:
        """Experts of the layer, those of low bits included."""
        return len(self.gate_up) + (len(self.low_bit.experts) if self.low_bit else 0)

    def wide(self, experts: Sequence[int], device: torch.device, dtype: torch.dtype) -> ExpertWeights:
        """Some experts of the layer, copied, those of low bits widened.

        Args:
            experts: Their ids.
            device: Where the copies go.
            dtype: Floating, of the copies.
        """
        packed = [] if self.low_bit is None else sorted(set(experts) & set(self.low_bit.experts))
        plain = [e for e in experts if e not in set(packed)]
        order = [*plain, *packed]
        back = [order.index(e) for e in experts]
        low = self.low_bit.select(packed) if self.low_bit is not None and packed else None

        def stacked(held: Tensor, stored: PackedMatrices | None) -> Tensor:
            index = torch.tensor(self.rows_of(plain), dtype=torch.int64, device=held.device)
            rows = held.detach().index_select(0, index).to(device, dtype) if plain or stored is None else None
            if stored is None:
                return cast(Tensor, rows)
            wide = stored.to(device).dequantized(dtype)
            both = wide if rows is None else torch.cat([rows, wide])
            return both if back == sorted(back) else both[back]

        gate_up = stacked(self.gate_up, low.gate_up if low else None)
        down, bias = stacked(self.down, low.down if low else None), self.bias_of(experts)
        return ExpertWeights(gate_up, down, gate_up_bias=None if bias is None else bias.to(device, dtype))

    def bias_of(self, experts: Sequence[int]) -> Tensor | None:
        """The biases of gate and up of some experts of the layer, copied, [n, 2I]; None without biases."""
        return None if self.gate_up_bias is None else self.gate_up_bias.detach()[list(experts)]

    def part(self, experts: slice) -> ExpertWeights:
        """Copies of the weights of consecutive experts, by ids from 0; those of the others can then be released.

        Biases of the down projections stay those of all experts.

        Args:
            experts: Of the layer.
        """
        ids = range(*experts.indices(self.num_experts))
        packed = [] if self.low_bit is None else [e for e in self.low_bit.experts if e in ids]
        rows = self.rows_of([e for e in ids if e not in set(packed)])
        wide = slice(rows[0], rows[-1] + 1) if rows else slice(0)
        low = self.low_bit.select(packed) if self.low_bit is not None and packed else None
        return ExpertWeights(
            self.gate_up[wide].clone(),
            self.down[wide].clone(),
            low_bit=PackedExperts([e - ids.start for e in packed], low.gate_up, low.down) if low else None,
            gate_up_bias=self.bias_of(ids),
            down_bias=self.down_bias,
        )


class SavedForward:
    """A forward kept for its backward. Each backend has a class of its own for it, which only that backend reads."""


@dataclass
class Gradients:
    """The result of a backend's backward.

    Attributes:
        hidden_states: Gradient of the input, [T, H], in the backend's dtype and on its device.
        top_k_weights: Gradient of the routing weights, [T, K], fp32.
        lora: Gradients of the six LoRA tensors, in the order and shapes of `set_lora`; () at rank 0. Unless
            `lora_is_free`, they are the backend's buffers, which its next backward overwrites.
        lora_is_free: True if `lora` is freshly allocated: the caller may keep or overwrite it.
    """

    hidden_states: Tensor
    top_k_weights: Tensor
    lora: tuple[Tensor, ...] = ()
    lora_is_free: bool = False


@dataclass
class Availability:
    """Whether a backend runs on this machine.

    Attributes:
        ok: Whether it runs.
        reason: In words, why it runs or why it does not.
        details: Facts of the package and the machine, such as "version" and "variant".
    """

    ok: bool
    reason: str
    details: dict[str, Any] = field(default_factory=dict)


@runtime_checkable
class CountsRows(Protocol):
    """A backend that must know on the host how many rows each expert has.

    A caller that waits for the GPU anyway copies the counts along with what it waits for, and calls `forward_counted`;
    `forward` waits for the counts by itself.
    """

    def row_counts(self, ids: Tensor) -> Tensor:
        """The rows of each expert in ids [T, K]: [E], int64, on the backend's device."""

    def forward_counted(
        self, x: Tensor, ids: Tensor, weights: Tensor, save: bool, counts: list[int] | None
    ) -> tuple[Tensor, SavedForward | None]:
        """`forward` without a wait for the GPU: `counts` are the values of `row_counts(ids)`."""


@runtime_checkable
class Resumable(Protocol):
    """A backend whose backward needs the inputs of the forward, and nothing that it has computed."""

    def saved_of(self, x: Tensor, ids: Tensor, weights: Tensor, known: int | list[int] | None = None) -> SavedForward:
        """What `backward` needs of a forward of these inputs, as `ExpertsBackend.forward` would save it.

        Args:
            x: Hidden states [T, H].
            ids: [T, K] int64.
            weights: [T, K] fp32.
            known: The `known_rows` of that forward, for which the host may have to wait else.
        """

    def known_rows(self, saved: SavedForward) -> int | list[int]:
        """What the host knows of a forward's rows that are of an expert: of each expert, or how many at most."""


class ExpertsBackend(Protocol):
    """Experts of one layer. Calls are not thread-safe: the caller holds `kt_hf.backends.CALL_LOCK`.

    Attributes:
        name: The backend in words, for messages: "torch", "AMXBF16", ...
        shape: The layer's sizes: E experts, K of them a token, hidden size H, intermediate size I.
        dtype: The dtype of hidden states.
        device: The device of inputs and outputs.

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
        """Upper bound for torch.set_num_threads while this backend computes; None if it runs on PyTorch's threads."""

    @property
    def rank(self) -> int:
        """The LoRA rank held, 0 without LoRA."""

    @property
    def max_rank(self) -> int | None:
        """The largest LoRA rank that `set_lora` takes; None if there is no limit."""

    @property
    def max_len(self) -> int | None:
        """The most tokens T in a call; None if there is no limit."""

    def set_lora(self, tensors: tuple[Tensor, ...]) -> None:
        """Copy in LoRA values; forwards saved before cannot be trusted afterwards: ask `can_backward`.

        Args:
            tensors: Six tensors of one rank, of any dtype and device, in the order of `LORA_NAMES` and the shapes of
                `shape.lora_shapes(rank)`, with the scalings folded into the B. () switches LoRA off.
        """

    def lora_copy(self) -> tuple[Tensor, ...]:
        """A copy of the values that `set_lora` last took; () without LoRA."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, save: bool) -> tuple[Tensor, SavedForward | None]:
        """Compute the experts.

        Args:
            x: Hidden states [T, H], in `dtype`.
            ids: The experts of each token, [T, K], int64, -1 for none.
            weights: The routing weights, [T, K], fp32.
            save: Whether a backward will follow.

        Returns:
            The output [T, H] in `dtype`; and what `backward` needs, None without `save`.
        """

    def can_backward(self, saved: SavedForward) -> bool:
        """Whether `backward` can still be called with `saved`: a later call may have spoiled it."""

    def backward(self, saved: SavedForward, grad_output: Tensor) -> Gradients:
        """Gradients for the forward that gave `saved`; grad_output is [T, H] in `dtype`."""

    def careful_backward(
        self, x: Tensor, ids: Tensor, weights: Tensor, grad_output: Tensor, bad: Tensor
    ) -> Gradients | None:
        """Gradients by a slower way, after `backward` gave gradients that are not finite.

        Args:
            x: Hidden states [T, H] of the forward, as are `ids` and `weights`.
            ids: [T, K] int64.
            weights: [T, K] fp32.
            grad_output: [T, H] in `dtype`.
            bad: The tokens whose gradients were not finite, [T], bool.

        Returns:
            The gradients of all tokens; None if the backend has no other way.
        """
