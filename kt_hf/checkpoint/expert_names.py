"""Names of experts' tensors in checkpoints: which layer, expert, projection and part of the weight each one is."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..shapes import ALIASES

# What a linear layer's weight may consist of, by the names that follow the layer's own.
_PARTS = (
    "weight", "weight_scale_inv", "weight_scale", "scale",  # 8 bits; DeepSeek-V4
    "weight_packed", "weight_shape", "weight_zero_point", "weight_g_idx", "weight_global_scale",  # compressed-tensors
    "weight_scale_2", "qweight", "qzeros", "scales", "g_idx", "blocks", "bias",  # modelopt, GPTQ, AWQ, gpt-oss
    r"weight\.(?:absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__\w+)",
)  # fmt: skip
# Of activations and caches, which are not quantized here.
_OF_ACTIVATIONS = ("input_scale", "input_global_scale", "input_zero_point", "output_scale", "k_scale", "v_scale")
_PART = "|".join((*_PARTS, *_OF_ACTIVATIONS))
_ONE_EXPERT = re.compile(rf"(.*\bexperts)\.(\d{{1,9}})\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.({_PART})")
_FUSED = re.compile(rf"(.*\bexperts)\.(gate_up_proj|down_proj)(?:[._]({_PART}|scale_inv))?")
_OTHER = re.compile(r"(.*\bexperts)\.(.*)")
_LINEAR = re.compile(rf"(.*?)\.({_PART})")
# A checkpoint may hold the model without its head, or call the block that has the experts as its authors did.
_ROOT = re.compile(r"^(?:(?:model|language_model|text_model|transformer|backbone)\.)*")
_BLOCK = re.compile(r"\.(?:mlp|block_sparse_moe|feed_forward|ffn|moe|mixer)\.experts$")


@dataclass(frozen=True)
class ExpertName:
    """What a tensor of the experts is.

    Attributes:
        layer: Name of the experts module in the checkpoint.
        expert: Its number; None for a stack of all experts.
        projection: gate_proj, up_proj, down_proj or gate_up_proj; "" for what is not known.
        part: Of the weight.
    """

    layer: str
    expert: int | None = None
    projection: str = ""
    part: str = ""


def expert_name(name: str) -> ExpertName | None:
    """What the tensor is by its name; None if it is not of routed experts' weights."""
    one, stack = _ONE_EXPERT.fullmatch(name), _FUSED.fullmatch(name)
    if one:
        known = ExpertName(one[1], int(one[2]), ALIASES.get(one[3], one[3]), one[4])
    elif stack:
        # transformers names the scales of a stack gate_up_proj_scale_inv
        part = {None: "weight", "scale": "weight_scale", "scale_inv": "weight_scale_inv"}.get(stack[3], stack[3])
        known = ExpertName(stack[1], None, stack[2], str(part))
    else:
        other = _OTHER.fullmatch(name)
        return ExpertName(other[1]) if other else None
    return None if known.part in _OF_ACTIVATIONS else known


def linear_name(name: str) -> tuple[str, str] | None:
    """(layer, part of its weight) of a tensor outside of the routed experts; None if it is a plain parameter."""
    match = _LINEAR.fullmatch(name)
    return (match[1], match[2]) if match else None


def of_activations(part: str) -> bool:
    """Whether this part of a linear layer says how activations or caches are quantized, not its weight."""
    return part in _OF_ACTIVATIONS


def plain_name(layer: str) -> str:
    """The name of an experts module without what checkpoints and models of one family differ in."""
    return _BLOCK.sub(".experts", _ROOT.sub("", layer))
