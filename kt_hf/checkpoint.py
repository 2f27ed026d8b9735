"""`ExpertCheckpoint`: the routed experts of a safetensors checkpoint, checked from the headers and read layer by layer.

Three layouts are known, told by the tensors' names, whatever the family: one tensor an expert and projection
(`experts.7.gate_proj.weight`), Mixtral's names for the same (`experts.7.w1.weight`), and transformers' fused ones
(`experts.gate_up_proj`). Each in bf16, fp16, fp32 or block-wise FP8.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .backends import ExpertShape, ExpertWeights
from .errors import KTAMXConfigError, KTAMXError, KTAMXModelNotSupportedError
from .find import find_experts, skeleton
from .fp8 import FLOATING, FP8, SCALE, block_size, check_scales, dequantise
from .tensor_files import INDEX, SINGLE, StoredTensor, TensorFiles, read_tensors

_PROJECTIONS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_ONE_EXPERT = re.compile(rf"(.*\bexperts)\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.(weight(?:{SCALE})?)$")
_FUSED = re.compile(rf"(.*\bexperts)\.(gate_up_proj|down_proj)(?:\.weight)?({SCALE})?$")
_OTHER = re.compile(r"(.*\bexperts)\.(.*)$")
# A checkpoint may hold the model without its head, or call the block that has the experts as its authors did.
_ROOT = re.compile(r"^(?:(?:model|language_model|text_model|transformer)\.)*")
_BLOCK = re.compile(r"\.(?:mlp|block_sparse_moe|feed_forward|ffn|moe|mixer)\.experts$")
_STAGING = 64 * 2**20  # bytes read at a time where they are not the bytes wanted


@dataclass(frozen=True)
class _Matrix:
    """One expert's projection in the checkpoint: [out, in], and the FP8 scales, if it is of FP8."""

    weight: StoredTensor
    scales: StoredTensor | None


