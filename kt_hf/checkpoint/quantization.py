"""What a model's configuration says of how its checkpoint stores weights: `quantization_config`, understood."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..discovery import FLOATING
from ..errors import KTAMXConfigError, KTAMXError
from .eight_bit import A_ROW, DEFAULT_BLOCK, SCALES, WHOLE, block_of, eight_bit
from .formats import E8M0, KNOWN, Format, Parts, get
from .four_bit import Mxfp4, Mxfp4Blocks, Nvfp4, PackedInt4
from .nf4 import nf4_format
from .transposed import Awq, Gptq

# The format of a weight by its parts, where the configuration leaves their names open.
Choice = Callable[[Parts], Format]
_AN_EXPERT = "model.layers.1.mlp.experts.0.down_proj"


@dataclass(frozen=True)
class Group:
    """Weights that are stored alike.

    Attributes:
        choice: Gives the format of one of them.
        bits: Of a weight, its part of the scales included, as it is kept.
        targets: The modules, as compressed-tensors names them: a name, the end of one, `re:` and a pattern, or Linear.
    """

    choice: Choice
    bits: float
    targets: tuple[str, ...] = ("Linear",)


@dataclass(frozen=True)
class Quantization:
    """How weights are stored, by the configuration.

    Attributes:
        groups: The first that names a module tells how its weight is stored; () for a model that is not quantized.
        ignored: Modules that are not quantized, as `Group.targets`.
        method: `quant_method`; None for a model that is not quantized.
    """

    groups: tuple[Group, ...] = ()
    ignored: tuple[str, ...] = ()
    method: str | None = None

    @property
    def bits(self) -> float:
        """Bits of a routed expert's weight, its part of the scales included, as far as the configuration tells."""
        group = next((group for group in self.groups if _names(_AN_EXPERT, group.targets)), None)
        return 16.0 if group is None or _names(_AN_EXPERT, self.ignored) else group.bits

    def format_of(self, module: str, parts: Parts) -> Format | None:
        """How a weight is stored; None for a plain floating one.

        Args:
            module: Name of the layer in the checkpoint.
            parts: Its tensors, by their names behind the layer's.

        Raises:
            KTAMXError: Stored in a way that is not known, naming file and tensor.
        """
        if set(parts) == {"weight"} and parts["weight"].dtype in FLOATING:
            return None
        if "blocks" in parts:
            return Mxfp4Blocks(in_turns=module.endswith("gate_up_proj"))
        group = next((group for group in self.groups if _names(module, group.targets)), None)
        return group.choice(parts) if group else by_parts(parts)


def by_parts(parts: Parts, block: tuple[int, int] = DEFAULT_BLOCK) -> Format:
    """The format of a weight of which the configuration says nothing, or only the block of its 8 bits.

    Raises:
        KTAMXError: The parts do not tell, naming file and tensor.
    """
    codes = parts.get("weight_packed") or parts.get("weight")
    if codes is not None:
        name = "weight_packed" if "weight_packed" in parts else "weight"
        scales = next((part for part in SCALES if part in parts), None)
        exponents = scales is not None and parts[scales].dtype in (E8M0, torch.uint8)
        if "weight.absmax" in parts or any("quant_state" in part for part in parts):
            return nf4_format(parts)
        if name == "weight_packed" and codes.dtype == torch.int32:
            return PackedInt4()
        if "weight_global_scale" in parts or "weight_scale_2" in parts:
            return Nvfp4() if "weight_global_scale" in parts else Nvfp4("weight", "weight_scale_2", divide=False)
        if codes.dtype == torch.uint8 or (codes.dtype == torch.int8 and exponents):
            return Mxfp4(name, scales or SCALES[1])
        if scales is not None or codes.dtype in (torch.int8, torch.float8_e4m3fn):
            return eight_bit(parts, block)
    stored = next(iter(parts.values()))
    raise KTAMXError(f"{stored} is of {stored.dtype}, a form that is not known; known are {KNOWN}.")


