"""`KTConfig`: what a user may set, checked when it is made."""

from __future__ import annotations

import dataclasses
import difflib
import logging
from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import Any

from .errors import KTAMXConfigError

logger = logging.getLogger(__name__)

PLACEMENTS = ("auto", "cpu", "gpu")
LORA_DEVICES = ("auto", "cpu", "gpu")
EXPERT_DTYPES = ("bf16", "int4", "int8", "fp8")
EXPERT_RANKS = ("auto", "host", "all")
BACKENDS = ("auto", "AMXBF16", "AMXInt8", "AMXInt4", "MXFP4", "AMXFP8", "AMXInt4KGroup", "torch")

# Keys of older integrations, with what took their place.
_REMOVED = {
    "kt_optimize_rule": "nothing: apply_kt_moe finds the experts by itself, rule files are not used",
    "cpu_infer": "kt_num_threads",
    "chunk_size": "kt_max_len",
}


@dataclass(frozen=True)
class KTConfig:
    """Settings of `apply_kt_moe`.

    Args:
        kt_backend: What computes the experts: `auto` (AMX, then AVX512-BF16, then torch; torch as well on two cores
            without AMX, unless kt_num_threads is set), `AMXBF16` (kt-kernel's bf16 operators, on AMX or AVX512-BF16),
            `AMXInt8` or `AMXInt4` (the same, weights quantized as they are packed: a half and a quarter of the memory,
            never chosen by `auto`), `MXFP4`, `AMXFP8` or `AMXInt4KGroup` (operators for checkpoints that are in these
            formats, which they take as they are; others are rounded to them; see docs/low-bit.md), or `torch`
            (PyTorch, any device and dtype).
        kt_num_threads: Worker threads of the operators. None plans them from the machine (its physical cores, less
            one); more than it has are clamped with a warning.
        kt_tp_enabled: Split each expert over the NUMA nodes of the machine, where it has several.
        kt_num_gpu_experts: Experts of each layer that are computed on the GPU while the CPU computes the others: the
            most used, if `apply_kt_moe` is given a placement. 0 computes all of them on the CPU. None is not set.
        kt_expert_placement: In place of `kt_num_gpu_experts`, how many experts of each layer have their weights in the
            GPU's memory, how many are copied to the GPU each time they are needed (the most used first, by the
            placement), the CPU computing the others: `{"resident": 8, "streamed": 16}`; or how many whole layers are
            in the GPU's memory, the others copied: `{"resident_layers": 12}`; `cpu` or `gpu` (all of them); or `auto`,
            which begins with what is fast in the least memory, and moves layers to the GPU as the run leaves room.
            None is `auto` where there is a GPU, unless `kt_num_gpu_experts`, `kt_backend` or `kt_weight_path` is set.
        kt_weight_path: Folder of expert weights that `kt-hf quantize` wrote, used in place of the model's own
            (AMXInt8, AMXInt4; `kt_lora_rank` must be given).
        kt_expert_dtype: What the experts' weights are stored in: `bf16`, which is as the checkpoint has them, or `int4`
            (4.5 bits a weight: groups of 32, each with a searched scale), `int8` (a scale for each row) or `fp8` (one
            for 128 x 128), quantized while they are loaded or packed, on the GPU if there is one. The GPU keeps them
            so and widens them when they are multiplied; on the CPU they are widened again, which saves nothing.
        kt_moe_lora_device: Where the trainable LoRA tensors of the experts live, with their gradients and the
            optimizer's state: `cpu`; `gpu`, if the model is on one (16 bytes of its memory a parameter); or `auto`,
            which takes the GPU where that computes all experts, resident or streamed, for as many layers as its memory
            suffices beside everything else, and the CPU otherwise. Decided when the first adapter is made, and once
            more when a trainer says how it computes its steps; not changed in a run.
        kt_expert_activations: Under gradient checkpointing, `retain` keeps what the first forward computed, so that
            the recompute costs nothing; `recompute` keeps nothing and computes the experts' forward again, which
            brings streamed ones to the GPU once more. `auto` is `retain`, but for experts on a GPU whose memory a step
            would exceed by it.
        kt_share_backward_weights: Keep one buffer of backward weights for all layers (half the memory, slower
            backward) instead of one a layer. None decides by the free memory.
        kt_max_len: Most tokens in one operator call; longer batches are computed in pieces. None means 32,768, or less
            where the buffers for as many would be larger than the memory.
        kt_lora_rank: LoRA rank the operators are built for. None takes the first adapter's; 0 packs for inference.
        kt_expert_ranks: Among which processes of several hosts the experts are divided: `host` (each host has all of
            them, divided among its processes; gradients of their LoRA are averaged over hosts once a step), `all`
            (among all processes, for models that no host holds: each layer's tokens cross the network), or `auto`,
            which is `host` where that fits in each host's memory. Of one host both are the same.
        kt_max_cache_depth: Accepted from older configurations and ignored.

    Raises:
        KTAMXConfigError: An unknown field, or a value that is out of range, naming the field, the value and the fix.
    """

    kt_backend: str = "auto"
    kt_num_threads: int | None = None
    kt_tp_enabled: bool = True
    kt_num_gpu_experts: int | None = None
    kt_expert_placement: str | Mapping[str, int] | None = field(default=None, hash=False)
    kt_weight_path: str | Path | None = None
    kt_expert_dtype: str = "bf16"
    kt_moe_lora_device: str = "auto"
    kt_expert_activations: str = "auto"
    kt_share_backward_weights: bool | None = None
    kt_max_len: int | None = None
    kt_lora_rank: int | None = None
    kt_expert_ranks: str = "auto"
    kt_max_cache_depth: InitVar[int | None] = None

    def __new__(cls, *args: Any, **kwargs: Any) -> KTConfig:  # noqa: D102
        # Before __init__, whose TypeError for an unknown name would not say what to write instead.
        _check_names(kwargs)
        return super().__new__(cls)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> KTConfig:
        """A config from a mapping, of a YAML file for instance, with the checks of the constructor.

        Args:
            values: Field -> value.

        Raises:
            KTAMXConfigError: No mapping, an unknown field, or a value that is out of range.
        """
        if not isinstance(values, Mapping):
            raise KTAMXConfigError(f"KTConfig.from_dict takes a mapping of settings, not {values!r}.")
        if wrong := [name for name in values if not isinstance(name, str)]:
            raise KTAMXConfigError(f"{wrong[0]!r} is no setting of kt_hf: names are text.")
        return cls(**values)

    def changed(self) -> dict[str, Any]:
        """The settings that are not the defaults, by name; a path as text."""
        default = KTConfig()
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        given = {name: value for name, value in values.items() if value != getattr(default, name)}
        return {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}

    def __post_init__(self, kt_max_cache_depth: int | None) -> None:
        if kt_max_cache_depth is not None:
            logger.warning(
                "kt_max_cache_depth=%s is ignored: the operators keep one forward a layer.", kt_max_cache_depth
            )
        _choice("kt_backend", self.kt_backend, BACKENDS)
        _choice("kt_expert_dtype", self.kt_expert_dtype, EXPERT_DTYPES)
        if self.kt_expert_dtype != "bf16":
            _alone(self.kt_expert_dtype, self.kt_backend, self.kt_weight_path)
        _choice("kt_moe_lora_device", self.kt_moe_lora_device, LORA_DEVICES)
        _choice("kt_expert_activations", self.kt_expert_activations, ("auto", "retain", "recompute"))
        _choice("kt_expert_ranks", self.kt_expert_ranks, EXPERT_RANKS)
        _integer("kt_num_threads", self.kt_num_threads, 1, "leave it out (None) to have it planned")
        _integer("kt_num_gpu_experts", self.kt_num_gpu_experts, 0, "use 0 to compute every expert on the CPU")
        _placement(self.kt_expert_placement)
        if isinstance(self.kt_expert_placement, Mapping):  # a copy, for this is frozen
            object.__setattr__(self, "kt_expert_placement", dict(self.kt_expert_placement))
        if self.kt_expert_placement is not None and self.kt_num_gpu_experts:
            raise KTAMXConfigError(
                f"kt_num_gpu_experts={self.kt_num_gpu_experts} and kt_expert_placement={self.kt_expert_placement!r} "
                "both say which experts the GPU computes: leave one out."
            )
        _integer("kt_max_len", self.kt_max_len, 1, "leave it out (None) for the default")
        _integer("kt_lora_rank", self.kt_lora_rank, 0, "leave it out (None) to take the adapter's rank")
        _boolean("kt_tp_enabled", self.kt_tp_enabled)
        if self.kt_share_backward_weights is not None:
            _boolean("kt_share_backward_weights", self.kt_share_backward_weights)
        if self.kt_weight_path is not None and not isinstance(self.kt_weight_path, (str, Path)):
            raise KTAMXConfigError(
                f"kt_weight_path={self.kt_weight_path!r} is not a path. Give a folder, or leave it out."
            )
        if self.kt_lora_rank is not None and self.kt_lora_rank > 1024:
            raise KTAMXConfigError(f"kt_lora_rank={self.kt_lora_rank} is too large: at most 1024.")


