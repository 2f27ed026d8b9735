"""Bytes of activations in host memory: of experts that the CPU computes, and of the rest where there is no GPU."""

from __future__ import annotations

from .config.settings import TrainSettings
from .model_sizes import ModelSizes

_ROWS_PER_EXPERT = 20  # the operators pad each expert's rows


def expert_activations(s: TrainSettings, m: ModelSizes, T: int, kernel: bool) -> int:
    """Bytes of host memory that layers keep for backward, and that the CPU works in (shared by all layers).

    Args:
        s: What is to be run.
        m: Sizes of its model.
        T: Tokens of a forward.
        kernel: Whether kt-kernel's operators compute, else PyTorch.
    """
    if s.kt.kt_max_len:
        T = min(T, s.kt.kt_max_len)
    rows = T * m.top_k
    kept_layers = m.expert_layers if s.kt.kt_expert_activations != "recompute" or not s.checkpointing else 1
    own = T * m.hidden * 2  # hidden states of this rank's tokens; those of all are there in one layer at a time
    kept = rows * (3 * m.intermediate + m.hidden) * 2 + own
    if s.checkpointing and s.kt.kt_expert_activations != "recompute":
        kept += 2 * own  # input and output, for the recompute
    gathered = 2 * (m.ranks - 1) * own
    if not kernel:
        work = rows * (4 * m.hidden + 6 * m.intermediate) * 2
        return kept_layers * kept + work + gathered
    padded = rows + _ROWS_PER_EXPERT * m.experts
    work = gathered + padded * (8 * m.hidden + 12 * m.intermediate) * 2
    work += m.lora_experts // m.expert_layers * 4 + rows * s.run.lora_rank * 240
    return kept_layers * kept + work


def other_activations(s: TrainSettings, m: ModelSizes, T: int) -> int:
    """Bytes of hidden states between layers, and inside of layers where nothing is computed again.

    Args:
        s: What is to be run.
        m: Sizes of its model.
        T: Tokens of a forward.
    """
    inside = T * (12 * m.hidden + 6 * m.attention_width) * 2
    between = T * m.hidden * 2 * m.layers
    return between + inside * (1 if s.checkpointing else m.layers)