def quantization_of(config: Any) -> Quantization:
    """How a model's checkpoint stores its weights.

    Args:
        config: The model's configuration; where it has no `quantization_config`, that of its language model counts.

    Raises:
        KTAMXConfigError: The model is quantized in a way that cannot be read, naming field and value.
    """
    stored = stored_config(config)
    if stored is None:
        return Quantization()
    method = get(stored, "quant_method")
    if method is None and (get(stored, "load_in_4bit") or get(stored, "load_in_8bit")):
        method = "bitsandbytes"
    if str(method) not in _METHODS:
        raise KTAMXConfigError(
            f"quantization_config: quant_method={method!r} cannot be read. Give a checkpoint in {KNOWN} "
            f"(quant_method {', '.join(_METHODS)})."
        )
    groups = _METHODS[str(method)](stored)
    if get(config, "expert_dtype") == "fp4":  # DeepSeek-V4, beside FP8 of the rest
        groups = (Group(groups[0].choice, 4.25, ("re:.*\\.experts\\.",)), *groups)
    names = [get(stored, field) or () for field in ("ignore", "modules_to_not_convert", "llm_int8_skip_modules")]
    ignored = tuple(name for some in names for name in some if isinstance(name, str))
    return Quantization(groups, ignored, str(method))


def known_quantization(config: Any) -> Quantization | None:
    """As `quantization_of`; None for a model that is not quantized, or in a way that cannot be read."""
    try:
        return None if stored_config(config) is None else quantization_of(config)
    except KTAMXConfigError:
        return None


