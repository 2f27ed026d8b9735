"""Checkpoints of tiny models, as transformers saves them and changed by hand."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from tests.models import Family, expert_modules

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def saved(family: Family, folder: Path, dtype: torch.dtype = torch.bfloat16, sharded: bool = False) -> Path:
    """The family's tiny model in its hub layout: one tensor an expert."""
    family(dtype).save_pretrained(folder, max_shard_size="60KB" if sharded else "1GB")
    assert (folder / (INDEX if sharded else SINGLE)).exists()
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def write(folder: Path, content: Mapping[str, Tensor]) -> None:
    """Replace the checkpoint by one file of these tensors."""
    for file in [*folder.glob("*.safetensors"), *folder.glob(INDEX)]:
        file.unlink()
    save_file({name: tensor.contiguous() for name, tensor in content.items()}, folder / SINGLE, {"format": "pt"})


def edit(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    content = tensors(folder)
    change(content)
    write(folder, content)


def fuse(folder: Path, model: PreTrainedModel) -> None:
    """Put transformers' fused experts in the place of one tensor an expert."""
    content = {name: tensor for name, tensor in tensors(folder).items() if ".experts." not in name}
    for index, experts in expert_modules(model).items():
        for name in ("gate_up_proj", "down_proj"):
            content[f"model.layers.{index}.mlp.experts.{name}"] = getattr(experts, name).detach()
    write(folder, content)


def set_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def read_index(folder: Path) -> dict[str, str]:
    return json.loads((folder / INDEX).read_text())["weight_map"]


def write_index(folder: Path, weight_map: Mapping[str, str]) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict(weight_map)}))


def header(file: Path) -> dict[str, Any]:
    data = file.read_bytes()
    return json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])


def set_header(file: Path, content: Mapping[str, Any] | str) -> None:
    """Put another header before a file's data."""
    data = file.read_bytes()
    text = (content if isinstance(content, str) else json.dumps(content)).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + struct.unpack("<Q", data[:8])[0] :])


def to_fp8(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """(FP8 values, scales, the fp32 matrix they stand for), block by block, the largest value of each at 448."""
    rows, columns = weight.shape
    values = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-rows // block[0]), -(-columns // block[1]))
    exact = torch.empty(rows, columns)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            scales[i, j] = weight[part].float().abs().max() / 448
            values[part] = (weight[part].float() / scales[i, j]).to(torch.float8_e4m3fn)
            exact[part] = values[part].float() * scales[i, j]
    return values, scales, exact


def make_fp8(folder: Path, block: tuple[int, int]) -> dict[str, Tensor]:
    """Turn a DeepSeek-V3 checkpoint into the hub's block-wise FP8, and return what its weights then are, in fp32."""
    content, exact = {}, {}
    for name, tensor in tensors(folder).items():
        exact[name] = tensor.float()
        content[name] = tensor
        if name.endswith(("_proj.weight", "_proj_with_mqa.weight")):
            content[name], content[f"{name}_scale_inv"], exact[name] = to_fp8(tensor, block)
    write(folder, content)
    quantised = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(block)}
    set_config(folder, quantization_config=quantised)
    return exact
