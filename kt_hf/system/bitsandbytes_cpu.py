"""What bitsandbytes does to its layers on a CPU, and must not while they are trained."""

from __future__ import annotations

from typing import Any

from torch import nn


def keep_trainable(model: nn.Module) -> None:
    """Keep bitsandbytes' 4-bit layers on the CPU in the layout whose gradients exist.

    On a CPU with AVX512-BF16, bitsandbytes 0.50 packs a layer's weight anew at the first forward in evaluation, for an
    operator without a backward: an evaluation in the middle of a run would end the gradients of attention and shared
    experts without a word, and sizes that are no multiple of 64 raise. A layer packed so already is unpacked.
    """
    module: Any
    for module in model.modules():
        if not getattr(module, "support_avx512bf16_for_cpu", False):
            continue
        module.support_avx512bf16_for_cpu = False
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            module.state_dict()  # unpacks the weight in place
