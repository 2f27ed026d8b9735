"""`BackendFactory`: what the layers of a model ask of the placement of its experts."""

from __future__ import annotations

from typing import Protocol

from ..backends import ExpertsBackend, ExpertWeights, PackedLayerFiles
from ..backends.finite_checks import DeferredChecks
from ..shapes import ExpertShape


class BackendFactory(Protocol):
    """What a layer asks of the model's placement: to build its backend, and how LoRA is to be held.

    Attributes:
        checks: Where results on a GPU are left to be checked, for all layers of the model.
    """

    checks: DeferredChecks

    @property
    def rank(self) -> int | None:
        """LoRA rank that the operators are built for; None takes the first adapter's."""

    @property
    def max_rank(self) -> int | None:
        """Largest rank that a layer which is not packed yet may get; None if there is no limit."""

    def retains(self, layer_idx: int) -> bool:
        """Whether a layer's first forward is kept for a recompute in backward."""

    def lora_on_gpu(self, rank: int, layer_idx: int) -> bool:
        """Whether a layer's LoRA parameters move to a GPU with the model, decided by the rank of the first adapter."""

    def begins(self, layer_idx: int, tokens: int, gradients: bool, training: bool) -> None:
        """A layer's forward begins, which is no recompute: the time to move weights.

        Args:
            layer_idx: Of the layer.
            tokens: Of the forward.
            gradients: Whether a backward may follow.
            training: Whether the layer is in training mode.
        """

    def make_room(self, label: str) -> bool:
        """Free what a GPU can do without, of which it has too little for a layer; whether there was anything.

        Args:
            label: The layer's name in the model, for messages.
        """

    def build(
        self, weights: ExpertWeights | PackedLayerFiles, shape: ExpertShape, rank: int, label: str, layer_idx: int
    ) -> ExpertsBackend:
        """Build the backend of a layer.

        Args:
            weights: The layer's, taken over.
            shape: Sizes of the layer.
            rank: Largest LoRA rank; 0 for inference.
            label: The layer's name in the model, for messages.
            layer_idx: Its index among the model's layers.
        """

    def warn_dropout(self, dropout: float) -> None:
        """Say once a model that experts train without LoRA dropout."""
