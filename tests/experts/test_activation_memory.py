"""What experts keep between forward and backward: every layer's with `retain`, one layer's with `recompute`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.cases import KERNEL_MARKS

pytestmark = pytest.mark.slow

HIDDEN, INNER, TOP_K, RANK, TOKENS = 256, 512, 2, 4, 4096
# Bytes a saved forward takes in kt-kernel 0.7.2, measured: its input, and per expert gate, up, product and output.
LAYER = TOKENS * (2 * HIDDEN + TOP_K * (6 * INNER + 2 * HIDDEN + 4 * RANK)) / 2**20

STEP = f"""
import sys, torch
from peft import get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM
from kt_hf import KTConfig, apply_kt_moe, kt_lora_config

def memory(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1024

torch.set_num_threads(1)
config = MixtralConfig(hidden_size={HIDDEN}, intermediate_size={INNER}, num_local_experts=4,
    num_experts_per_tok={TOP_K}, num_hidden_layers=int(sys.argv[2]), num_attention_heads=4, num_key_value_heads=2,
    vocab_size=64)
settings = KTConfig(kt_backend="AMXBF16", kt_num_threads=1, kt_expert_activations=sys.argv[1], kt_max_len={TOKENS})
model = apply_kt_moe(MixtralForCausalLM(config).bfloat16(), settings)
model = get_peft_model(model, kt_lora_config(model, lora_rank={RANK}))
model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
model.train()
def step(rows):
    ids = torch.randint(64, (rows, 64))
    model(input_ids=ids, labels=ids).loss.backward()
step(1)  # what is imported and made once
before = memory("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
step({TOKENS} // 64)
print("MiB", memory("VmHWM") - before)
"""


def growth(activations: str, layers: int) -> float:
    """MiB that a training step of TOKENS tokens takes at its peak."""
    command = [sys.executable, "-c", STEP, activations, str(layers)]
    # The C library then gives large blocks back at once: what it keeps for later would be counted as held.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "500000"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return float(done.stdout.rpartition("MiB")[2])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize("activations", [pytest.param(name, marks=KERNEL_MARKS) for name in ("retain", "recompute")])
def test_memory_of_two_and_of_twelve_layers(activations: str) -> None:
    each = (growth(activations, 12) - growth(activations, 2)) / 10
    checkpointed = 3 * TOKENS * HIDDEN * 2 / 2**20  # a layer's input, and room for what the allocator does
    if activations == "recompute":
        assert each < checkpointed < LAYER / 4
    else:
        assert 0.8 * LAYER < each < 1.2 * LAYER + 2 * checkpointed
