"""merged: a base checkpoint with the adapter in its weights, W' = W + s·B·A, for whatever loads checkpoints.

Shard by shard and tensor by tensor: in memory are one weight of the base, in its dtype and in fp32, and LoRA of one
projection. Names, dtypes, shards and their order stay the base's, fused or one tensor an expert; the product and the
sum are fp32, rounded to the base's dtype once. Input and output embeddings that were one tensor, and are two with the
adapter, become two (`embeddings`).
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.model_names import ModelTensor
from ..checkpoint.tensor_files import INDEX, SINGLE, read_index, stored_tensors
from ..errors import KTAMXConfigError, KTAMXError
from ..system.disk import check_space
from ..system.files import Lazy, Part, new_folder, write_json, write_safetensors
from ..system.json_fields import read_json
from .adapter import FLOATING, Adapter, Projection
from .base_names import BaseNames
from .embeddings import EmbeddingPlan, plan_embeddings
from .low_bit_base import Shards, widened
from .merged_module import merged_weight

_NOT_COPIED = re.compile(r".*\.(safetensors|bin|pt|pth|gguf|h5|msgpack|onnx)$|.*\.index\.json$")
# Initialisations of LoRA that leave the base model's weights as they are; the others change them when they begin.
_KEEPS_BASE = ("true", "false", "gaussian", "eva", "orthogonal")
_VARIANTS = ("use_dora", "lora_bias", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config",
             "kasa_config", "velora_config", "monteclora_config")  # fmt: skip
Change = Callable[[Tensor], Tensor]


class Merger:
    """The change of each of the base's tensors, and which of the adapter's have been used."""

    def __init__(self, adapter: Adapter, names: BaseNames, plan: EmbeddingPlan) -> None:
        self.adapter, self.names, self.plan = adapter, names, plan
        self.modules = adapter.other_modules()
        self.layers = adapter.layers()
        self.left = {*adapter.experts}
        for name, module in self.modules.items():
            if name in plan.modules:
                continue
            self.left |= {f"{name}.{parameter}" for parameter in module.whole} | ({name} if module.lora else set())
        self.unused = {module: set(range(one.a.shape[0])) for module, one in adapter.experts.items()}
        self._kept: tuple[str, Tensor, Tensor] | None = None

    def change(self, name: str, tensor: Lazy) -> Change | None:
        """What to do with one of the base's tensors, None to leave it as it is."""
        target = self.names.find(name, tensor.shape)
        if target.projections:
            experts = self._named(target.module, self.layers)
            loras = [self.adapter.experts.get(f"{experts}.{projection}") for projection in target.projections]
            if not any(loras):
                return None
            self._refuse_operations(target, name)
            if target.expert is None:
                return self._stack(loras, target, name, tensor)
            return self._expert(next(one for one in loras if one), target.expert, name, tensor)
        if target.pieces:
            return self._pieces(target, name, tensor)
        module = self._named(target.module, self.modules)
        if module not in self.modules or module in self.plan.modules:
            return None
        return self._other(module, target, name, tensor)

    def _named(self, name: str, known: Mapping[str, object]) -> str:
        """The adapter's name for a module of the base: a checkpoint may hold the model without its head."""
        return next((n for n in (name, f"model.{name}", name.removeprefix("model.")) if n in known), name)

    def _other(self, module: str, target: ModelTensor, name: str, tensor: Lazy) -> Change | None:
        """A module that is no expert and no embedding."""
        adapted, whole = self.modules[module], self.modules[module].whole.get(target.parameter)
        lora = adapted.lora if target.parameter == "weight" else {}
        if whole is None and not lora:
            return None
        self._refuse_operations(target, name)
        shape = whole.shape if whole else (lora["lora_B.weight"].shape[0], lora["lora_A.weight"].shape[1])
        self._fits(name, tensor, shape)
        self.left -= {module, f"{module}.{target.parameter}"}
        return lambda weight: merged_weight(self.adapter, adapted, target.parameter, weight)

    def _pieces(self, target: ModelTensor, name: str, tensor: Lazy) -> Change | None:
        """Modules whose weights are rows of one tensor."""
        changes: list[tuple[slice, Change]] = []
        begin = 0
        for module, rows in target.pieces:
            place, begin = slice(begin, begin + rows), begin + rows
            module = self._named(module, self.modules)
            piece = Lazy(tensor.dtype, (rows, *tensor.shape[1:]), tensor.load)
            if module not in self.modules:
                continue
            change = self._other(module, ModelTensor(module, target.parameter), name, piece)
            if change is not None:
                changes.append((place, change))
        if not changes:
            return None
        if begin != tensor.shape[0]:
            raise KTAMXError(f"The base's {name} is {tensor.shape}, by its config.json it has {begin} rows.")

        def merged(weight: Tensor) -> Tensor:
            for place, change in changes:
                weight[place] = change(weight[place])
            return weight

        return merged

    def _expert(self, one: Projection, expert: int, name: str, tensor: Lazy) -> Change:
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

    def _stack(self, loras: list[Projection | None], target: ModelTensor, name: str, tensor: Lazy) -> Change:
        known = [one for one in loras if one is not None]
        rows, parts = known[0].b.shape[1], len(loras)
        shape = (known[0].a.shape[0], rows * parts, known[0].a.shape[2])
        turned, flipped = target.transposed, (shape[0], shape[2], shape[1])
        stored = flipped if turned else shape
        self._fits(name, tensor, (stored[0] * stored[1], stored[2]) if target.flat else stored)
        self.left -= {one.module for one in known}

        def merged(weight: Tensor) -> Tensor:
            matrices = weight.view(stored)
            matrices = matrices.transpose(1, 2) if turned else matrices
            for index, one in enumerate(loras):
                if one is None:
                    continue
                a, b = self._load(one)
                place = slice(index, None, parts) if target.interleaved else slice(index * rows, (index + 1) * rows)
                for expert in range(a.shape[0]):
                    part = matrices[expert, place]
                    part.copy_(torch.addmm(part.float(), b[expert].float(), a[expert].float(), alpha=one.scaling))
            return weight

        return merged

    def _refuse_operations(self, target: ModelTensor, name: str) -> None:
        if target.operations:
            raise KTAMXError(
                f"The base's {name} becomes {target.module} by {target.operations} when transformers loads it, through "
                "which an adapter cannot be merged. Load the base with transformers, save_pretrained it with "
                "save_original_format=False, and merge into that."
            )

    def _fits(self, name: str, tensor: Lazy, shape: tuple[int, ...]) -> None:
        if tensor.shape != shape:
            raise KTAMXError(f"The base's {name} is {tensor.shape}, but {self.adapter.where} was made for {shape}.")
        refuse_quantized(name, tensor)

    def _load(self, one: Projection) -> tuple[Tensor, Tensor]:
        """A and B of a projection, kept for its other experts."""
        if self._kept is None or self._kept[0] != one.module:
            self._kept = None
            self._kept = one.module, one.a.load(), one.b.load()
        return self._kept[1], self._kept[2]

    def refuse_shared(self) -> None:
        """Refuse LoRA of modules with the weights of others: merged it would be in both, or two in one."""
        for module in (*self.layers, *self.modules):
            other = self.names.sharing.get(module)
            if other and module not in self.plan.modules:
                raise KTAMXError(
                    f"{module} has the weights of {other}, and LoRA of its own: merged into those it would be in both. "
                    "Load the adapter beside its base instead (load_adapter)."
                )

    def check_all_used(self, base: Path) -> None:
        """Refuse to leave out a part of the adapter, with the reason."""
        if not self.left:
            return
        first = sorted(self.left)[0]
        whole = sorted(name for name in self.left if name.rpartition(".")[0] in self.modules)
        why = "another base model?"
        if whole == sorted(self.left):
            why = (
                "they are trained as a whole, and of another model class than the base's: save the model itself."
                if not any(".layers." in name for name in whole)
                else "the base model has no such parameter: another base model?"
            )
        raise KTAMXError(
            f"base={str(base)!r} has no weights for {len(self.left)} modules of {self.adapter.where}, {first} for one: "
            f"{why}"
        )


