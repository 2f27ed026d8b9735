"""One layer by kt-kernel's operators on a rank's tokens; started by torchrun, or alone.

torchrun --nproc_per_node 2 tests/support/rank_kernel.py FOLDER
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.support.cases import KERNEL_BF16
from tests.support.helpers import MIXTRAL
from tests.support.layers import LayerInputs, forward_backward, make_inputs, random_lora, set_lora
from tests.support.patched import adapted_layers

TOKENS = 48


def main(folder: Path) -> None:
    """Write this rank's output and gradients, those of owned LoRA as the sum over all tokens."""
    ranks, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    torch.set_num_threads(1)
    if ranks > 1:
        dist.init_process_group("gloo")
    layer = adapted_layers(MIXTRAL, KERNEL_BF16)[0][0]
    owned = slice(None) if layer.share is None else layer.share.experts
    set_lora(layer, {name: value[owned] for name, value in random_lora(MIXTRAL).items()})
    part = slice(rank * TOKENS // ranks, (rank + 1) * TOKENS // ranks)
    inputs = LayerInputs(*(value[part] for value in make_inputs(MIXTRAL, TOKENS, torch.bfloat16)))
    result = forward_backward(layer, inputs)
    assert layer.backend_name == "AMXBF16"
    lora = {name: ranks * value for name, value in result.grads.items() if "lora" in name}
    torch.save({"output": result.output, **result.grads, **lora}, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
