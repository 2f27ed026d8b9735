"""A checkpoint's routed experts in int4, in the layout of compressed-tensors; everything else is copied as it is.

Shard by shard and tensor by tensor, so that memory holds one weight: `NAME.weight` becomes `NAME.weight_packed` (int32,
eight weights each), `weight_scale` (bf16, one for 32 of a row) and `weight_shape`, as vLLM, SGLang and ktransformers
read them. Fused experts become one tensor an expert and projection.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backends.quantizer import GROUP, quantized
from ..checkpoint.tensor_files import INDEX, SINGLE, read_index, stored_tensors
from ..discovery import FLOATING
from ..errors import KTAMXConfigError
from ..system.disk import check_space
from ..system.files import Lazy, Part, new_folder, part, write_json, write_safetensors
from ..system.json_fields import read_json

_ONE = re.compile(r"(.*\bexperts\.\d+\.(?:gate_proj|up_proj|down_proj|w1|w2|w3))\.weight$")
_FUSED = re.compile(r"(.*\bexperts)\.(gate_up_proj|down_proj)(?:\.weight)?$")
_SHARED = re.compile(r"shared_experts?\.")
_NOT_COPIED = re.compile(r".*\.(safetensors|bin|pt|pth|gguf|h5|msgpack|onnx)$|.*\.index\.json$")
_BITS = 4.5 / 8  # bytes of a weight


def quantize_to_int4(
    base: Path, out: Path, device: torch.device | None = None, on_shard: Callable[[int], None] = lambda bytes_read: None
) -> None:
    """Write a checkpoint with its routed experts in int4 to a new folder, which is there whole or not at all.

    Args:
        base: Folder of the model: safetensors files with or without an index, in a floating dtype.
        out: A folder that does not exist, or is empty.
        device: Where it is computed; None for the CPU.
        on_shard: Called after each file with the bytes of it in the checkpoint.

    Raises:
        KTAMXConfigError: No such checkpoint, one without routed experts or quantized already, rows that are no
            multiple of a group, or `out` is in use.
        KTAMXError: A file is damaged, or the disk has not enough space.
    """
    base, out = Path(base), Path(out).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise KTAMXConfigError(f"{out} is in use already: give a new folder.")
    shards = sorted(dict.fromkeys(read_index(base).values()) or [SINGLE])
    tensors = {shard: stored_tensors(base / shard) for shard in shards}
    everything = {name: tensor for content in tensors.values() for name, tensor in content.items()}
    routed = {name: tensor for name, tensor in everything.items() if _is_routed(name)}
    _check(base, routed)
    copied = [file for file in sorted(base.iterdir()) if file.is_file() and not _NOT_COPIED.match(file.name)]
    rest = sum(tensor.size for name, tensor in everything.items() if name not in routed)
    check_space(out, int(rest + _BITS * sum(t.size // t.dtype.itemsize for t in routed.values())))
    with new_folder(out) as folder:
        weight_map, total = dict[str, str](), 0
        for shard, content in tensors.items():
            parts = [one for name, tensor in content.items() for one in _parts(name, tensor, device)]
            write_safetensors(folder / shard, parts)
            for one in parts:
                weight_map |= dict.fromkeys(one.specs, shard)
                total += sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in one.specs.values())
            on_shard(sum(tensor.size for tensor in content.values()))
        for file in copied:
            shutil.copyfile(file, folder / file.name)
        config = dict(read_json(base / "config.json").object().values())
        left = [name.removesuffix(".weight") for name, t in everything.items() if _is_linear(name, t, routed)]
        write_json(folder / "config.json", config | {"quantization_config": _description(left)})
        if len(shards) > 1 or (base / INDEX).is_file():
            write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _is_routed(name: str) -> bool:
    return not _SHARED.search(name) and bool(_ONE.match(name) or _FUSED.match(name))


def _is_linear(name: str, tensor: Lazy, routed: dict[str, Lazy]) -> bool:
    return name not in routed and name.endswith(".weight") and len(tensor.shape) == 2 and "embed" not in name


def _check(base: Path, routed: dict[str, Lazy]) -> None:
    if (base / "config.json").is_file():
        config = read_json(base / "config.json").object()
        if config.get("quantization_config") is not None:
            raise KTAMXConfigError(f"{base}: config.json has a quantization_config: it is quantized already.")
    if not routed:
        raise KTAMXConfigError(
            f"{base} has no tensors like experts.0.gate_proj.weight or experts.gate_up_proj: no routed experts to "
            "quantize, or quantized already."
        )
    for name, tensor in routed.items():
        if tensor.dtype not in FLOATING:
            raise KTAMXConfigError(f"{base}: {name} is quantized already ({tensor.dtype}).")
        if tensor.shape[-1] % GROUP:
            raise KTAMXConfigError(
                f"{base}: {name} has rows of {tensor.shape[-1]} weights, no multiple of the {GROUP} that share a scale."
            )


def _parts(name: str, tensor: Lazy, device: torch.device | None) -> Iterator[Part]:
    """What is written in the place of one tensor."""
    if not _is_routed(name):
        yield part(name, tensor)
    elif match := _ONE.match(name):
        yield _quantized_part([match[1]], tensor, device)
    elif match := _FUSED.match(name):
        experts = range(tensor.shape[0])
        if match[2] == "down_proj":
            names = [f"{match[1]}.{e}.down_proj" for e in experts]
            yield _quantized_part(names, tensor, device)
        else:
            names = [f"{match[1]}.{e}.{half}_proj" for e in experts for half in ("gate", "up")]
            yield _quantized_part(names, tensor, device)


def _quantized_part(names: list[str], tensor: Lazy, device: torch.device | None) -> Part:
    """The tensors of matrices that lie one above the other in one tensor, all of one size."""
    rows = tensor.shape[-2] * (tensor.shape[0] if len(tensor.shape) == 3 else 1) // len(names)
    columns = tensor.shape[-1]
    specs: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name in names:
        specs[f"{name}.weight_packed"] = torch.int32, (rows, columns // 8)
        specs[f"{name}.weight_scale"] = torch.bfloat16, (rows, columns // GROUP)
        specs[f"{name}.weight_shape"] = torch.int64, (2,)

    def make() -> Iterable[Tensor]:
        matrices = quantized(tensor.load().reshape(len(names), rows, columns), "int4", device)
        for codes, scales in zip(matrices.codes, matrices.scales, strict=True):
            yield codes.view(torch.int32)
            yield scales
            yield torch.tensor([rows, columns])

    return Part(specs, make)


def _description(ignored: list[str]) -> dict[str, Any]:
    """The `quantization_config` of such a checkpoint; `ignored` are linear modules that are not quantized."""
    weights = {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP, "dynamic": False,
        "observer": "minmax", "actorder": None, "block_structure": None,
    }  # fmt: skip
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": sorted(ignored), "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }  # fmt: skip
