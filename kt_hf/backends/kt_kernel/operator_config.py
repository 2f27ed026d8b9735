"""The configuration that kt-kernel's operators are built from, but for the weights."""

from __future__ import annotations

import itertools
from typing import Any

from torch import Tensor

from ...shapes import LORA_NAMES, ExpertShape

# The operators key a process-wide pool by layer_idx: drawn once, never given again.
_layer_keys = itertools.count()
# INT8 and INT4 are built for lengths that are multiples of this only.
_LENGTH_STEP = 32


def operator_config(
    shape: ExpertShape, lora: tuple[Tensor, ...], max_len: int, share_backward: bool, share_cache: bool,
    expert_map: Tensor, pool: Any,
) -> Any:  # fmt: skip
    """kt-kernel's `MOESFTConfig` of a layer, under a number that no other layer of the process had.

    Args:
        shape: The layer's sizes.
        lora: The six buffers that the operators read LoRA from, or (); they must outlive the operators.
        max_len: Most tokens in a call; rounded up to what the operators can be built for.
        share_backward: One buffer of backward weights for all layers.
        share_cache: One saved forward for all layers.
        expert_map: 0 to E - 1, int64; it must outlive the operators.
        pool: The worker pools, `CPUInfer.backend_`.
    """
    from kt_kernel import kt_kernel_ext

    rank = lora[0].shape[1] if lora else 0
    config = kt_kernel_ext.moe.MOESFTConfig()
    config.expert_num = shape.num_experts
    config.num_experts_per_tok = shape.top_k
    config.hidden_size = shape.hidden_size
    config.intermediate_size = shape.intermediate_size
    config.lora_rank = rank
    config.lora_alpha = float(rank)  # alpha / rank = 1: scalings are folded into B
    config.lora_dropout = 0.0
    config.max_cache_depth = 1
    config.max_len = -(-max_len // _LENGTH_STEP) * _LENGTH_STEP
    config.layer_idx = next(_layer_keys)
    config.share_backward_bb = share_backward
    config.share_cache_pool = share_cache
    config.full_weight_grad = False
    config.authoritative_optimizer_grads = bool(rank)
    config.physical_to_logical_map = expert_map.data_ptr()
    config.swiglu_limit = 0.0
    for name, tensor in zip(LORA_NAMES, lora, strict=False):
        setattr(config, name, tensor.data_ptr())
    config.pool = pool
    return config
