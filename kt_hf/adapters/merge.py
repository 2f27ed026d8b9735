"""merged: a base checkpoint with the adapter in its weights, W' = W + s·B·A, for whatever loads checkpoints.

Shard by shard and tensor by tensor: in memory are one weight of the base, in its dtype and in fp32, and LoRA of one
projection. Names, dtypes, shards and their order stay the base's, fused or one tensor an expert; the product and the
sum are fp32, rounded to the base's dtype once.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from ..errors import KTAMXConfigError, KTAMXError
from ..shapes import ALIASES
from ..system.files import Lazy, Part, open_safetensors, write_json, write_safetensors
from .adapter import PREFIX, Adapter, Projection, rank_alpha, scale

INDEX = "model.safetensors.index.json"
_NAMES = {**ALIASES, "gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"}
_EXPERT = re.compile(rf"(.*\.experts)\.(\d+)\.({'|'.join(_NAMES)})\.weight$")
_FUSED = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)(?:\.weight)?$")
_NOT_COPIED = re.compile(r".*\.(safetensors|bin|pt|pth|gguf|h5|msgpack|onnx)$|.*\.index\.json$")
_FLOATING = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class _Merger:
    """The change of each of the base's tensors, and which of the adapter's have been used."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.linear = adapter.modules()
        keys = {f"{module}.{name}" for module, found in self.linear.items() for name in found}
        # modules_to_save and the like: PEFT saves the whole weight.
        self.whole = {
            key.removeprefix(PREFIX): tensor
            for key, tensor in adapter.others.items()
            if key.removeprefix(PREFIX) not in keys
        }
        for module, found in self.linear.items():
            if set(found) != {"lora_A.weight", "lora_B.weight"}:
                raise KTAMXError(f"{adapter.where}: {module} has {', '.join(sorted(found))}, which cannot be merged.")
        self.left = {*adapter.experts, *self.linear, *self.whole}
        self.unused = {module: set(range(one.a.shape[0])) for module, one in adapter.experts.items()}
        self._kept: tuple[str, Tensor, Tensor] | None = None

    def change(self, name: str, tensor: Lazy) -> Callable[[Tensor], Tensor] | None:
        """What to do with one of the base's tensors, None to leave it as it is."""
        plain = name.replace("block_sparse_moe", "mlp")
        if match := _EXPERT.match(plain):
            one = self.adapter.experts.get(self._named(f"{match[1]}.{_NAMES[match[3]]}"))
            return None if one is None else self._expert(one, int(match[2]), name, tensor)
        if match := _FUSED.match(plain):
            parts = ("gate_proj", "up_proj") if match[2] == "gate_up_proj" else ("down_proj",)
            found = [self.adapter.experts.get(self._named(f"{match[1]}.{part}")) for part in parts]
            return self._stack(found, name, tensor) if any(found) else None
        module = self._named(name.removesuffix(".weight"))
        if name in self.whole:
            self.left.discard(name)
            whole = self.whole[name]
            self._fits(name, tensor, whole.shape)
            return lambda weight: whole.load().to(weight.dtype)
        return self._linear(module, name, tensor) if module in self.linear and name.endswith(".weight") else None

    def _named(self, name: str) -> str:
        """The adapter's name for a module of the base: a checkpoint may hold the model without its head."""
        for candidate in (name, f"model.{name}", name.removeprefix("model.")):
            if candidate in self.adapter.experts or candidate in self.linear:
                return candidate
        return name

    def _expert(self, one: Projection, expert: int, name: str, tensor: Lazy) -> Callable[[Tensor], Tensor]:
        if expert >= one.a.shape[0]:
            raise KTAMXError(f"The base has {name}, but {self.adapter.where} knows {one.a.shape[0]} experts.")
        self._fits(name, tensor, (one.b.shape[1], one.a.shape[2]))
        self.unused[one.module].discard(expert)
        if not self.unused[one.module]:
            self.left.discard(one.module)

        def merged(weight: Tensor) -> Tensor:
            a, b = self._load(one)
            return torch.addmm(weight.float(), b[expert].float(), a[expert].float(), alpha=one.scaling).to(weight.dtype)

        return merged

    def _stack(self, found: list[Projection | None], name: str, tensor: Lazy) -> Callable[[Tensor], Tensor]:
        known = [one for one in found if one is not None]
        rows = known[0].b.shape[1]
        self._fits(name, tensor, (known[0].a.shape[0], rows * len(found), known[0].a.shape[2]))
        self.left -= {one.module for one in known}

        def merged(weight: Tensor) -> Tensor:
            for index, one in enumerate(found):
                if one is None:
                    continue
                a, b = self._load(one)
                for expert in range(a.shape[0]):
                    part = weight[expert, index * rows : (index + 1) * rows]
                    part.copy_(torch.addmm(part.float(), b[expert].float(), a[expert].float(), alpha=one.scaling))
            return weight

        return merged

    def _linear(self, module: str, name: str, tensor: Lazy) -> Callable[[Tensor], Tensor]:
        a, b = self.linear[module]["lora_A.weight"], self.linear[module]["lora_B.weight"]
        self._fits(name, tensor, (b.shape[0], a.shape[1]))
        self.left.discard(module)
        factor = scale(self.adapter.config, *rank_alpha(self.adapter.config, module))

        def merged(weight: Tensor) -> Tensor:
            return torch.addmm(weight.float(), b.load().float(), a.load().float(), alpha=factor).to(weight.dtype)

        return merged

    def _fits(self, name: str, tensor: Lazy, shape: tuple[int, ...]) -> None:
        if tensor.shape != shape:
            raise KTAMXError(f"The base's {name} is {tensor.shape}, but {self.adapter.where} was made for {shape}.")
        if tensor.dtype not in _FLOATING:
            raise KTAMXConfigError(
                f"base: {name} is quantised ({tensor.dtype}); give the model in bfloat16, float16 or float32."
            )

    def _load(self, one: Projection) -> tuple[Tensor, Tensor]:
        """A and B of a projection, kept for its other experts."""
        if self._kept is None or self._kept[0] != one.module:
            self._kept = None
            self._kept = one.module, one.a.load(), one.b.load()
        return self._kept[1], self._kept[2]


