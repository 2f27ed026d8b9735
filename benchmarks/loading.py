"""load_kt_model on a model of random weights: host memory at its peak against what stays, and the time it takes
against reading the files and packing the experts measured apart. Every measurement is a process of its own, and the
files are put out of the system's cache before it.

python benchmarks/loading.py                       12 layers with 8 GB of experts in bf16
python benchmarks/loading.py --source fp8          the same as block-wise FP8
python benchmarks/loading.py --against             also from_pretrained and apply_kt_moe
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def make_checkpoint(folder: Path, layers: int, experts: int, hidden: int, intermediate: int, source: str) -> None:
    """A Qwen3-MoE of random weights, a file a layer."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    config = Qwen3MoeConfig(
        vocab_size=4096, hidden_size=hidden, moe_intermediate_size=intermediate, intermediate_size=intermediate,
        num_hidden_layers=layers, num_attention_heads=16, num_key_value_heads=4, head_dim=64, num_experts=experts,
        num_experts_per_tok=4, dtype=torch.bfloat16, architectures=["Qwen3MoeForCausalLM"],
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    rest = {n: t for n, t in model.state_dict().items() if ".experts." not in n}
    random = torch.Generator().manual_seed(0)
    weight_map = {}
    sizes = {
        "gate_proj": (intermediate, hidden),
        "up_proj": (intermediate, hidden),
        "down_proj": (hidden, intermediate),
    }
    for layer in range(-1, layers):
        tensors = {}
        if layer < 0:
            tensors = {n: torch.randn(t.shape, generator=random).mul_(0.02).bfloat16() for n, t in rest.items()}
        for expert in range(experts if layer >= 0 else 0):
            for name in PROJECTIONS:
                key = f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight"
                weight = torch.randn(sizes[name], generator=random).mul_(0.02)
                if source == "fp8":
                    blocks = [-(-size // 128) for size in weight.shape]
                    tensors[f"{key}_scale_inv"] = torch.full(blocks, 2**-12)
                    tensors[key] = weight.mul_(2**12).to(torch.float8_e4m3fn)
                else:
                    tensors[key] = weight.bfloat16()
        file = folder / f"model-{layer + 2:05}-of-{layers + 1:05}.safetensors"
        save_file(tensors, file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file.name)
        print(f"\rwrote {layer + 2} of {layers + 1} files", end="", flush=True)
    print()
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if source == "fp8":
        config.quantization_config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config.save_pretrained(folder)


def out_of_cache(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def memory() -> tuple[int, int]:
    """(resident, peak) bytes of this process, without pages of files, which the system takes back when it needs to."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024, int(fields["VmHWM"].split()[0]) * 1024


def child(what: str, folder: Path, backend: str, threads: int, share: bool) -> dict[str, Any]:
    """One measurement: seconds, and memory before, after and at the peak."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from kt_hf import KTConfig, apply_kt_moe, load_kt_model
    from kt_hf.backends import kernel_availability
    from kt_hf.checkpoint import ExpertCheckpoint
    from kt_hf.placement.assembly import make_packer

    kernel_availability()
    cfg = KTConfig(kt_backend=backend, kt_num_threads=threads, kt_lora_rank=8, kt_share_backward_weights=share)
    checkpoint = ExpertCheckpoint(folder, AutoConfig.from_pretrained(folder))
    shapes = checkpoint.shapes
    keep: list[Any] = []
    before, _ = memory()
    if what == "pack":
        packer = make_packer(cfg, shapes, torch.bfloat16)
        weights = [checkpoint.read(layer, torch.bfloat16) for layer in checkpoint.layers]
        start = time.perf_counter()
        for layer, one in zip(checkpoint.layers, weights, strict=True):
            keep.append(packer.build(one, shapes[layer], 8, layer))
    start = start if what == "pack" else time.perf_counter()
    if what == "read":
        for layer in checkpoint.layers:
            checkpoint.read(layer, torch.bfloat16)
    if what == "load":
        keep.append(load_kt_model(folder, cfg, dtype=torch.bfloat16))
    if what == "stock":
        keep.append(apply_kt_moe(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16), cfg))
    seconds = time.perf_counter() - start
    after, peak = memory()
    return {"seconds": seconds, "before": before, "after": after, "peak": peak}


def measure(what: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    out_of_cache(folder)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["OMP_NUM_THREADS"] = str(options.threads)
    command = [sys.executable, __file__, "--child", what, "--folder", str(folder), "--threads", str(options.threads)]
    command += ["--backend", options.backend]
    command += ["--own-backward"] if options.own_backward else []
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def report(folder: Path, options: argparse.Namespace) -> None:
    from benchmarks.harness import Timing, append, describe

    print(describe())
    layer = 3 * options.experts * options.hidden * options.intermediate * 2
    cases = ["read", "pack", "load", *(["stock"] if options.against else [])]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in cases}
    for _ in range(options.runs):
        for name in cases:
            runs[name].append(measure(name, folder, options))
            one = runs[name][-1]
            gib = {key: f"{one[key] / 2**30:.2f}" for key in ("before", "after", "peak")}
            print(f"{name}: {one['seconds']:.1f} s, GiB {gib}", flush=True)
    seconds = {name: sorted(r["seconds"] for r in found)[len(found) // 2] for name, found in runs.items()}
    apart = seconds["read"] + seconds["pack"]
    print(f"load {seconds['load']:.1f} s = {seconds['load'] / apart:.2f} × (read + pack = {apart:.1f} s)")
    for name in cases[2:]:
        over = max(r["peak"] - r["after"] for r in runs[name]) / layer
        resident = runs[name][0]["after"] / 2**30
        print(f"{name}: peak {over:.2f} layers of {layer / 2**20:.0f} MiB above the {resident:.2f} GiB that stay")
    if options.append:
        shape = f"{options.layers} x E={options.experts} H={options.hidden} I={options.intermediate} {options.source}"
        case = f"{options.backend}, {'own backward' if options.own_backward else 'shared backward'}"
        parts = {name: [r["seconds"] for r in found] for name, found in runs.items()}
        append("loading", shape, 0, options.threads, {case: Timing(parts)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=864)
    parser.add_argument("--source", choices=("bf16", "fp8"), default="bf16")
    parser.add_argument("--backend", default="auto", help="AMXInt8 takes --intermediate in multiples of 64")
    parser.add_argument("--threads", type=int, default=max(1, len(os.sched_getaffinity(0)) - 1))
    parser.add_argument("--own-backward", action="store_true", help="backward weights a layer, not one buffer for all")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--against", action="store_true", help="measure from_pretrained and apply_kt_moe as well")
    parser.add_argument("--append", action="store_true", help="add the times to results.csv")
    parser.add_argument("--folder", type=Path, help="keep the checkpoint here, or take the one that is here")
    parser.add_argument("--child", choices=("read", "pack", "load", "stock"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(
            json.dumps(child(options.child, options.folder, options.backend, options.threads, not options.own_backward))
        )
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "config.json").exists():
            make_checkpoint(
                folder, options.layers, options.experts, options.hidden, options.intermediate, options.source
            )
        report(folder, options)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
