"""Routers that spread tokens as those of a trained, balanced model do.

Routers of random weights send most tokens of deep layers to the same few experts, and experts without tokens are not
streamed: a benchmark of streaming would be flattered. Here each token's experts are drawn, some experts being a few
times as popular as others, once for each layer and number of tokens: a recompute and the next step get the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_DIFFERENT = 8  # layers that are drawn for themselves; the others repeat them
_UNEVEN = 0.4  # deviation of the experts' logits: the most popular of 128 has about 2.5 times its share


class Spread:
    """Replaces what the routers of a model choose; their logits stay (an auxiliary loss sees them).

    Args:
        model: Of transformers, whose routers return (logits, weights [T, K], ids [T, K]).
    """

    def __init__(self, model: nn.Module) -> None:
        self.touched: dict[int, int] = {}
        self._most = 0
        self._drawn: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        routers = [m for m in model.modules() if type(m).__name__.lower().endswith("topkrouter")]
        assert routers, "no router whose choice can be replaced"
        for layer, router in enumerate(routers):
            router.register_forward_hook(self._hook(layer % _DIFFERENT))

    def _hook(self, layer: int) -> Any:
        def replaced(router: Any, _: Any, out: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
            logits, weights, ids = out
            tokens = ids.shape[0]
            if (layer, tokens) not in self._drawn:
                self._drawn[layer, tokens] = self._draw(layer, tokens, logits.shape[1], ids)
            drawn, chosen = self._drawn[layer, tokens]
            return logits, drawn.to(weights.dtype) + 0 * weights, chosen

        return replaced

    def _draw(self, layer: int, tokens: int, experts: int, like: Tensor) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(layer)
        popular = torch.randn(experts, generator=generator) * _UNEVEN
        chance = torch.rand(tokens, experts, generator=generator).clamp_(1e-9)
        scores, ids = (popular - torch.log(-torch.log(chance))).topk(like.shape[1], dim=-1)
        if tokens >= self._most:
            self._most, self.touched[layer] = tokens, int(ids.unique().numel())
        return torch.softmax(scores, -1).to(like.device), ids.to(like.device, like.dtype)

    def describe(self) -> str:
        """Experts touched in the longest forwards, the fewest and the most of a layer."""
        counts = self.touched.values()
        return f"{min(counts)} to {max(counts)}" if counts else "none"
