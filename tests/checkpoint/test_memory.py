"""The most memory a process has while it loads: what stays, and one and a half layers; two where it quantizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from kt_hf.backends.quantizer import _PIECE, EXPERT_BITS
from tests.support.cases import KERNEL_MARKS

ROOT = Path(__file__).parents[2]
LAYERS = 6
LAYER = 3 * 8 * 512 * 1024 * 2  # bytes in bf16
CHILD = """
import json, sys
from pathlib import Path
import torch
from kt_hf import KTConfig, load_kt_model
from kt_hf.backends import kernel_availability
from kt_hf.system import gpu

def status(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024

own, more = sys.argv[4], {}
if own != "bf16":
    gpu.experts_device = lambda: torch.device("cpu")  # as on a GPU, and computed where it stands
    more = {"kt_expert_placement": {"streamed": 8}, "kt_expert_dtype": own}
config = KTConfig(kt_backend=sys.argv[2], kt_num_threads=1, kt_lora_rank=4, kt_share_backward_weights=True, **more)
load_kt_model(sys.argv[3], config, dtype=torch.bfloat16)  # a tiny one first: libraries come into memory
Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
before = status("VmRSS")
model = load_kt_model(sys.argv[1], config, dtype=torch.bfloat16)
print(json.dumps([before, status("VmHWM"), status("VmRSS")]))
"""


def save(folder: Path, dtype: torch.dtype, layers: int, hidden: int) -> Path:
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=hidden, moe_intermediate_size=2 * hidden, intermediate_size=64,
        num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=1, head_dim=32, num_experts=8,
        num_experts_per_tok=2, dtype=dtype,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).to(dtype)
    model.save_pretrained(folder, max_shard_size="70MB")
    return folder


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux, to measure the peak")
@pytest.mark.parametrize(
    ("backend", "source"),
    [
        ("torch", torch.bfloat16),
        pytest.param("torch", torch.float32, marks=pytest.mark.slow),
        pytest.param("AMXBF16", torch.bfloat16, marks=[*KERNEL_MARKS, pytest.mark.slow]),
        pytest.param("AMXBF16", torch.float32, marks=[*KERNEL_MARKS, pytest.mark.slow]),
    ],
    ids=str,
)
def test_peak(backend: str, source: torch.dtype, tmp_path: Path) -> None:
    before, peak, after = measured(tmp_path, backend, source)
    assert after - before > 0.9 * LAYERS * LAYER  # it measures what it should
    assert after - before < (LAYERS + 1.2) * LAYER
    assert peak - after < 1.5 * LAYER


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux, to measure the peak")
@pytest.mark.parametrize("own", ["int4", pytest.param("int8", marks=pytest.mark.slow)])
def test_peak_while_quantizing(own: str, tmp_path: Path) -> None:
    """What stays is that of the low bits; one layer is quantized, a piece at a time, while the next is read."""
    before, peak, after = measured(tmp_path, "torch", torch.bfloat16, own)
    kept = LAYERS * LAYER * EXPERT_BITS[own] / 16
    assert 0.9 * kept < after - before < kept + 0.6 * LAYER
    assert peak - after < 2 * LAYER + 20 * _PIECE


def measured(folder: Path, backend: str, source: torch.dtype, own: str = "bf16") -> list[int]:
    """Bytes of a process before the model is loaded, at most while it is, and after."""
    big, tiny = save(folder / "big", source, LAYERS, 512), save(folder / "tiny", source, 1, 32)
    # Tensors of a real layer have pages of their own, which go back when they are freed. Here they are small enough for
    # glibc to put them onto a thread's heap, of which it keeps up to 64 MB; the limit makes them as real ones.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    command = [sys.executable, "-c", CHILD, str(big), backend, str(tiny), own]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: list[int] = json.loads(done.stdout.splitlines()[-1])
    return found
