"""`add_weighted_adapter` on a patched model: PEFT combines the linear layers, this module the experts.

PEFT joins adapters along the axes of matrices, which are others in stacked experts: `cat` would fail half-way, `svd`
asks for weights that are packed, and what prunes by the size of entries would compare one expert's with another's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import KTAMXConfigError
from ..experts.layer import kt_layers
from ..experts.projections import ExpertProjection

_SUPPORTED = ("cat", "svd", "linear")


def add_weighted_adapter(
    original: Callable[..., Any],
    tuner: Any,
    adapters: list[str],
    weights: list[float],
    adapter_name: str,
    combination_type: str = "svd",
    **kwargs: Any,
) -> None:
    """Replaces `LoraModel.add_weighted_adapter`: PEFT combines the linear layers, and the experts are combined here.

    Args:
        original: The function that this one stands for.
        tuner: PEFT's, whose method it is.
        adapters: Names of the adapters to combine.
        weights: Of each.
        adapter_name: Of the new adapter.
        combination_type: `cat` (exact), `svd` (the best of its rank) or `linear`.
        **kwargs: The function's other arguments.

    Raises:
        KTAMXConfigError: Another combination_type, svd_clamp, rsLoRA, or a rank the experts are not packed for.
    """
    projections = [projection for layer in kt_layers(tuner.model) for projection in layer.projections]
    concerned = [p for p in projections if any(adapter in p.lora_A for adapter in adapters)]
    if not concerned or adapter_name in tuner.peft_config:
        return original(tuner, adapters, weights, adapter_name, combination_type, **kwargs)
    combination_type = "linear" if len(adapters) == 1 else combination_type
    _check(tuner, adapters, combination_type, kwargs)
    inject = tuner.inject_adapter
    aside: list[tuple[ExpertProjection, nn.Module, nn.Module]] = []

    def inject_and_set_aside(*args: Any, **settings: Any) -> None:
        """The new tensors are there, and out of PEFT's sight, which passes over a layer without them."""
        inject(*args, **settings)
        for projection in projections:
            if adapter_name in projection.lora_A:
                aside.append((projection, projection.lora_A.pop(adapter_name), projection.lora_B.pop(adapter_name)))

    tuner.inject_adapter = inject_and_set_aside
    try:
        original(tuner, adapters, weights, adapter_name, combination_type, **kwargs)
    finally:
        del tuner.inject_adapter
        for projection, a, b in aside:
            projection.lora_A[adapter_name], projection.lora_B[adapter_name] = a, b
    for projection, a, b in aside:
        a.requires_grad_(False)
        b.requires_grad_(False)
        sources, dtype = [], torch.float32
        for name, weight in zip(adapters, weights, strict=True):
            if name in projection.lora_A:
                old_a, old_b = projection.tensors(name)
                dtype = old_a.dtype
                factor = weight * float(projection.scaling[name])
                sources.append((old_a.detach().float(), old_b.detach().float(), factor))
        _fill(*projection.tensors(adapter_name), *_combined(sources, combination_type), dtype)
    return None


def _check(tuner: Any, adapters: list[str], combination_type: str, settings: dict[str, Any]) -> None:
    if combination_type not in _SUPPORTED:
        raise KTAMXConfigError(
            f"combination_type={combination_type!r} is not supported on experts: use {', '.join(_SUPPORTED)}, or make "
            "several adapters active at once (model.base_model.set_adapter([...]))."
        )
    if settings.get("svd_clamp") is not None:
        raise KTAMXConfigError(f"svd_clamp={settings['svd_clamp']!r} is not supported on experts: leave it out.")
    if any(getattr(tuner.peft_config.get(name), "use_rslora", False) for name in adapters):
        raise KTAMXConfigError(
            "add_weighted_adapter of adapters with use_rslora=True is not supported: PEFT would scale the sum by the "
            "root of its rank once more. Make several adapters active at once (model.base_model.set_adapter([...]))."
        )


def _combined(sources: list[tuple[Tensor, Tensor, float]], how: str) -> tuple[Tensor, Tensor]:
    """A [E, r, in] and B [E, out, r] of the sum, from A, B and factor of each."""
    if how == "linear":  # PEFT's rule: the factor's root on either side, its sign on one
        rank = max(a.shape[1] for a, _, _ in sources)
        total_a = sources[0][0].new_zeros(sources[0][0].shape[0], rank, sources[0][0].shape[2])
        total_b = sources[0][1].new_zeros(*sources[0][1].shape[:2], rank)
        for a, b, factor in sources:
            total_a[:, : a.shape[1]] += a * math.copysign(math.sqrt(abs(factor)), factor)
            total_b[:, :, : b.shape[2]] += b * math.sqrt(abs(factor))
        return total_a, total_b
    a = torch.cat([a * factor for a, _, factor in sources], 1)
    b = torch.cat([b for _, b, _ in sources], 2)
    if how == "cat":
        return a, b
    # The product B·A has the rank of the factors, so its decomposition is that of two small triangles.
    qb, rb = torch.linalg.qr(b)
    qa, ra = torch.linalg.qr(a.transpose(1, 2))
    u, s, vh = torch.linalg.svd(rb @ ra.transpose(1, 2), full_matrices=False)
    return vh @ qa.transpose(1, 2), qb @ (u * s.unsqueeze(1))


def _fill(a: nn.Parameter, b: nn.Parameter, new_a: Tensor, new_b: Tensor, dtype: torch.dtype) -> None:
    """Put the sum into A and B, in the dtype of the summed adapters.

    PEFT makes new tensors in the model's dtype, which may be narrower.
    """
    rank = min(a.shape[1], new_a.shape[1])
    more = a.shape[1] - rank
    a.data = nn.functional.pad(new_a[:, :rank], (0, 0, 0, more)).to(a.device, dtype)
    b.data = nn.functional.pad(new_b[:, :, :rank], (0, more)).to(b.device, dtype)
