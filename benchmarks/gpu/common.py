"""What the commands share: the device, a description of the machine, rows of a CSV."""

from __future__ import annotations

import contextlib
import csv
import gc
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from harness import _commit, _cpu, _kernel, _version

from kt_hf.system import gpu


def prepare(name: str) -> torch.device:
    """The device to measure on; `cpu` takes the GPU's place, to try a script without one."""
    device = torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else torch.device("cpu")
    if device.type == "cpu":
        gpu.experts_device = lambda: device
    print(f"{machine(device)}\n{torch.get_num_threads()} threads of PyTorch's", flush=True)
    return device


def machine(device: torch.device) -> dict[str, Any]:
    """Date, machine and versions, as each row begins."""
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else "none"
    versions = {name: _version(name) for name in ("torch", "transformers", "peft")}
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    return {"date": date, "commit": "", "gpu": gpu, "cpu": _cpu(), **versions, "kt_kernel": _kernel()}


def write(path: Path, row: dict[str, Any]) -> None:
    """Append a row, under a header if the file is new."""
    with contextlib.suppress(OSError):
        row = row | {"commit": _commit()}
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()})


def free_memory(device: torch.device) -> None:
    """Give back what deleted models held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
