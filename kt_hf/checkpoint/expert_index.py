"""`ExpertCheckpoint`: the routed experts of a safetensors checkpoint, checked from the headers and read layer by layer.

Three layouts are known, recognized by the tensors' names, whatever the family: one tensor an expert and projection
(`experts.7.gate_proj.weight`), Mixtral's names for the same (`experts.7.w1.weight`), and transformers' fused ones
(`experts.gate_up_proj`). Each in bf16, fp16, fp32, or in 8 bits with scales (`eight_bit`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import ExpertWeights
from ..backends.gpu.pinned_weights import own_pages
from ..backends.packed import EIGHT_BIT, Code, PackedExperts, PackedMatrices
from ..discovery import FLOATING, find_experts, skeleton
from ..errors import KTAMXConfigError, KTAMXError, KTAMXModelNotSupportedError
from ..shapes import ALIASES, BF16, ExpertShape
from .eight_bit import KNOWN, SCALE_PATTERN, block_size, check_scales
from .expert_reader import Matrix, read_matrices
from .tensor_files import INDEX, SINGLE, StoredTensor, TensorFiles, read_index, read_tensors

_ONE_EXPERT = re.compile(
    rf"(.*\bexperts)\.(\d{{1,9}})\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight({SCALE_PATTERN})?$"
)
_FUSED = re.compile(rf"(.*\bexperts)\.(gate_up_proj|down_proj)(?:\.weight)?({SCALE_PATTERN})?$")
_OTHER = re.compile(r"(.*\bexperts)\.(.*)$")
# A checkpoint may hold the model without its head, or call the block that has the experts as its authors did.
_ROOT = re.compile(r"^(?:(?:model|language_model|text_model|transformer)\.)*")
_BLOCK = re.compile(r"\.(?:mlp|block_sparse_moe|feed_forward|ffn|moe|mixer)\.experts$")


class ExpertCheckpoint:
    """The routed experts of a checkpoint; nothing is read before `read`.

    Args:
        folder: Of the checkpoint; `checkpoint_folder` finds the folder of a hub's model.
        config: The model's configuration.
        trust_remote_code: Whether the model's own code may be run, as transformers has it.
        model: The `skeleton` of the configuration, where the caller has made one; it is made here without.

    Attributes:
        layers: Full names of the experts modules, in the order of the model's layers (`model.layers.3.mlp.experts`).
        shapes: Layer -> sizes of its experts.
        model_class: The class by which transformers loads the model.
        expert_classes: The classes of its experts modules.
        files: The checkpoint's tensors.
        block: Rows and columns of an 8-bit weight that share a scale.

    Raises:
        KTAMXModelNotSupportedError: A model without experts that can be computed, or saved under unknown names.
        KTAMXConfigError: The folder has no safetensors checkpoint, or it is quantized in another way.
        KTAMXError: A file or a tensor is missing, doubled, truncated or of another shape, naming file and tensor.
    """

    def __init__(
        self, folder: str | Path, config: Any, trust_remote_code: bool = False, model: nn.Module | None = None
    ) -> None:
        model = skeleton(config, trust_remote_code) if model is None else model
        sites = find_experts(model, weightless=True)
        self.model_class: Any = type(model)
        self.expert_classes = {type(site.experts) for site in sites}
        self.layers = [site.name for site in sites]
        self.shapes = {site.name: site.shape for site in sites}
        self.block = block_size(config)
        _refuse_transposed(model)
        self.files = TensorFiles(Path(folder))
        self._matrices = self._find()

    def read(self, layer: str, dtype: torch.dtype, low_bit: Sequence[int] = ()) -> ExpertWeights:
        """A layer's weights, stacked and fused, in memory of their own on the CPU.

        Args:
            layer: One of `layers`.
            dtype: bfloat16, float16 or float32; what the checkpoint has is rounded to it once.
            low_bit: Ids of experts that stay in low bits, as the files have them; `bits` says whether they can.

        Returns:
            gate_up [E, 2I, H] and down [E, H, I] of the experts that are not asked for in low bits, and the others.

        Raises:
            KTAMXError: A file has changed since it was checked.
        """
        if dtype not in FLOATING:
            raise KTAMXConfigError(f"dtype={dtype}: give bfloat16, float16 or float32, which experts can have.")
        shape, matrices = self.shapes[layer], self._matrices[layer]
        H, I = shape.hidden_size, shape.intermediate_size  # noqa: E741
        rest = [e for e in range(shape.num_experts) if e not in set(low_bit)]
        gate_up = torch.empty(len(rest), 2 * I, H, dtype=dtype, device="cpu")
        down = torch.empty(len(rest), H, I, dtype=dtype, device="cpu")
        row = {e: i for i, e in enumerate(rest)}
        targets = _targets(gate_up, down)
        read_matrices([(matrix, targets[name][row[e]]) for (e, name), matrix in matrices.items() if e in row])
        return ExpertWeights(gate_up, down, low_bit=self._read_packed(layer, sorted(low_bit)) if low_bit else None)

    def bits(self) -> float:
        """Bits of a weight of experts, its scale included, if they can stay as they are: those of a layer are alike.

        16 if they are not of low bits, or are mixed.
        """
        stored = 0
        for matrices in self._matrices.values():
            kinds = {(m.weight.dtype, m.scales.dtype if m.scales else None) for m in matrices.values()}
            if len(kinds) != 1 or kinds.pop()[0] not in EIGHT_BIT:
                return BF16
            scales = sum(math.prod(m.scales.shape) for m in matrices.values() if m.scales)
            stored += sum(m.weight.size for m in matrices.values()) + 4 * scales
        return 8 * stored / sum(shape.num_weights for shape in self.shapes.values())

    def stored(self) -> list[PackedMatrices]:
        """How experts of low bits are stored: two matrices of each layer's first expert; [] if they cannot stay so."""
        if self.bits() >= BF16:
            return []
        packed = [self._read_packed(layer, [0]) for layer in self.layers]
        return [matrix for one in packed for matrix in (one.gate_up, one.down)]

    def _read_packed(self, layer: str, experts: list[int]) -> PackedExperts:
        """Experts of a layer as they are in the files."""
        shape, matrices = self.shapes[layer], self._matrices[layer]
        H, I, n = shape.hidden_size, shape.intermediate_size, len(experts)  # noqa: E741
        fused = (experts[0], "gate_up_proj") in matrices
        dtype = matrices[experts[0], "down_proj"].weight.dtype
        gate_up, down = own_pages((n, 2 * I, H), dtype), own_pages((n, H, I), dtype)
        targets = _targets(gate_up, down)
        jobs: list[tuple[StoredTensor, Tensor]] = []
        scales: dict[str, Tensor] = {}
        for name in ["gate_up_proj"] * fused or ["gate_proj", "up_proj"]:
            scales[name] = self._scales_of(layer, name, experts, jobs)
        scales["down_proj"] = self._scales_of(layer, "down_proj", experts, jobs)
        jobs += [(matrices[e, name].weight, targets[name][i]) for i, e in enumerate(experts) for name in scales]
        read_tensors(jobs)
        code: Code = "int8" if dtype == torch.int8 else "e4m3"
        *above, below = (stored.float() for stored in scales.values())
        return PackedExperts(
            experts,
            PackedMatrices(code, gate_up, torch.stack(above, 1), self.block),
            PackedMatrices(code, down, below[:, None].contiguous(), self.block),
        )

    def _scales_of(self, layer: str, name: str, experts: list[int], jobs: list[tuple[StoredTensor, Tensor]]) -> Tensor:
        """Memory [n, R, C] for the scales of a projection of some experts; what is to be read is added to `jobs`."""
        stored = [scales for e in experts if (scales := self._matrices[layer][e, name].scales) is not None]
        memory = torch.empty(len(experts), *stored[0].shape, dtype=stored[0].dtype, device="cpu")
        jobs += zip(stored, memory, strict=True)
        return memory

    def source_bytes(self, layer: str) -> int:
        """Bytes of a layer's experts in the files."""
        return sum(tensor.size for matrix in self._matrices[layer].values() for tensor in matrix.tensors)

    def _find(self) -> dict[str, dict[tuple[int, str], Matrix]]:
        """Layer -> (expert, projection) -> where it is; gate and up may be one, `gate_up_proj`."""
        layers = {_plain(name): name for name in self.layers}
        weights: dict[str, dict[tuple[int, str], StoredTensor]] = {name: {} for name in self.layers}
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
            target = (scales if match.groups()[-1] else weights)[layer]
            shape = self.shapes[layer]
            for key, part in _parts(match, tensor, shape):
                if key in target:
                    raise KTAMXError(f"{tensor} and {target[key]} are the same weight of expert {key[0]} of {layer}.")
                target[key] = part
        if not any(weights.values()) and not strange:
            raise KTAMXModelNotSupportedError(
                f"No tensor in {self.files.folder} has a name like {self.layers[0]}.0.gate_proj.weight or "
                f"{self.layers[0]}.gate_up_proj: experts saved under other names cannot be streamed. Use "
                "from_pretrained and apply_kt_moe."
            )
        return {name: self._checked(name, weights[name], scales[name], strange.get(name)) for name in self.layers}

    def _checked(
        self,
        layer: str,
        weights: dict[tuple[int, str], StoredTensor],
        scales: dict[tuple[int, str], StoredTensor],
        strange: StoredTensor | None,
    ) -> dict[tuple[int, str], Matrix]:
        """A layer's matrices, all there and of the right size."""
        shape = self.shapes[layer]
        H, I = shape.hidden_size, shape.intermediate_size  # noqa: E741
        sizes = {"gate_proj": (I, H), "up_proj": (I, H), "gate_up_proj": (2 * I, H), "down_proj": (H, I)}
        if not weights and strange is not None:
            raise KTAMXConfigError(
                f"{strange}: experts of {layer} are saved in a form that is not known. Give a checkpoint in {KNOWN}, "
                "one tensor an expert or fused."
            )
        for expert in range(shape.num_experts):
            for name in ("gate_proj", "up_proj", "down_proj"):
                if (expert, name) not in weights and (name == "down_proj" or (expert, "gate_up_proj") not in weights):
                    raise KTAMXError(self._missing(layer, expert, name, weights))
                if name != "down_proj" and (expert, name) in weights and (expert, "gate_up_proj") in weights:
                    part, fused = weights[expert, name], weights[expert, "gate_up_proj"]
                    raise KTAMXError(f"{part} and {fused} are the same weight of expert {expert} of {layer}.")
        matrices = {}
        for (expert, name), weight in weights.items():
            if expert >= shape.num_experts:
                raise KTAMXError(f"{weight}: {layer} has {shape.num_experts} experts by the model's config.")
            if weight.shape != sizes[name]:
                raise KTAMXError(
                    f"{weight} has the shape {list(weight.shape)} an expert; by the model's config it is "
                    f"{list(sizes[name])}."
                )
            matrices[expert, name] = Matrix(weight, self._scales(weight, scales.get((expert, name))), self.block)
        return matrices

    def _scales(self, weight: StoredTensor, scales: StoredTensor | None) -> StoredTensor | None:
        if weight.dtype in FLOATING and scales is None:
            return None
        if weight.dtype not in EIGHT_BIT and scales is None:
            raise KTAMXError(f"{weight} is of {weight.dtype}; known are {KNOWN}.")
        return check_scales(weight, scales, self.block).scales

    def _missing(self, layer: str, expert: int, name: str, weights: dict[tuple[int, str], StoredTensor]) -> str:
        """What to say of a weight that is not there: its name and file as those of its neighbours suggest them."""
        names = [f"experts.{expert}.{name}.weight"]
        names += [f"experts.{expert}.{old}.weight" for old, new in ALIASES.items() if new == name]
        fused = "down_proj" if name == "down_proj" else "gate_up_proj"
        listed = ""
        for other, file in self.files.unlisted.items():
            if other.endswith((*names, f"experts.{fused}")) and self._layer(other) == layer:
                listed = f" {file} has {other}, but {INDEX} does not list it."
        like = next(iter(weights.values()), None)
        if like is None:
            return f"{layer}.{expert}.{name}.weight is missing; nothing in {self.files.folder} is of {layer}.{listed}"
        if like.name.endswith(("gate_up_proj", "down_proj")):
            called = like.name.rpartition(".")[0] + "." + fused
        else:
            mixtral = re.search(r"\.w[123]\.weight$", like.name) is not None
            called = like.name.rpartition("experts.")[0] + names[1 if mixtral else 0]
        return f"{called} is missing (expert {expert} of {layer}); {like.file} has {like.name}.{listed}"

    def _layer(self, tensor: str) -> str | None:
        match = _OTHER.match(tensor)
        return next((name for name in self.layers if match and _plain(name) == _plain(match[1])), None)


