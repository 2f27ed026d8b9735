"""Checkpoints of tiny models, as transformers saves them and changed by hand."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from tests.support.models import FAMILIES, Family, expert_modules

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


@dataclass(frozen=True)
class EightBit:
    """A way to quantise: the values' dtype, the scales' name and dtype, what the configuration says."""

    dtype: torch.dtype
    tail: str
    config: Callable[[tuple[int, int]], dict[str, Any]]
    rows: bool = False  # a scale a row
    scales: torch.dtype = torch.float32

    def block(self, asked: tuple[int, int]) -> tuple[int, int]:
        return (1, 1 << 40) if self.rows else asked


def _compressed(strategy: str, block: tuple[int, int] | None = None) -> dict[str, Any]:
    weights = {"num_bits": 8, "strategy": strategy, "symmetric": True, "block_structure": block and list(block)}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": {"num_bits": 8}}}
    return {"quant_method": "compressed-tensors", "format": "naive-quantized", "config_groups": groups}


FP8, INT8 = torch.float8_e4m3fn, torch.int8
EIGHT_BITS = {
    "fp8": EightBit(FP8, "_scale_inv", lambda b: {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(b)}),
    "int8": EightBit(INT8, "_scale_inv", lambda b: {"quant_method": "blockwise_int8", "weight_block_size": list(b)}),
    "int8 rows": EightBit(INT8, "_scale", lambda _: {"quant_method": "w8a8_int8"}, rows=True),
    "compressed fp8": EightBit(FP8, "_scale", lambda b: _compressed("block", b)),
    "compressed int8 rows": EightBit(INT8, "_scale", lambda _: _compressed("channel"), True, torch.bfloat16),
}


def to_8_bits(weight: Tensor, block: tuple[int, int], way: EightBit) -> tuple[Tensor, Tensor, Tensor]:
    """(values, scales, the fp32 matrix they stand for), block by block, the largest value of each at the limit."""
    rows, columns = weight.shape
    values = torch.empty(rows, columns, dtype=way.dtype)
    limit = 448 if way.dtype == FP8 else 127
    scales = torch.empty(-(-rows // block[0]), -(-columns // block[1]))
    exact = torch.empty(rows, columns)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            scales[i, j] = (weight[part].float().abs().max() / limit).to(way.scales).float()
            value = weight[part].float() / scales[i, j]
            values[part] = (value if way.dtype == FP8 else value.round().clamp(-127, 127)).to(way.dtype)
            exact[part] = values[part].float() * scales[i, j]
    return values, scales.to(way.scales), exact


def make_8_bits(folder: Path, block: tuple[int, int], kind: str = "fp8") -> dict[str, Tensor]:
    """Quantise a checkpoint's projections as the hub's are, and return what its weights then are, in fp32."""
    way = EIGHT_BITS[kind]
    content, exact = {}, {}
    for name, tensor in tensors(folder).items():
        exact[name] = tensor.float()
        content[name] = tensor
        if name.endswith(("_proj.weight", "_proj_with_mqa.weight", ".w1.weight", ".w2.weight", ".w3.weight")):
            content[name], content[name + way.tail], exact[name] = to_8_bits(tensor, way.block(block), way)
    write(folder, content)
    set_config(folder, quantization_config=way.config(block) | {"activation_scheme": "dynamic"})
    return exact


def both(folder: Path, block: tuple[int, int], kind: str) -> tuple[Path, Path]:
    """A checkpoint of 8 bits, and one of the same weights in bf16."""
    eight, plain = saved(FAMILIES["deepseek_v3"], folder / "eight"), saved(FAMILIES["deepseek_v3"], folder / "plain")
    exact = make_8_bits(eight, block, kind)
    write(plain, {name: tensor.bfloat16() for name, tensor in exact.items()})
    return eight, plain