def refuse_quantized(name: str, tensor: Lazy) -> None:
    """Raise KTAMXConfigError for a weight of the base that nothing can be added to."""
    if tensor.dtype not in FLOATING:
        raise KTAMXConfigError(
            f"base: {name} is quantised ({tensor.dtype}); give the model in bfloat16, float16 or float32."
        )


def _refuse_variants(adapter: Adapter) -> None:
    """What is no W + s·B·A."""
    for name in _VARIANTS:
        if adapter.config.get(name):
            raise KTAMXError(
                f"{adapter.where}: {name}={adapter.config[name]!r} is no sum of the base's weights and LoRA: it "
                "cannot be merged."
            )
    init = adapter.config.get("init_lora_weights", True)
    if str(init).lower() not in _KEEPS_BASE:
        raise KTAMXError(
            f"{adapter.where}: init_lora_weights={init!r} has changed the base model's own weights, which the adapter "
            "does not hold: it cannot be merged into the base checkpoint."
        )
    for name, module in adapter.other_modules().items():
        if set(module.lora) not in (
            set(),
            {"lora_A.weight", "lora_B.weight"},
            {"lora_embedding_A", "lora_embedding_B"},
        ):
            raise KTAMXError(f"{adapter.where}: {name} has {', '.join(sorted(module.lora))}, which cannot be merged.")
        if any(len(tensor.shape) != 2 for tensor in module.lora.values()):
            raise KTAMXError(f"{adapter.where}: {name} is no linear layer and no embedding, and cannot be merged.")