def as_config(settings: Any) -> KTConfig:
    """The settings that a caller gave: a `KTConfig`, a mapping of its fields, or None for the defaults.

    Raises:
        KTAMXConfigError: Anything else, or a field or value that `KTConfig` refuses.
    """
    if settings is None or isinstance(settings, KTConfig):
        return settings or KTConfig()
    if isinstance(settings, Mapping):
        return KTConfig.from_dict(settings)
    raise KTAMXConfigError(f"cfg={settings!r} are no settings: give a KTConfig, a dict of its fields, or leave it out.")


def _check_names(values: Mapping[str, Any]) -> None:
    known = [field.name for field in dataclasses.fields(KTConfig)] + ["kt_max_cache_depth"]
    for name in values:
        if name in _REMOVED:
            raise KTAMXConfigError(f"{name} is no setting of kt_hf. In its place: {_REMOVED[name]}.")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {close[0]}?" if close else f" Known: {', '.join(known)}."
            raise KTAMXConfigError(f"{name} is no setting of kt_hf.{hint}")


def _choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        close = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.4)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise KTAMXConfigError(f"{name}={value!r} is not one of {', '.join(choices)}.{hint}")


def _integer(name: str, value: Any, least: int, fix: str) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise KTAMXConfigError(f"{name}={value!r} is not an integer of {least} or more: {fix}.")