def stored_config(config: Any) -> Any:
    """The `quantization_config` of a model, or of its language model; None without."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    of_model = getattr(config, "quantization_config", None)
    return getattr(text, "quantization_config", None) if of_model is None else of_model


def _refused(field: str, value: Any, fix: str = "") -> KTAMXConfigError:
    return KTAMXConfigError(
        f"quantization_config: {field}={value!r} cannot be read. {fix or f'Give a checkpoint in {KNOWN}.'}"
    )


def _blockwise(config: Any) -> tuple[Group, ...]:
    block = block_of("weight_block_size", get(config, "weight_block_size", DEFAULT_BLOCK))
    return (Group(lambda parts: by_parts(parts, block), _eight_bits(block)),)


def _by_rows(config: Any) -> tuple[Group, ...]:
    return (Group(lambda parts: eight_bit(parts, A_ROW), _eight_bits(A_ROW)),)


def _eight_bits(block: tuple[int, int]) -> float:
    return 8 + 32 / (block[0] * min(block[1], 4096))


def _gptq(config: Any) -> tuple[Group, ...]:
    group, layout = _group_size(config, "group_size"), get(config, "checkpoint_format", "gptq")
    if get(config, "bits") != 4:
        raise _refused("bits", get(config, "bits"), "GPTQ of 4 bits can be read.")
    if layout not in ("gptq", "gptq_v2") or get(config, "is_marlin_format"):
        raise _refused("checkpoint_format", layout, "GPTQ's gptq and gptq_v2 can be read.")
    form = Gptq(group, 2 if layout == "gptq_v2" else 1, bool(get(config, "desc_act")))
    return (Group(lambda parts: form, _four_bits(group, 24)),)


def _awq(config: Any) -> tuple[Group, ...]:
    group = _group_size(config, "group_size")
    bits, version = get(config, "bits"), str(get(config, "version", "gemm")).lower()
    if bits != 4:
        raise _refused("bits", bits, "AWQ of 4 bits can be read.")
    if version != "gemm" or get(config, "backend", "autoawq") == "llm-awq":
        raise _refused("version", version, "AWQ's gemm, as AutoAWQ writes it, can be read.")
    return (Group(lambda parts: Awq(group), _four_bits(group, 24)),)


def _bitsandbytes(config: Any) -> tuple[Group, ...]:
    kind = get(config, "bnb_4bit_quant_type", "nf4")
    if get(config, "load_in_8bit") or not get(config, "load_in_4bit", True):
        raise _refused("load_in_8bit", get(config, "load_in_8bit"), "Of bitsandbytes' kinds NF4 alone can be read.")
    if kind != "nf4":
        raise _refused("bnb_4bit_quant_type", kind, "Of bitsandbytes' kinds NF4 alone can be read.")
    return (Group(lambda parts: nf4_format(parts), _four_bits(64, 32)),)


def _modelopt(config: Any) -> tuple[Group, ...]:
    algorithm = get(config, "quant_algo") or get(get(config, "quantization") or {}, "quant_algo")
    if algorithm not in ("NVFP4", "FP8", "MIXED_PRECISION"):
        raise _refused("quant_algo", algorithm, "modelopt's NVFP4 and FP8 can be read.")

    def choice(parts: Parts) -> Format:
        packed = parts["weight"].dtype == torch.uint8 if "weight" in parts else "weight_scale_2" in parts
        return Nvfp4("weight", "weight_scale_2", divide=False) if packed else eight_bit(parts, WHOLE)

    return (Group(choice, 8.0 if algorithm == "FP8" else 4.5),)


def _mxfp4(config: Any) -> tuple[Group, ...]:
    return (Group(by_parts, 4.25),)


def _compressed(config: Any) -> tuple[Group, ...]:
    """The groups of compressed-tensors."""
    if get(config, "transform_config"):
        raise _refused("transform_config", "…", "It rotates weights when they are used. Give a checkpoint without.")
    named = get(config, "config_groups")
    groups = []
    for name, group in named.items() if isinstance(named, Mapping) else ():
        weights = get(group, "weights")
        if weights is None:
            continue  # of activations alone
        choice = _scheme(name, weights, str(get(group, "format") or get(config, "format") or ""))
        groups.append(Group(*choice, tuple(str(target) for target in get(group, "targets") or ("Linear",))))
    if not groups:
        raise KTAMXConfigError(f"quantization_config: config_groups names no weights. Give a checkpoint in {KNOWN}.")
    return tuple(groups)


def _scheme(name: str, weights: Any, layout: str) -> tuple[Choice, float]:
    """How a group of compressed-tensors stores weights, and the bits of one."""
    bits, kind, strategy = get(weights, "num_bits"), str(get(weights, "type", "int")), str(get(weights, "strategy"))
    symmetric = bool(get(weights, "symmetric", True))
    packed = layout == "pack-quantized"
    if bits == 8 and symmetric and strategy in ("channel", "block", "tensor") and not packed:
        blocks = {"channel": A_ROW, "tensor": WHOLE}
        block = blocks.get(strategy) or block_of("block_structure", get(weights, "block_structure"))
        return lambda parts: eight_bit(parts, block), _eight_bits(block)
    size = get(weights, "group_size")
    if bits == 4 and kind == "int" and strategy in ("group", "channel") and layout in ("", "pack-quantized"):
        group = -1 if strategy == "channel" else _group_size(weights, "group_size")
        return lambda parts: PackedInt4(group, symmetric), _four_bits(group, 16 if symmetric else 24)
    if bits == 4 and kind == "float" and symmetric and (strategy, size) == ("tensor_group", 16):
        return lambda parts: Nvfp4(), 4.5
    if bits == 4 and kind == "float" and symmetric and (strategy, size) == ("group", 32):
        return lambda parts: Mxfp4(), 4.25
    raise KTAMXConfigError(
        f"quantization_config: {name} has weights of num_bits={bits}, type={kind!r}, strategy={strategy!r}, "
        f"group_size={size}, symmetric={symmetric}, format={layout!r}, which cannot be read. Give a "
        f"checkpoint in {KNOWN}."
    )


def _group_size(config: Any, field: str) -> int:
    size = get(config, field)
    if not isinstance(size, int) or isinstance(size, bool) or (size != -1 and (size < 8 or size % 8)):
        raise _refused(field, size, "Groups of 8 columns or a multiple, or -1 for whole rows, can be read.")
    return size


def _four_bits(group: int, of_a_group: int) -> float:
    return 4 + of_a_group / (4096 if group == -1 else group)


_METHODS: dict[str, Callable[[Any], tuple[Group, ...]]] = {
    "fp8": _blockwise, "blockwise_int8": _blockwise, "w8a8_int8": _by_rows, "compressed-tensors": _compressed,
    "gptq": _gptq, "awq": _awq, "bitsandbytes": _bitsandbytes, "modelopt": _modelopt, "mxfp4": _mxfp4,
}  # fmt: skip


def _names(module: str, targets: tuple[str, ...]) -> bool:
    """Whether one of compressed-tensors' targets, or another's pattern with stars, is this linear layer."""
    for target in targets:
        if target.startswith("re:"):
            try:
                if re.match(target[3:], module):
                    return True
            except re.error:
                raise _refused("targets", target, "It is no regular expression.") from None
        elif target == "Linear" or module == target or module.endswith(f".{target}"):
            return True
        elif re.match("(.*\\.)?" + re.escape(target).replace(r"\*", ".*") + r"(\.|$)", module):
            return True  # a block of layers, or modelopt's and bitsandbytes' patterns
    return False
