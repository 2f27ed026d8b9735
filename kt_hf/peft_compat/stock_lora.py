"""A model that stock PEFT adapted before it is patched: its LoRA on fused experts moves to the patched layers."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..experts.layer import KTExperts
from ..shapes import PROJECTIONS

logger = logging.getLogger(__name__)


@dataclass
class Unwrapped:
    """LoRA that stock PEFT had put on fused experts (`target_parameters`), to be put on the patched ones.

    Attributes:
        model: With the adapters.
        layers: Adapters of each expert layer, in order: adapter name -> parameter name -> (A [E, r, in], B [E, out, r],
            alpha).
    """

    model: Any
    layers: list[dict[str, dict[str, tuple[Tensor, Tensor, float]]]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return any(self.layers)

    def restore(self, experts: list[KTExperts]) -> None:
        """Give each projection the LoRA it had in the fused layer.

        A fused gate_up adapter shares its A between gate and up: both get a copy, so the function is the same, and they
        train apart from then on. An adapter that is still at its start (B zero) starts anew with the config's rank.
        """
        if not self:
            return
        configs = self.model.peft_config
        names = sorted({adapter for layer in self.layers for adapter in layer})
        for adapter in names:
            config = configs[adapter]
            taken = {"gate_up_proj", "down_proj"}
            parameters = [p for p in config.target_parameters or [] if p.rsplit(".", 1)[-1] not in taken]
            config.target_parameters = parameters or None
            for patterns in (config.rank_pattern, config.alpha_pattern):
                for key in [k for k in patterns if "gate_up_proj" in k]:
                    del patterns[key]
            targets = set()
            for layer, saved in zip(experts, self.layers, strict=True):
                targets |= _restore_layer(layer, adapter, saved.get(adapter, {}), config)
            config.target_modules = set(config.target_modules or ()) | targets
            active = self.model.active_adapters
            for layer in experts:
                for projection in layer.projections:
                    projection.set_adapter(list(active), inference_mode=config.inference_mode)
        logger.info("kt_hf: the adapter's LoRA on fused experts was put on gate_proj, up_proj and down_proj.")


def _restore_layer(
    layer: KTExperts, adapter: str, saved: dict[str, tuple[Tensor, Tensor, float]], config: Any
) -> set[str]:
    targets = set()
    inner = layer.shape.intermediate_size
    for name, (a, b, alpha) in saved.items():
        fresh = not bool(b.any())
        halves = {"down_proj": b} if name == "down_proj" else {"gate_proj": b[:, :inner], "up_proj": b[:, inner:]}
        for projection_name, half in halves.items():
            projection = getattr(layer, projection_name)
            rank, weight = (config.r, config.lora_alpha) if fresh else (a.shape[1], alpha)
            projection.update_layer(adapter, rank, weight, config=config, target_name=f"experts.{projection_name}")
            for parameter in projection.tensors(adapter):
                parameter.data = parameter.data.to(a.dtype)
            if not fresh:
                with torch.no_grad():
                    for parameter, value in zip(projection.tensors(adapter), (a, half), strict=True):
                        parameter.copy_(value if layer.share is None else value[layer.share.experts])
                config.rank_pattern[rf".*experts\.{projection_name}"] = rank
                config.alpha_pattern[rf".*experts\.{projection_name}"] = alpha
            targets.add(f"experts.{projection_name}")
    assert targets <= {f"experts.{name}" for name in PROJECTIONS}
    return targets


def unwrap_expert_parameters(model: nn.Module) -> Unwrapped:
    """Take stock PEFT's `ParamWrapper`s off fused experts, keeping their LoRA tensors."""
    from peft.tuners.lora.layer import ParamWrapper

    result = Unwrapped(model)
    modules = dict(model.named_modules())
    for name, module in modules.items():
        parent_name, _, attribute = name.rpartition(".")
        parent = modules.get(parent_name)
        inside = module.get_base_layer() if isinstance(module, ParamWrapper) else module
        is_experts = hasattr(inside, "gate_up_proj") and hasattr(inside, "down_proj")
        if not is_experts or isinstance(parent, ParamWrapper) or parent is None:
            continue
        saved: dict[str, dict[str, tuple[Tensor, Tensor, float]]] = {}
        wrapper = module
        while isinstance(wrapper, ParamWrapper):
            for adapter, rank in wrapper.r.items():
                a, b = wrapper.lora_A[adapter].weight.detach(), wrapper.lora_B[adapter].weight.detach()
                experts = a.shape[0] // rank
                # PEFT's layout: A's rows count experts first, then rank; B's columns rank first, then experts.
                saved.setdefault(adapter, {})[wrapper.parameter_name] = (
                    a.view(experts, rank, -1),
                    b.view(b.shape[0], rank, experts).permute(2, 0, 1),
                    float(wrapper.lora_alpha[adapter]),
                )
            wrapper = wrapper.base_layer
        if module is not inside:
            setattr(parent, attribute, inside)
        result.layers.append(saved)
    return result