def merge(adapter: Adapter, base: Path, output: Path) -> None:
    """Write base + adapter to a new folder, with everything else (config, tokenizer) copied.

    Args:
        adapter: Of any format.
        base: Folder of the base model, of safetensors files with or without an index.
        output: New folder.

    Raises:
        KTAMXError: LoRA for which the base has no weight, or one of another shape.
        KTAMXConfigError: base is no such folder, or its weights are quantised.
    """
    from .convert import new_folder

    if (base / INDEX).is_file():
        index = json.loads((base / INDEX).read_text())
        shards = sorted(set(index["weight_map"].values()))
    elif (base / "model.safetensors").is_file():
        index, shards = None, ["model.safetensors"]
    else:
        raise KTAMXConfigError(f"base={str(base)!r} has neither {INDEX} nor model.safetensors.")
    merger = _Merger(adapter)
    for shard in shards:  # before anything is written: does everything find its place?
        with open_safetensors(base / shard) as tensors:
            for name, tensor in tensors.items():
                merger.change(name, tensor)
    if merger.left:
        raise KTAMXError(
            f"base={str(base)!r} has no weights for {len(merger.left)} modules of {adapter.where}, "
            f"{sorted(merger.left)[0]} for one: another base model?"
        )
    with new_folder(output) as folder:
        for shard in shards:
            with open_safetensors(base / shard) as tensors:
                write_safetensors(folder / shard, [_merged(merger, name, tensor) for name, tensor in tensors.items()])
        for file in sorted(base.iterdir()):
            if file.is_file() and not _NOT_COPIED.match(file.name):
                shutil.copyfile(file, folder / file.name)
        if index is not None:
            write_json(folder / INDEX, index)


def _merged(merger: _Merger, name: str, tensor: Lazy) -> Part:
    change = merger.change(name, tensor)

    def make() -> Iterable[Tensor]:
        weight = tensor.load()
        return [weight if change is None else change(weight)]

    return Part({name: (tensor.dtype, tensor.shape)}, make)
