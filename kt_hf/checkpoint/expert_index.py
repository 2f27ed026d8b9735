"""`ExpertCheckpoint`: the routed experts of a safetensors checkpoint, checked from the headers and read layer by layer.

Three layouts are known, recognized by the tensors' names, whatever the family: a linear layer an expert and projection
(`experts.7.gate_proj.weight`), Mixtral's names for the same (`experts.7.w1.weight`), and transformers' fused ones
(`experts.gate_up_proj`). Each in bf16, fp16, fp32, or in one of the low-bit formats that `quantization` tells apart.
Others are read as the model's module has them (`as_module`), or by transformers' table of the family (`by_table`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import ExpertWeights
from ..backends.packed import PackedExperts, PackedMatrices
from ..discovery import FLOATING, ExpertsSite, find_experts, skeleton
from ..errors import KTAMXConfigError, KTAMXError, KTAMXModelNotSupportedError
from ..shapes import ALIASES, BF16, ExpertShape
from .as_module import ModuleTensors, as_module
from .by_table import TableTensors, by_table
from .expert_names import ExpertName, expert_name, plain_name
from .expert_reader import Matrix, Slot, Wide, check_values, read_matrices, read_rows
from .fingerprint import fingerprint, fingerprint_by_rows
from .formats import KNOWN, Kind
from .quantization import quantization_of
from .tensor_files import INDEX, StoredTensor, TensorFiles

# Of a layer, by (expert, projection).
_Weights = dict[tuple[int, str], dict[str, StoredTensor]]
_Matrices = dict[tuple[int, str], Matrix]


class ExpertCheckpoint:
    """The routed experts of a checkpoint; nothing is read before `read`.

    Args:
        folder: Of the checkpoint; `kt_hf.checkpoint.checkpoint_folder` finds the folder of a hub's model.
        config: The model's configuration.
        trust_remote_code: Whether the model's own code may be run, as transformers has it.
        model: The `skeleton` of the configuration, where the caller has made one; it is made here without.

    Attributes:
        layers: Full names of the experts modules, in the order of the model's layers (`model.layers.3.mlp.experts`).
        shapes: Layer -> sizes of its experts.
        forms: Layer -> how the model's module holds its experts, and how it is called.
        model_class: The class by which transformers loads the model.
        expert_classes: The classes of its experts modules.
        files: The checkpoint's tensors.
        quantization: How the configuration says that weights are stored.

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
        for site in sites:
            _refuse_unread(site, model)
        self.model_class: Any = type(model)
        self.expert_classes = {type(site.experts) for site in sites}
        self.layers = [site.name for site in sites]
        self.shapes = {site.name: site.shape for site in sites}
        self.forms = {site.name: site.form for site in sites}
        self.quantization = quantization_of(config)
        self.files = TensorFiles(Path(folder))
        self._as_modules = self._find_modules(model)
        self._matrices = self._find(model)

    def read(
        self, layer: str, dtype: torch.dtype, low_bit: Sequence[int] = (), experts: slice | None = None
    ) -> ExpertWeights:
        """A layer's weights, stacked and fused, in memory of their own on the CPU.

        Args:
            layer: One of `layers`.
            dtype: bfloat16, float16 or float32; what the checkpoint has is rounded to it once.
            low_bit: Ids of experts that are to stay in low bits, as the files have them. Those that cannot be stacked
                with the others of the layer are widened nevertheless.
            experts: The only ones to read, which get ids from 0 (those stored as the module has them are all read).

        Returns:
            Stacks of the widened experts, [n, 2I, H] and [n, H, I], and those that stay packed in its `low_bit`.

        Raises:
            KTAMXError: A file has changed since it was checked.
        """
        if dtype not in FLOATING:
            raise KTAMXConfigError(f"dtype={dtype}: give bfloat16, float16 or float32, which experts can have.")
        if layer in self._as_modules:
            weights = self._as_modules[layer].read(dtype, low_bit)
            return weights if experts is None else weights.part(experts)
        shape, matrices = self.shapes[layer], self._matrices[layer]
        H, I = shape.hidden_size, shape.intermediate_size  # noqa: E741
        wanted = range(shape.num_experts)[experts or slice(None)]
        kept = sorted(set(low_bit) & self._stackable(layer) & set(wanted))
        rest = [e for e in wanted if e not in set(kept)]
        gate_up = torch.empty(len(rest), shape.up_rows, H, dtype=dtype, device="cpu")
        down = torch.empty(len(rest), H, I, dtype=dtype, device="cpu")
        places = {"gate_up_proj": gate_up, "down_proj": down, "gate_proj": gate_up[:, :I], "up_proj": gate_up[:, -I:]}
        row = {e: i for i, e in enumerate(rest)}
        read_matrices([(matrix, Wide(places[name][row[e]])) for (e, name), matrix in matrices.items() if e in row])
        packed = self._read_packed(layer, kept) if kept else None
        if packed is not None:
            packed.experts = [e - wanted.start for e in kept]
        return ExpertWeights(gate_up, down, low_bit=packed)

    def fingerprint(self, layer: str, dtype: torch.dtype, to: str = "bf16") -> Tensor:
        """The `fingerprint` of a layer's weights, of which only the rows that it is of are read.

        Of low bits they are whole matrices; of experts that are stored as their module has them, all.

        Args:
            layer: One of `layers`.
            dtype: Floating, of the experts that are not of low bits.
            to: As for `fingerprint`.

        Raises:
            KTAMXError: A file has changed since it was checked.
        """
        if layer in self._as_modules:
            return fingerprint(self._as_modules[layer].read(dtype), to)
        shape = self.shapes[layer]
        E, H, I = shape.num_experts, shape.hidden_size, shape.intermediate_size  # noqa: E741
        sizes = {"gate_up_proj": [E, shape.up_rows, H], "down_proj": [E, H, I]}
        return fingerprint_by_rows(sizes, dtype, lambda *rows: self._rows(layer, dtype, *rows), to)

    def _rows(self, layer: str, dtype: torch.dtype, name: str, expert: int, first: int, stop: int) -> Tensor:
        """Rows `first` to before `stop` of an expert's `gate_up_proj` or `down_proj`."""
        shape, matrices, begin = self.shapes[layer], self._matrices[layer], 0
        names, rows = [name] if (expert, name) in matrices else list(shape.projections[:-1]), []
        for matrix in (matrices[expert, one] for one in names):
            end = begin + matrix.shape[0]
            if first < end and stop > begin:
                rows.append(read_rows(matrix, max(first, begin) - begin, min(stop, end) - begin, dtype))
            begin = end
        return torch.cat(rows)

    def bits(self) -> float:
        """Bits of an expert's weight as it is kept, its part of the scales included; 16 for those that are widened."""
        stored = sum(module.kept_size for module in self._as_modules.values())
        for layer in self._matrices:
            shape = self.shapes[layer]
            stackable = self._stackable(layer)
            stored += (shape.num_experts - len(stackable)) * shape.num_weights / shape.num_experts * BF16 / 8
            for (expert, _), matrix in self._matrices[layer].items():
                if expert in stackable and matrix.kind is not None:
                    stored += matrix.kind.size(*matrix.shape)
        return 8 * stored / sum(shape.num_weights for shape in self.shapes.values())

    def check_values(self, scales: bool = True) -> None:
        """Read what tells how weights are stored, and look through it.

        Args:
            scales: Whether to look through the scales of low-bit weights too, for what is not a finite number: a ninth
                of a checkpoint of 4 bits.

        Raises:
            KTAMXError: The experts cannot be computed of it, naming file and tensor.
        """
        for module in self._as_modules.values() if scales else ():
            module.check_values()
        check_values([matrix for layer in self._matrices.values() for matrix in layer.values()], scales)

    def source_bytes(self, layer: str) -> int:
        """Bytes of a layer's experts in the files."""
        module = self._as_modules.get(layer)
        return module.size if module else sum(matrix.size for matrix in self._matrices[layer].values())

    def _stackable(self, layer: str) -> set[int]:
        """The experts of a layer that can be stacked in low bits: those of the kinds that most of them have."""
        kinds: dict[int, set[tuple[str, Kind | None]]] = {}
        for (expert, name), matrix in self._matrices[layer].items():
            above = "gate and up" if name in ("gate_proj", "up_proj") else name
            kinds.setdefault(expert, set()).add((above, matrix.kind))
        alike = {e: frozenset(of) for e, of in kinds.items() if len(of) == 2 and all(kind for _, kind in of)}
        most = Counter(alike.values()).most_common(1)
        return {e for e, of in alike.items() if of == most[0][0]}

    def stored(self) -> list[PackedMatrices]:
        """How experts of low bits are stored: two matrices of each layer's first expert; [] if any is widened."""
        if self._as_modules or any(len(self._stackable(name)) < self.shapes[name].num_experts for name in self.layers):
            return []
        packed = [self._read_packed(layer, [0]) for layer in self.layers]
        return [matrix for one in packed for matrix in (one.gate_up, one.down)]

    def _read_packed(self, layer: str, experts: list[int]) -> PackedExperts:
        """Experts of a layer as they are in the files."""
        shape, matrices = self.shapes[layer], self._matrices[layer]
        H, I, n = shape.hidden_size, shape.intermediate_size, len(experts)  # noqa: E741
        names = ["gate_up_proj"] if (experts[0], "gate_up_proj") in matrices else list(shape.projections[:-1])
        above, below = matrices[experts[0], names[0]].kind, matrices[experts[0], "down_proj"].kind
        assert above
        assert below
        gate_up, down = above.allocate(n, shape.up_rows, H, len(names)), below.allocate(n, H, I)
        jobs = []
        for i, e in enumerate(experts):
            jobs += [(matrices[e, name], Slot(gate_up, i, part, len(names))) for part, name in enumerate(names)]
            jobs.append((matrices[e, "down_proj"], Slot(down, i)))
        read_matrices(jobs)
        return PackedExperts(experts, gate_up, down)

    def _find_modules(self, model: nn.Module) -> dict[str, ModuleTensors | TableTensors]:
        """Layer -> its experts, of those whose module or checkpoint is laid out otherwise than experts are computed."""
        if _turns_experts(model):
            return {**by_table(model, self.forms, self.files.tensors)}
        layers = {plain_name(name): name for name, form in self.forms.items() if form.stored_otherwise}
        stored: dict[str, dict[str, StoredTensor]] = {name: {} for name in layers.values()}
        for name, tensor in self.files.tensors.items() if layers else ():
            inside = ".experts." in name and name.partition(".experts.")
            layer = layers.get(plain_name(f"{inside[0]}.experts")) if inside else None
            if inside and layer:
                stored[layer][inside[2]] = tensor
        if layers and not any(map(as_module, stored.values())):
            return {**by_table(model, {name: self.forms[name] for name in stored}, self.files.tensors)}
        return {name: ModuleTensors(name, self.forms[name], tensors) for name, tensors in stored.items()}

    def _find(self, model: nn.Module) -> dict[str, _Matrices]:
        """Layer -> (expert, projection) -> where it is; gate and up may be one, `gate_up_proj`."""
        layers = {plain_name(name): name for name in self.layers if name not in self._as_modules}
        weights: dict[str, _Weights] = {name: {} for name in layers.values()}
        strange: dict[str, StoredTensor] = {}
        for name, tensor in self.files.tensors.items():
            known = expert_name(name)
            layer = layers.get(plain_name(known.layer)) if known else None
            if known is None or layer is None:
                continue  # not an expert's, or of a layer the model does not have (multi-token prediction)
            if not known.projection:
                strange.setdefault(layer, tensor)
                continue
            shape = self.shapes[layer]
            for expert, part in _of_experts(known, tensor, shape):
                if expert >= shape.num_experts and self.forms[layer].call == "identity":
                    continue  # stored for an expert that gives the token itself
                parts = weights[layer].setdefault((expert, known.projection), {})
                if known.part in parts:
                    raise KTAMXError(
                        f"{tensor} and {parts[known.part]} are the same weight of expert {expert} of {layer}."
                    )
                parts[known.part] = part
        if layers and not any(weights.values()) and not strange:
            self._as_modules |= by_table(model, {name: self.forms[name] for name in weights}, self.files.tensors)
            return {}
        return {name: self._checked(name, weights[name], strange.get(name)) for name in layers.values()}

    def _checked(self, layer: str, weights: _Weights, strange: StoredTensor | None) -> _Matrices:
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
            for name in shape.projections:
                if (expert, name) not in weights and (name == "down_proj" or (expert, "gate_up_proj") not in weights):
                    raise KTAMXError(self._missing(layer, expert, name, weights))
                if name != "down_proj" and (expert, name) in weights and (expert, "gate_up_proj") in weights:
                    one, fused = (next(iter(weights[expert, n].values())) for n in (name, "gate_up_proj"))
                    raise KTAMXError(f"{one} and {fused} are the same weight of expert {expert} of {layer}.")
        for (expert, _), parts in weights.items():
            if expert >= shape.num_experts:
                stored = next(iter(parts.values()))
                raise KTAMXError(f"{stored}: {layer} has {shape.num_experts} experts by the model's config.")
        return {(e, name): self._matrix(layer, e, name, parts, sizes[name]) for (e, name), parts in weights.items()}

    def _matrix(
        self, layer: str, expert: int, name: str, parts: dict[str, StoredTensor], shape: tuple[int, int]
    ) -> Matrix:
        """A projection of an expert, checked by its parts."""
        if "bias" in parts:
            raise KTAMXModelNotSupportedError(
                f"{parts['bias']}: biases of experts cannot be computed for this model, whose experts have none."
            )
        form = self.quantization.format_of(f"{layer}.{expert}.{name}", parts)
        if form is None and parts["weight"].shape != shape:
            raise KTAMXError(
                f"{parts['weight']} has the shape {list(parts['weight'].shape)} an expert; by the model's config it is "
                f"{list(shape)}."
            )
        return Matrix(shape, parts, form, form.kind(parts, shape) if form else None)

    def _missing(self, layer: str, expert: int, name: str, weights: _Weights) -> str:
        """What to say of a weight that is not there: its name and file as those of its neighbors suggest them."""
        like = next((stored for parts in weights.values() for stored in parts.values()), None)
        known = expert_name(like.name) if like else None
        part = known.part if known else "weight"
        aliases = [old for old, new in ALIASES.items() if new == name]
        names = [f"experts.{expert}.{called}.{part}" for called in (name, *aliases)]
        fused = "down_proj" if name == "down_proj" else "gate_up_proj"
        listed = ""
        for other, file in self.files.unlisted.items():
            if other.endswith((*names, f"experts.{fused}")) and self._layer(other) == layer:
                listed = f" {file} has {other}, but {INDEX} does not list it."
        if like is None or known is None:
            return f"{layer}.{expert}.{name}.weight is missing; nothing in {self.files.folder} is of {layer}.{listed}"
        if known.expert is None:
            missing = like.name.replace(known.projection, fused)
        else:
            mixtral = re.search(r"\.w[123]\.", like.name) is not None
            missing = like.name.rpartition("experts.")[0] + names[1 if mixtral else 0]
        return f"{missing} is missing (expert {expert} of {layer}); {like.file} has {like.name}.{listed}"

    def _layer(self, tensor: str) -> str | None:
        known = expert_name(tensor)
        return next((name for name in self.layers if known and plain_name(name) == plain_name(known.layer)), None)


