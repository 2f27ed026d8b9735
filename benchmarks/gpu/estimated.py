"""Part `estimate`: the memory that `kt-hf estimate` foretells against what parts `cells`, `full`
and `low-bit` measured.

Needs no GPU, but their results in --out. Compared are the tensors' peak on the GPU (the estimate's without CUDA's own
part, which PyTorch does not count), and the host's of `full`, where no other model was before.
"""

from __future__ import annotations

import argparse
from typing import Any

from card import GB, Card, Rows, read_rows
from models import experts_of, make_config
from sft import RANK

from kt_hf.train.config.read import check_settings
from kt_hf.train.config.yaml_file import Setting
from kt_hf.train.memory import estimate
from kt_hf.train.model_sizes import model_sizes

WITHIN = 0.1


def foretold(config: Any, given: argparse.Namespace, row: dict[str, Any], folder: Any, operators: bool) -> Any:
    """The estimate of a row, as of a configuration file of its settings.

    Args:
        config: The model's.
        given: Of the command line.
        row: Of a part's results.
        folder: Where the model's configuration is.
        operators: Whether kt-kernel's operators were there.
    """
    values: dict[str, Any] = {
        "model_name_or_path": str(folder), "lora_rank": RANK, "lora_target": "all", "torch_dtype": "bfloat16",
        "per_device_train_batch_size": row["batch"], "cutoff_len": given.sequence, "output_dir": str(folder / "out"),
        "dataset": "builtin:pydoc", "max_steps": 1,
    }  # fmt: skip
    if "dtype" in row or "kind" in row:  # of parts low-bit and formats
        where = {"streamed": experts_of(config)} if row["case"] == "streamed" else {"resident_layers": row["layers"]}
        values |= {"kt_expert_placement": where, "kt_moe_lora_device": "gpu"}
        values |= {"kt_expert_dtype": row["dtype"]} if "dtype" in row else {}
    elif row.get("held") is not None and row["case"] != "auto":
        held = row["held"]
        values["kt_expert_placement"] = {"resident_layers": held} if held else {"streamed": experts_of(config)}
    settings = check_settings({k: Setting(v, "benchmark") for k, v in values.items()}, [], "benchmark", "estimate")
    free = int(row["cap_gb"] * GB)
    return estimate(settings, model_sizes(config, settings.run), operators, True, 128 * GB, free)


def run(given: argparse.Namespace, card: Card, rows: Rows) -> None:
    found = [("cells", row) for row in read_rows(given.out, "cells")]
    found += [("full", row) for row in read_rows(given.out, "full") if row["case"] != "stock"]
    found += [("low-bit", row) for row in read_rows(given.out, "low-bit") if row["case"] in ("streamed", "resident")]
    outside = 0
    for part, row in found:
        if not row.get("step"):
            continue
        family = row.get("family", "qwen3_30b")
        config = make_config(family, given.shape, row["layers"])
        folder = given.checkpoint / f"{family}-{given.shape}-{row['layers']}-config"
        config.save_pretrained(folder)
        memory = foretold(config, given, row, folder, row.get("kt_kernel") != "none")
        gpu = (memory.gpu_total - memory.gpu.get("CUDA", 0)) / GB
        measured = row["allocated_gb"]
        ratio = gpu / measured if measured else None
        host = memory.host_total / GB / row["host_gb"] if part == "full" else None
        outside += any(r is not None and abs(r - 1) > WITHIN for r in (ratio, host))
        rows.add(
            source=part, cell=row.get("cell", ""), case=row["case"], batch=row["batch"], held=row["held"],
            estimated_gb=gpu, allocated_gb=measured, gpu_ratio=ratio, host_ratio=host,
            host_estimated_gb=memory.host_total / GB, host_gb=row["host_gb"], dtype=row.get("dtype"),
        )  # fmt: skip
    rows.add(case="verdict", rows=len(found), outside=outside, within=WITHIN)