class ExpertCheckpoint:
    """The routed experts of a checkpoint; nothing is read before `read`.

    Args:
        folder: Of the checkpoint; `checkpoint_folder` finds that of a hub's model.
        config: The model's configuration.
        trust_remote_code: As transformers has it.

    Attributes:
        layers: Full names of the experts modules, in the order of the model's layers (`model.layers.3.mlp.experts`).
        shapes: Layer -> its sizes.
        model_class: The class transformers loads it by.
        expert_classes: The classes of its experts modules.
        files: The checkpoint's tensors.
        block: Rows and columns of an FP8 block.

    Raises:
        KTAMXModelNotSupportedError: A model without experts that can be computed, or saved in an unknown layout.
        KTAMXConfigError: The folder has no safetensors checkpoint, or it is quantised in another way than FP8.
        KTAMXError: A file or a tensor is missing, doubled, truncated or of another shape, naming file and tensor.
    """

    def __init__(self, folder: str | Path, config: Any, trust_remote_code: bool = False) -> None:
        model = skeleton(config, trust_remote_code)
        places = find_experts(model, weightless=True)
        self.model_class = type(model)
        self.expert_classes = {type(place.experts) for place in places}
        self.layers = [place.name for place in places]
        self.shapes = {place.name: place.shape for place in places}
        self.block = block_size(config)
        _refuse_transposed(model)
        self.files = TensorFiles(Path(folder))
        self._matrices = self._find()

    def read(self, layer: str, dtype: torch.dtype) -> ExpertWeights:
        """A layer's weights, stacked and fused, in memory of their own on the CPU.

        Args:
            layer: One of `layers`.
            dtype: bfloat16, float16 or float32; what the checkpoint has is rounded to it once.

        Returns:
            gate_up [E, 2I, H] and down [E, H, I].

        Raises:
            KTAMXError: A file has changed since it was checked.
        """
        if dtype not in FLOATING:
            raise KTAMXConfigError(f"dtype={dtype} is none that experts can have: give bfloat16, float16 or float32.")
        shape = self.shapes[layer]
        E, H, I = shape.num_experts, shape.hidden_size, shape.intermediate_size  # noqa: E741
        gate_up = torch.empty(E, 2 * I, H, dtype=dtype, device="cpu")
        down = torch.empty(E, H, I, dtype=dtype, device="cpu")
        targets = {"gate_proj": gate_up[:, :I], "up_proj": gate_up[:, I:], "gate_up_proj": gate_up, "down_proj": down}
        jobs = [(one, targets[name][e]) for (e, name), one in self._matrices[layer].items()]
        read_tensors([(one.weight, target) for one, target in jobs if one.weight.dtype == dtype])
        for batch in _batches([job for job in jobs if job[0].weight.dtype != dtype]):
            self._convert(batch)
        return ExpertWeights(gate_up, down)

    def source_bytes(self, layer: str) -> int:
        """Bytes of a layer's experts in the files."""
        return sum(one.weight.size + (one.scales.size if one.scales else 0) for one in self._matrices[layer].values())

    def source_dtypes(self) -> set[torch.dtype]:
        """Of all layers' experts."""
        return {one.weight.dtype for matrices in self._matrices.values() for one in matrices.values()}

    def _convert(self, jobs: list[tuple[_Matrix, Tensor]]) -> None:
        """Read matrices of another dtype than their targets'."""
        stored = [tensor for one, _ in jobs for tensor in (one.weight, one.scales) if tensor is not None]
        memory = {tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu") for tensor in stored}
        read_tensors(list(memory.items()))
        for one, target in jobs:
            if one.scales is None:
                target.copy_(memory[one.weight])
            else:
                dequantise(memory[one.weight], memory[one.scales], self.block, target)

    def _find(self) -> dict[str, dict[tuple[int, str], _Matrix]]:
        """Layer -> (expert, projection) -> where it is; gate and up may be one, `gate_up_proj`."""
        layers = {_plain(name): name for name in self.layers}
        found: dict[str, dict[tuple[int, str], StoredTensor]] = {name: {} for name in self.layers}
        scales: dict[str, dict[tuple[int, str], StoredTensor]] = {name: {} for name in self.layers}
        strange: dict[str, StoredTensor] = {}
        for name, tensor in self.files.tensors.items():
            match = _ONE_EXPERT.match(name) or _FUSED.match(name) or _OTHER.match(name)
            layer = layers.get(_plain(match[1])) if match else None
            if match is None or layer is None:
                continue  # not an expert's, or of a layer the model does not have (multi-token prediction)
            if match.re is _OTHER:
                strange.setdefault(layer, tensor)
                continue
            into = (scales if name.endswith(SCALE) else found)[layer]
            shape = self.shapes[layer]
            for key, part in _parts(match, tensor, shape):
                if key in into:
                    raise KTAMXError(f"{tensor} and {into[key]} are the same weight of expert {key[0]} of {layer}.")
                into[key] = part
        return {name: self._checked(name, found[name], scales[name], strange.get(name)) for name in self.layers}

    def _checked(
        self,
        layer: str,
        found: dict[tuple[int, str], StoredTensor],
        scales: dict[tuple[int, str], StoredTensor],
        strange: StoredTensor | None,
    ) -> dict[tuple[int, str], _Matrix]:
        """A layer's matrices, all there and of the right size."""
        shape = self.shapes[layer]
        H, I = shape.hidden_size, shape.intermediate_size  # noqa: E741
        sizes = {"gate_proj": (I, H), "up_proj": (I, H), "gate_up_proj": (2 * I, H), "down_proj": (H, I)}
        if not found and strange is not None:
            raise KTAMXModelNotSupportedError(
                f"{strange}: experts of {layer} are saved in a form that is not known. Known are bfloat16, float16, "
                "float32 and block-wise FP8 weights, one tensor an expert or fused."
            )
        for expert in range(shape.num_experts):
            for name in ("gate_proj", "up_proj", "down_proj"):
                if (expert, name) not in found and (name == "down_proj" or (expert, "gate_up_proj") not in found):
                    raise KTAMXError(self._missing(layer, expert, name, found))
                if name != "down_proj" and (expert, name) in found and (expert, "gate_up_proj") in found:
                    one, other = found[expert, name], found[expert, "gate_up_proj"]
                    raise KTAMXError(f"{one} and {other} are the same weight of expert {expert} of {layer}.")
        matrices = {}
        for (expert, name), weight in found.items():
            if expert >= shape.num_experts:
                raise KTAMXError(f"{weight}: {layer} has {shape.num_experts} experts by the model's config.")
            if weight.shape != sizes[name]:
                raise KTAMXError(
                    f"{weight} has the shape {list(weight.shape)} an expert; by the model's config it is "
                    f"{list(sizes[name])}."
                )
            matrices[expert, name] = _Matrix(weight, self._scales(weight, scales.get((expert, name))))
        return matrices

    def _scales(self, weight: StoredTensor, scales: StoredTensor | None) -> StoredTensor | None:
        if weight.dtype in FLOATING and scales is None:
            return None
        if weight.dtype != FP8 and scales is None:
            raise KTAMXError(
                f"{weight} is of {weight.dtype}; known are bfloat16, float16, float32 and FP8 with scales."
            )
        return check_scales(weight, scales, self.block).scales

    def _missing(self, layer: str, expert: int, name: str, found: dict[tuple[int, str], StoredTensor]) -> str:
        """What to say of a weight that is not there: its name and file as those of its neighbours suggest them."""
        names = [f"experts.{expert}.{name}.weight"]
        names += [f"experts.{expert}.{old}.weight" for old, new in _PROJECTIONS.items() if new == name]
        fused = "down_proj" if name == "down_proj" else "gate_up_proj"
        listed = ""
        for other, file in self.files.unlisted.items():
            if other.endswith((*names, f"experts.{fused}")) and self._layer(other) == layer:
                listed = f" {file} has {other}, but {INDEX} does not list it."
        like = next(iter(found.values()), None)
        if like is None:
            return f"{self.files.files[0]} and the rest have no experts for {layer}.{listed}"
        if like.name.endswith(("gate_up_proj", "down_proj")):
            called = like.name.rpartition(".")[0] + "." + fused
        else:
            mixtral = re.search(r"\.w[123]\.weight$", like.name) is not None
            called = like.name.rpartition("experts.")[0] + names[1 if mixtral else 0]
        return f"{called} is missing (expert {expert} of {layer}); {like.file} has {like.name}.{listed}"

    def _layer(self, tensor: str) -> str | None:
        match = _OTHER.match(tensor)
        return next((name for name in self.layers if match and _plain(name) == _plain(match[1])), None)


def checkpoint_folder(path_or_name: str | Path, **hub: Any) -> Path:
    """The folder of a local checkpoint, or that of a model of the hub, downloaded if it is not in the cache.

    Args:
        hub: revision, cache_dir, token and the like, as from_pretrained takes them.

    Raises:
        KTAMXConfigError: There is no such model, or none saved as safetensors.
    """
    name = str(path_or_name)
    if Path(name).is_dir():
        return Path(name) / (hub.get("subfolder") or "")
    from transformers.utils import cached_file, cached_files

    try:
        try:
            return Path(str(cached_file(name, SINGLE, **hub))).parent
        except OSError:
            index = Path(str(cached_file(name, INDEX, **hub)))
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        cached_files(name, shards, **hub)
    except (OSError, ValueError, KeyError) as error:
        told = " ".join(str(error).split())
        raise KTAMXConfigError(
            f"{name!r} is neither a folder nor a model of the hub with safetensors files: {told}"
        ) from error
    return index.parent


def _plain(name: str) -> str:
    """The name of an experts module without what checkpoints and models of one family differ in."""
    return _BLOCK.sub(".experts", _ROOT.sub("", name))


def _parts(
    match: re.Match[str], tensor: StoredTensor, shape: ExpertShape
) -> Iterator[tuple[tuple[int, str], StoredTensor]]:
    """(expert, projection) -> the part of the tensor that is its weight, or its scales."""
    if match.re is _ONE_EXPERT:
        yield (int(match[2]), _PROJECTIONS.get(match[3], match[3])), tensor
        return
    if len(tensor.shape) != 3 or tensor.shape[0] != shape.num_experts:
        raise KTAMXError(
            f"{tensor} has the shape {list(tensor.shape)}; by the model's config it is a stack of {shape.num_experts} "
            "experts' matrices."
        )
    for expert in range(shape.num_experts):
        yield (expert, match[2]), tensor.row(expert)


def _batches(jobs: list[tuple[_Matrix, Tensor]]) -> Iterator[list[tuple[_Matrix, Tensor]]]:
    """Jobs in the order of the files, `_STAGING` bytes at a time."""
    batch: list[tuple[_Matrix, Tensor]] = []
    size = 0
    for job in sorted(jobs, key=lambda job: (str(job[0].weight.file), job[0].weight.begin)):
        if batch and size + job[0].weight.size > _STAGING:
            yield batch
            batch, size = [], 0
        batch.append(job)
        size += job[0].weight.size
    if batch:
        yield batch


def _refuse_transposed(model: Any) -> None:
    """Some families' checkpoints have the fused matrices the other way round, which a square one would not show."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    for conversion in get_model_conversion_mapping(model):
        turned = any(type(step).__name__ == "Transpose" for step in getattr(conversion, "operations", ()))
        if turned and any("experts" in str(target) for target in conversion.target_patterns):
            raise KTAMXModelNotSupportedError(
                f"{type(model).__name__}: its checkpoints hold the experts transposed, which cannot be streamed. Use "
                "from_pretrained and apply_kt_moe."
            )
