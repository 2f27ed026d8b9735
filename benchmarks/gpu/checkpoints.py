"""A checkpoint of random weights in bf16, a file a layer, one tensor an expert: as models of the hub are saved.

All layers have the same experts' values, drawn once: time is for writing alone.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM


@torch.no_grad()
def make_checkpoint(config: Any, folder: Path, device: torch.device) -> None:
    """Write it, unless the folder has it already."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    torch.manual_seed(0)
    rest: dict[str, Tensor] = {}
    experts: dict[str, tuple[int, ...]] = {}
    for name, t in model.state_dict().items():
        if name.endswith(".experts.down_proj"):
            experts[name.removesuffix(".down_proj")] = tuple(t.shape)
        elif ".experts." not in name:
            made = torch.empty(t.shape, dtype=torch.bfloat16, device=device)
            rest[name] = (made.fill_(1) if "norm" in name else made.normal_(std=0.02)).cpu()
    save_file(rest, folder / "rest.safetensors", {"format": "pt"})
    weight_map = dict.fromkeys(rest, "rest.safetensors")
    E, H, I = next(iter(experts.values()))  # noqa: E741
    values = torch.empty(3 * E * I * H, dtype=torch.bfloat16, device=device).normal_(std=0.02).cpu()
    for number, layer in enumerate(experts):
        file = f"layer-{number}.safetensors"
        weight_map |= dict.fromkeys(_write_layer(folder / file, layer, E, H, I, values), file)
    saved = copy.deepcopy(config)
    saved.architectures, saved.dtype = [type(model).__name__], torch.bfloat16
    saved.save_pretrained(folder)
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _write_layer(path: Path, layer: str, E: int, H: int, I: int, values: Tensor) -> list[str]:  # noqa: E741
    """A safetensors file by hand, for save_file would want each expert in memory of its own."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    size = 2 * I * H
    for e in range(E):
        for i, (name, shape) in enumerate((("gate", [I, H]), ("up", [I, H]), ("down", [H, I]))):
            at = (3 * e + i) * size
            header[f"{layer}.{e}.{name}_proj.weight"] = {
                "dtype": "BF16", "shape": shape, "data_offsets": [at, at + size],
            }  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.write(memoryview(values.view(torch.uint8).numpy()))
    return [name for name in header if name != "__metadata__"]