def _targets(gate_up: Tensor, down: Tensor) -> dict[str, Tensor]:
    """Projection -> where its matrices [n, out, in] are in gate_up [n, 2I, H] and down [n, H, I]."""
    I = down.shape[2]  # noqa: E741
    return {"gate_proj": gate_up[:, :I], "up_proj": gate_up[:, I:], "gate_up_proj": gate_up, "down_proj": down}


def checkpoint_folder(path_or_name: str | Path, **hub: Any) -> Path:
    """The folder of a local checkpoint, or that of a model of the hub, downloaded if it is not in the cache.

    Args:
        path_or_name: A folder, or a name of the hub.
        **hub: revision, cache_dir, token and the like, as from_pretrained takes them.

    Raises:
        KTAMXConfigError: There is no such model, or none saved as safetensors.
    """
    name = str(path_or_name)
    if Path(name).is_dir():
        return Path(name) / (hub.get("subfolder") or "")
    from transformers.utils.hub import cached_file, cached_files

    try:
        try:
            return Path(str(cached_file(name, SINGLE, **hub))).parent
        except OSError:
            index = Path(str(cached_file(name, INDEX, **hub)))
        shards = sorted(set(read_index(index.parent).values()))
        cached_files(name, shards, **hub)
    except (OSError, ValueError, KeyError) as error:
        problem = " ".join(str(error).split())
        raise KTAMXConfigError(
            f"{name!r} is neither a folder nor a model of the hub with safetensors files: {problem}"
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
        yield (int(match[2]), ALIASES.get(match[3], match[3])), tensor
        return
    if len(tensor.shape) != 3 or tensor.shape[0] != shape.num_experts:
        raise KTAMXError(
            f"{tensor} has the shape {list(tensor.shape)}; by the model's config it is a stack of {shape.num_experts} "
            "experts' matrices."
        )
    for expert in range(shape.num_experts):
        yield (expert, match[2]), tensor.row(expert)


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