def _of_experts(known: ExpertName, tensor: StoredTensor, shape: ExpertShape) -> Iterator[tuple[int, StoredTensor]]:
    """(expert, its part) of a tensor: the tensor, or a row of a stack."""
    if known.expert is not None:
        yield known.expert, tensor
        return
    if not tensor.shape or tensor.shape[0] != shape.num_experts or (known.part == "weight" and len(tensor.shape) != 3):
        raise KTAMXError(
            f"{tensor} has the shape {list(tensor.shape)}; by the model's config it is a stack of {shape.num_experts} "
            "experts' matrices."
        )
    for expert in range(shape.num_experts):
        yield expert, tensor.row(expert)


def _refuse_unread(site: ExpertsSite, model: Any) -> None:
    """Experts that are not read by themselves: in a list, tied to others, or with a norm."""
    tied = any(name.startswith(f"{site.name}.") for name in getattr(model, "all_tied_weights_keys", None) or ())
    if tied or site.mlps or site.form.call == "normed":
        what = "a norm behind each expert" if site.form.call == "normed" else "its experts in a list, each by itself"
        what = "its weights tied to those of other experts" if tied else what
        raise KTAMXModelNotSupportedError(
            f"{site.name} has {what}, which cannot be streamed. Use from_pretrained and apply_kt_moe."
        )


def _turns_experts(model: Any) -> bool:
    """Whether its checkpoints have the fused matrices the other way round, which square ones would not show."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return any(
        any(type(step).__name__ == "Transpose" for step in getattr(conversion, "operations", ()))
        and any("experts" in str(target) for target in conversion.target_patterns)
        for conversion in get_model_conversion_mapping(model)
    )
