"""What a model's configuration says of its size, counted on the meta device: no weights, no memory."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from ..bitsandbytes_rest import linear_bytes
from ..checkpoint.quantization import known_quantization
from ..discovery import find_experts, skeleton
from ..lora import linear_targets
from ..placement.assembly import linear_widths
from ..placement.memory_model import inner_bytes
from ..shapes import ALIASES, BF16
from .config.settings import RunKeys
from .targets import lora_targets


@dataclass(frozen=True)
class ModelSizes:
    """Counts of parameters and the lengths that memory depends on.

    Attributes:
        expert_layers: Layers with routed experts, each of `experts` (E), `top_k` (K), `intermediate` (I).
        hidden: H.
        layers: All decoder layers.
        expert_parameters: In routed experts, all layers.
        other_parameters: Everywhere else, experts' biases too: they stay on the GPU where experts are streamed.
        linear_parameters: Of those, in linear layers that `quantization_bit` is for.
        ranks: Processes that the experts are divided among; `experts`, `expert_parameters` and `lora_experts` are then
            of one of them.
        of_host: Processes of a host.
        hosts: Of the run.
        lora_experts: LoRA parameters on experts.
        lora_others: LoRA parameters elsewhere.
        vocabulary: V.
        attention_width: Heads times head size, the larger of keys' and values'.
        kv_width: What a token leaves in the keys and values of a layer, in elements.
        inner_bytes: What a token leaves for backward inside of a layer, outside its routed experts.
        bits: Of a weight of experts on the GPU as it is stored, scales included.
        gated: Whether an expert has a gate: three matrices, two without.
    """

    expert_layers: int
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    layers: int
    expert_parameters: int
    other_parameters: int
    lora_experts: int
    lora_others: int
    vocabulary: int
    attention_width: int
    kv_width: int
    inner_bytes: int = 0
    bits: float = BF16
    linear_parameters: int = 0
    gated: bool = True
    ranks: int = 1
    of_host: int = 1
    hosts: int = 1

    def rest_bytes(self, width: int, keys: RunKeys) -> int:
        """Bytes of the weights outside of routed experts.

        Args:
            width: Of a weight in the model's dtype.
            keys: The run's keys that are not TRL's.
        """
        low = self.linear_parameters if keys.quantization_bit in (4, 8) else 0
        one = linear_bytes(keys.quantization_bit or 8, keys.double_quantization) if low else 0
        return (self.other_parameters - low) * width + int(low * one)

    def of_rank(self, ranks: int, of_host: int | None = None, hosts: int = 1) -> ModelSizes:
        """What one of so many processes holds, each with its part of every layer's experts and their LoRA.

        Args:
            ranks: Processes that the experts are divided among; 1 for a run of one.
            of_host: Processes of a host; None if they are all of one.
            hosts: Of the run.
        """
        return replace(
            self,
            experts=self.experts // ranks,
            expert_parameters=self.expert_parameters // ranks,
            lora_experts=self.lora_experts // ranks,
            ranks=ranks,
            of_host=of_host or ranks,
            hosts=hosts,
        )


def model_sizes(config: Any, keys: RunKeys, model: Any = None) -> ModelSizes:
    """Sizes of the model that `config` describes, with the LoRA that the settings ask for.

    Args:
        config: The model's configuration.
        keys: The run's keys that are not TRL's.
        model: The model of that configuration on the meta device, where there is one already.

    Raises:
        KTAMXModelNotSupportedError: It has no fused experts, or does not tell how many a token is sent to.
    """
    if model is None:
        model = skeleton(config)
    text = config.get_text_config()
    layers = [site.shape for site in find_experts(model, weightless=True)]
    E, top_k, H, I = (  # noqa: E741
        layers[0].num_experts, layers[0].top_k, layers[0].hidden_size, layers[0].intermediate_size,
    )  # fmt: skip
    total = sum(p.numel() for p in model.parameters())
    in_experts = sum(shape.num_weights for shape in layers)
    targets = _target_names(model, keys)
    projections = len(layers[0].projections if targets is None else set(layers[0].projections) & targets)
    others = [m for name, m in _linears(model) if targets is None or name.rsplit(".", 1)[-1] in targets]
    heads = _largest(text, "num_attention_heads")
    head = _largest(text, "head_dim") or H // heads
    latent = getattr(text, "kv_lora_rank", None)
    if latent:
        head = max(text.qk_nope_head_dim + text.qk_rope_head_dim, text.v_head_dim)
    kv = latent + text.qk_rope_head_dim if latent else 2 * head * _largest(text, "num_key_value_heads")
    return ModelSizes(
        expert_layers=len(layers),
        experts=E,
        top_k=top_k,
        hidden=H,
        intermediate=I,
        layers=text.num_hidden_layers,
        expert_parameters=in_experts,
        other_parameters=total - in_experts,
        lora_experts=len(layers) * E * projections * keys.lora_rank * (H + I),
        lora_others=keys.lora_rank * sum(m.in_features + m.out_features for m in others),
        vocabulary=text.vocab_size,
        attention_width=heads * head,
        kv_width=kv,
        inner_bytes=inner_bytes(H, linear_widths(model), text.num_hidden_layers),
        bits=_bits(config, keys.torch_dtype),
        linear_parameters=sum(m.weight.numel() for _, m in _linears(model)),
        gated=layers[0].gate.gated,
    )


def _largest(text: Any, name: str) -> Any:
    """A field's value, the largest of those of layers that differ in it (Gemma 4); None if there is none."""
    layers = getattr(text, "per_layer_config", None) or (text,)
    return max((value for layer in layers if (value := getattr(layer, name, None))), default=None)


def _bits(config: Any, asked: str) -> float:
    """Of a weight of experts on the GPU, as it is stored there."""
    dtype = str(getattr(config, "dtype", None) or "bfloat16") if asked == "auto" else asked
    stored = known_quantization(config)
    return stored.bits if stored and dtype.removeprefix("torch.") == "bfloat16" else BF16


def _target_names(model: Any, keys: RunKeys) -> set[str] | None:
    """The targets' names; None for all."""
    targets, _ = lora_targets(keys.lora_target, {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()})
    if targets == "all":
        return None
    if targets == "all_attention":
        return {name.rsplit(".", 1)[-1] for name, _ in _linears(model) if re.search(r"\w*(attn|attention)\w*\.", name)}
    return {ALIASES.get(name, name) for name in targets}


def _linears(model: Any) -> list[tuple[str, Any]]:
    """What LoRA can be on besides experts: linear layers of the language model but routers and head."""
    return [(name, model.get_submodule(name)) for name in linear_targets(model)]
