"""Experts resident on a GPU, computed by the grouped products of `grouped_mm`: the host does not wait for them.

How many rows an expert gets is known on the GPU only, and the host does not ask before a layer's products are launched.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...errors import KTAMXConfigError
from ...shapes import ExpertShape
from ..base import ExpertWeights, Gradients, SavedForward
from ..torch_loop import TorchBackend
from . import grouped_mm as grouped
from .grouped_mm import GroupedExperts, Lora, aligned
from .rows import PLAINLY, Gating, Rows


@dataclass
class _GroupedForward(SavedForward):
    rows: Rows
    x: Tensor  # [T, H]
    lora: Lora | None


class GroupedBackend(GroupedExperts):
    """Experts in bf16 on the device of their weights, computed without a wait for it.

    Args:
        weights: gate_up [E, 2I, H] and down [E, H, I] in bf16, and biases if any; taken over, not copied.
        shape: The layer's sizes; H and I must be multiples of 8.

    Raises:
        KTAMXConfigError: Weights of another dtype, or other sizes.
    """

    name = "torch"

    def __init__(self, weights: ExpertWeights, shape: ExpertShape) -> None:
        super().__init__(shape, weights.gate_up.device, weights.gate_up_bias)
        if not fits(weights, shape):
            raise KTAMXConfigError(f"Experts of {weights.gate_up.dtype}: grouped products need bfloat16.")
        self.weights = weights

    def can_backward(self, saved: SavedForward) -> bool:
        """Whether `saved` is of this backend: a saved forward stays good."""
        return isinstance(saved, _GroupedForward)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, save: bool) -> tuple[Tensor, SavedForward | None]:
        """Launch the products; the output [T, H] is bf16 on `device`, and with `save` the inputs are kept."""
        gate_up, down = self.weights.gate_up, self.weights.down

        def compute(kept: _GroupedForward) -> Tensor:
            return resident_output(x, gate_up, down, kept.lora, kept.rows, self._gating)

        out, saved = self._room.computed(ids.numel(), lambda rows: self.saved_of(x, ids, weights, rows), compute)
        return out, saved if save else None

    def saved_of(
        self, x: Tensor, ids: Tensor, weights: Tensor, known: int | list[int] | None = None
    ) -> _GroupedForward:
        """The inputs as `forward` keeps them, rows sorted by expert."""
        valid = known if isinstance(known, int) else None
        return _GroupedForward(Rows.by_expert(ids, weights, self._numbers, self.shape.ranks, valid), x, self._lora)

    def known_rows(self, saved: SavedForward) -> int:
        """How many rows of a forward were kept: all that are of an expert."""
        assert isinstance(saved, _GroupedForward)
        return len(saved.rows.tokens)

    def backward(self, saved: SavedForward, grad_output: Tensor) -> Gradients:
        """Launch the products of a backward; all gradients are new tensors on `device`, those of LoRA in bf16."""
        assert isinstance(saved, _GroupedForward)
        gate_up, down = self.weights.gate_up, self.weights.down
        return resident_gradients(saved.x, grad_output, gate_up, down, saved.lora, saved.rows, self._gating)


def resident_output(
    x: Tensor, gate_up: Tensor, down: Tensor, lora: Lora | None, rows: Rows, gating: Gating = PLAINLY
) -> Tensor:
    """Compute a layer whose weights are on the GPU, without a wait.

    Args:
        x: Hidden states, [T, H] bf16.
        gate_up: [E, 2I, H] bf16.
        down: [E, H, I] bf16.
        lora: LoRA of the experts; None without.
        rows: The T*K rows, sorted by expert.
        gating: The layer's gate, and its experts' biases.

    Returns:
        [T, H] bf16.
    """
    return rows.sum_by_token(grouped.outputs(x, gate_up, down, lora, rows, gating), weighted=True)


def resident_gradients(
    x: Tensor,
    grad_output: Tensor,
    gate_up: Tensor,
    down: Tensor,
    lora: Lora | None,
    rows: Rows,
    gating: Gating = PLAINLY,
) -> Gradients:
    """The gradients of `resident_output`, as new tensors on the GPU, those of LoRA in bf16; without a wait.

    Args:
        x: Hidden states of the forward, [T, H] bf16.
        grad_output: [T, H] bf16.
        gate_up: [E, 2I, H] bf16.
        down: [E, H, I] bf16.
        lora: LoRA of the experts in that forward; None without.
        rows: The T*K rows, sorted by expert.
        gating: The layer's gate, and its experts' biases.
    """
    gradients = grouped.gradients(x, grad_output, gate_up, down, lora, rows, gating)
    of_lora = gradients.lora.projections() if gradients.lora else ()
    grad_x = rows.sum_by_token(gradients.x, weighted=False)
    return Gradients(grad_x, rows.by_choice(gradients.weights), of_lora)


def fits(weights: ExpertWeights, shape: ExpertShape) -> bool:
    """Whether `GroupedBackend` can compute these experts."""
    return weights.gate_up.dtype == weights.down.dtype == grouped.DTYPE and aligned(shape)


def gpu_backend(weights: ExpertWeights, shape: ExpertShape) -> GroupedBackend | TorchBackend:
    """The backend of experts on a GPU: `GroupedBackend` where it can compute them, else `TorchBackend`.

    Args:
        weights: gate_up [E, 2I, H] and down [E, H, I] on the GPU; taken over.
        shape: The layer's sizes.
    """
    return GroupedBackend(weights, shape) if fits(weights, shape) else TorchBackend(weights, shape)
