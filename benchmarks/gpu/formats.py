"""Part `formats`: memory of experts in each low-bit format, streamed and resident, beside what is foretold.

Layers are drawn in the format and train some steps. Beside the tensors' peak on the GPU stands what `kt-hf estimate`
says of a checkpoint whose configuration names that format.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from card import GB, Card, Rows
from estimated import WITHIN, foretold
from full import FAMILY
from low_bit import drawn_model, host_gb, timed
from models import experts_of, make_config
from routing import Spread
from sft import RANK

from kt_hf import KTConfig
from kt_hf.checkpoint.quantization import quantization_of

STEPS = 3


def _group(bits: int, kind: str, strategy: str, size: int | None, symmetric: bool = True) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": kind, "strategy": strategy, "group_size": size, "symmetric": symmetric}
    layout = "pack-quantized" if bits == 4 else "int-quantized"
    return {
        "quant_method": "compressed-tensors", "format": layout,
        "config_groups": {"group_0": {"weights": weights, "targets": ["Linear"]}},
    }  # fmt: skip


STORED = {
    "int4": _group(4, "int", "group", 32),
    "int4 zeros": _group(4, "int", "group", 32, symmetric=False),
    "mxfp4": {"quant_method": "mxfp4"},
    "nvfp4": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "int8": {"quant_method": "blockwise_int8", "weight_block_size": [128, 128]},
}


def run(given: argparse.Namespace, card: Card, rows: Rows) -> None:
    card.limit((given.caps or [24.0])[0])
    outside = count = 0
    for kind, stored in STORED.items():
        for where in ("streamed", "resident"):
            config = make_config(FAMILY, given.shape, given.layers)
            placement = {"streamed": experts_of(config)} if where == "streamed" else {"resident_layers": given.layers}
            settings = KTConfig(kt_lora_rank=RANK, kt_expert_placement=placement, kt_moe_lora_device="gpu")
            config.quantization_config = stored
            bits = quantization_of(config).bits
            del config.quantization_config
            batch = (given.batch or [1])[0]
            card.clear()
            model = drawn_model(config, card, settings, batch * given.sequence, kind=kind, bits=bits)
            spread, host = Spread(model), host_gb(model)
            found, model = timed(card, model, batch, given, warm=1, steps=STEPS, rank=RANK)
            del model
            row = {"case": where, "kind": kind, "bits": bits, "layers": given.layers, "batch": batch}
            row |= {"cap_gb": card.cap, "host_gb": host, **found}
            config.quantization_config = stored
            with tempfile.TemporaryDirectory() as folder:
                config.save_pretrained(folder)
                memory = foretold(config, given, row, Path(folder), True)
            gpu = (memory.gpu_total - memory.gpu.get("CUDA", 0)) / GB
            ratio = gpu / found["allocated_gb"] if found["allocated_gb"] else None
            count, outside = count + 1, outside + bool(ratio and abs(ratio - 1) > WITHIN)
            rows.add(**row, estimated_gb=gpu, gpu_ratio=ratio, touched=spread.describe())
    rows.add(case="verdict", rows=count, outside=outside, within=WITHIN)
