"""`KTExperts` for models that call their experts otherwise than with a token's hidden state, ids and weights.

Each brings the call to the usual one and back by operations that autograd knows, so every backend computes it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import KTAMXForwardError
from ..ranks import Kind
from .input_checks import check_inputs
from .layer import KTExperts
from .listed import ListedExperts


class IdentityExperts(KTExperts):
    """Experts of which those with an id from E on give the token itself, as LongCat-Flash's "zero experts" do."""

    @torch.compiler.disable
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As `KTExperts.forward`; ids from E on add their routing weight times the hidden state."""
        out = super().forward(hidden_states, top_k_index, top_k_weights)
        of_itself = top_k_weights.masked_fill(top_k_index < self.shape.num_experts, 0).sum(1, keepdim=True)
        return out + (hidden_states * of_itself).to(out.dtype)


class NormedExperts(KTExperts):
    """Experts whose outputs go through a norm, one by one, before they are weighted, as Muse-Spark's do.

    Args:
        *args: Of `KTExperts`.
        post_expert_norm: The model's module, from [N, H] to [N, H].
    """

    def __init__(self, *args: Any, post_expert_norm: nn.Module) -> None:
        super().__init__(*args)
        self.post_expert_norm = post_expert_norm

    @torch.compiler.disable
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As `KTExperts.forward`. The T*K outputs are in memory one by one, and the norm's inputs for its backward."""
        with self.telling(Kind.TOKENS):
            check_inputs(self.label, self.shape, hidden_states, top_k_index, top_k_weights)
        (T, K), E = top_k_index.shape, self.shape.num_experts
        one = torch.ones_like(top_k_weights).detach().reshape(-1, 1)
        each = super().forward(hidden_states.repeat_interleave(K, 0), top_k_index.reshape(-1, 1), one)
        weights = top_k_weights.masked_fill((top_k_index < 0) | (top_k_index >= E), 0).unsqueeze(2)
        return (self.post_expert_norm(each).view(T, K, -1) * weights).to(each.dtype).sum(1, dtype=each.dtype)


class BatchedExperts(KTExperts):
    """Experts that get a batch of sequences as it is, as DBRX's do."""

    @torch.compiler.disable
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As `KTExperts.forward`, with hidden states [..., H], of whose tokens the ids are in order."""
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        return super().forward(flat, top_k_index, top_k_weights).view(hidden_states.shape)


class SlicedExperts(KTExperts):
    """Experts that get a slice of T rows each, zero but for those of their own tokens, as Llama 4's do.

    The router has scaled the rows already. A row of zeros gives zeros and has no gradient, so that at most K rows of a
    token are computed, as in other models.
    """

    @torch.compiler.disable
    def forward(self, slices: Tensor) -> Tensor:
        """What each row's expert gives.

        Args:
            slices: [E*T, H], floating: the rows for the first expert, then those for the second, and so on.

        Returns:
            [E*T, H] in the same dtype.

        Raises:
            KTAMXForwardError: Another shape or dtype, or an output that is not finite.
        """
        E, K = self.shape.num_experts, self.shape.top_k
        with self.telling(Kind.TOKENS):
            if slices.dim() != 2 or slices.shape[0] % E:
                raise KTAMXForwardError(f"{self.label}: rows are {tuple(slices.shape)}; they must be [{E} T, H].")
        T = slices.shape[0] // E
        rows = slices.detach().reshape(E, T, slices.shape[1]).any(2).int()
        hit, expert = rows.topk(min(K, E), dim=0)
        at = (expert * T + torch.arange(T, device=slices.device)).reshape(-1)
        ids = expert.masked_fill(hit == 0, -1).reshape(-1, 1)
        out = super().forward(slices.index_select(0, at), ids, torch.ones_like(ids, dtype=slices.dtype))
        return torch.zeros_like(slices).index_copy(0, at, out)


BY_CALL: dict[str, type[KTExperts]] = {
    "routed": KTExperts, "identity": IdentityExperts, "normed": NormedExperts, "batched": BatchedExperts,
    "sliced": SlicedExperts, "listed": ListedExperts,
}  # fmt: skip