def merge(adapter: Adapter, base: Path, output: Path) -> None:
    """Write base + adapter to a new folder, with everything else (config, tokenizer) copied.

    A base of low bits is widened, and the merged checkpoint is in bf16, which is logged.

    Args:
        adapter: Of any format.
        base: Folder of the base model, of safetensors files with or without an index.
        output: New folder.

    Raises:
        KTAMXError: LoRA for which the base has no weight, one that other modules share, or one of another shape; a
            part of the adapter that is no change of a weight; a full disk.
        KTAMXConfigError: base is no such folder, or its weights are quantised.
    """
    shards = list(dict.fromkeys(read_index(base).values())) or [SINGLE]
    _refuse_variants(adapter)
    names = BaseNames(base)
    tensors: Shards = {shard: stored_tensors(base / shard) for shard in sorted(shards)}
    wide = widened(base, tensors)
    tensors = wide or tensors
    plan = plan_embeddings(adapter, names, tensors, base)
    merger = Merger(adapter, names, plan)
    merger.refuse_shared()
    for shard_tensors in tensors.values():  # before anything is written: does everything find its place?
        for name, tensor in shard_tensors.items():
            merger.change(name, tensor)
    merger.check_all_used(base)
    copied = [file for file in sorted(base.iterdir()) if file.is_file() and not _NOT_COPIED.match(file.name)]
    size = sum(tensor.size for content in tensors.values() for tensor in content.values())
    check_space(output, size + sum(file.stat().st_size for file in copied) + plan.more_bytes)
    with new_folder(output) as folder:
        for shard, shard_tensors in tensors.items():
            parts = [plan.parts.get(name) or _merged(merger, name, tensor) for name, tensor in shard_tensors.items()]
            write_safetensors(folder / shard, [*parts, *plan.added.get(shard, [])])
        for file in copied:
            shutil.copyfile(file, folder / file.name)
        if (base / INDEX).is_file():
            write_json(folder / INDEX, _index(base, plan, wide, size))
        if wide:
            config = dict(read_json(base / "config.json").object().values())
            write_json(folder / "config.json", {k: v for k, v in config.items() if k != "quantization_config"})
        plan.write_config(folder)


def _index(base: Path, plan: EmbeddingPlan, wide: Shards | None, size: int) -> dict[str, Any]:
    """The base's index, with the names of `wide` if it was of low bits, and in it what is added."""
    index = dict(read_json(base / INDEX).object().values())
    if wide:
        index["weight_map"] = {name: shard for shard, content in wide.items() for name in content}
        index["metadata"] = {"total_size": size}
    added = {name: shard for shard, parts in plan.added.items() for part in parts for name in part.specs}
    if added or plan.more_bytes:
        index["weight_map"] = {**index["weight_map"], **added}
        metadata = index.get("metadata")
        if isinstance(metadata, dict) and isinstance(metadata.get("total_size"), int):
            index["metadata"] = {**metadata, "total_size": metadata["total_size"] + plan.more_bytes}
    return index


def _merged(merger: Merger, name: str, tensor: Lazy) -> Part:
    change = merger.change(name, tensor)

    def make() -> Iterable[Tensor]:
        weight = tensor.load()
        return [weight if change is None else change(weight)]

    return Part({name: (tensor.dtype, tensor.shape)}, make)