def _placement(value: Any) -> None:
    if value is None or (isinstance(value, str) and value in PLACEMENTS):
        return
    name = "kt_expert_placement"
    if not isinstance(value, Mapping):
        close = difflib.get_close_matches(str(value), PLACEMENTS, n=1, cutoff=0.4)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise KTAMXConfigError(
            f"{name}={value!r} is not one of {', '.join(PLACEMENTS)}, nor numbers of experts as in "
            f"{{resident: 8, streamed: 16}}.{hint}"
        )
    unknown = [key for key in value if key not in ("resident", "streamed", "resident_layers")]
    if unknown or not value:
        problem = f"has {unknown[0]!r} in it" if unknown else "is empty"
        raise KTAMXConfigError(
            f"{name}={value!r} {problem}: it takes resident and streamed, numbers of experts, or resident_layers."
        )
    if "resident_layers" in value and len(value) > 1:
        raise KTAMXConfigError(
            f"{name}={value!r} has resident_layers and numbers of experts: the layers that are not resident are "
            "streamed as a whole. Leave one out."
        )
    for key, count in value.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise KTAMXConfigError(
                f"{name}={value!r} has {key} that is not an integer of 0 or more: give a number of experts of each "
                "layer (of layers for resident_layers), or leave it out."
            )


# Operators that compute with what a dtype is stored as.
_SAME = {"AMXInt4KGroup": "int4", "AMXFP8": "fp8"}


def _alone(dtype: str, backend: str, path: object) -> None:
    """Experts are quantized in one way."""
    if backend not in ("auto", "torch", "AMXBF16") and _SAME.get(backend) != dtype:
        raise KTAMXConfigError(
            f"kt_expert_dtype={dtype!r} and kt_backend={backend!r} both quantize the experts: leave one out."
        )
    if path is not None:
        raise KTAMXConfigError(
            f"kt_expert_dtype={dtype!r} and kt_weight_path={str(path)!r}: the weights there are quantized already. "
            "Leave one out."
        )


def _boolean(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise KTAMXConfigError(f"{name}={value!r} is neither true nor false.")
