"""Backward of tokens that send a gate below -88, where kt-kernel's operators give NaN.

Their backward computes the sigmoid of a gate pre-activation by an exponential that overflows there (the true derivative
is 0): the token's gradient becomes NaN, and what its experts add to the LoRA gradients of gate_a and up_a is lost.
Everything else stays right, the gradients of gate_b and up_b too. So such tokens are computed again, one at a time, and
what the operators get wrong is put together from what they get right:

    gradient of gate_b = dgate ⊗ (A_gate x)   gives the gradient of the gate pre-activation, dgate [I]; dup likewise
    gradient of gate_a = (B_gateᵀ dgate) ⊗ x
    gradient of x      = W_gateᵀ dgate + A_gateᵀ B_gateᵀ dgate + the same of up

The products with the packed weights are the operators' own: with chosen LoRA values and a token of nearly nothing, gate
g, up u and the gradient of their product v can be set at will, and backward gives W_gateᵀ v (g = 0, u = 2, where
silu(g) = 0 and silu'(g)·u = 1) or 64 W_upᵀ v (g = 64, u = 0).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...errors import KTAMXBackwardError
from ...shapes import ExpertShape
from ..base import Gradients, SavedForward

logger = logging.getLogger(__name__)

# A probing token is this small, so that the packed weights add next to nothing; a power of two, exact in bf16.
_SMALL = 2.0**-20
_GATE_AS_IT_IS = 64.0  # silu(64) = 64 and silu'(64) = 1 in fp32


class SupportsProbing(Protocol):
    """The part of a backend by which `careful_backward` probes its packed weights, with LoRA values of its choice.

    Attributes:
        label: The layer's name, for messages.
        shape: The layer's sizes.
        max_rank: The largest LoRA rank that `set_lora` takes; 0 if the experts were packed without LoRA.
        max_len: The most tokens in a call.
        overflow_noted: Whether this layer's warning has been given; `careful_backward` sets it.

    The methods are those of `kt_hf.backends.base.ExpertsBackend`.
    """

    label: str
    shape: ExpertShape
    max_rank: int
    max_len: int
    overflow_noted: bool

    def set_lora(self, tensors: tuple[Tensor, ...]) -> None:
        """Copy in six LoRA tensors of one rank up to `max_rank`; () switches LoRA off."""

    def lora_copy(self) -> tuple[Tensor, ...]:
        """Copies of the LoRA tensors that are held."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, save: bool) -> tuple[Tensor, SavedForward | None]:
        """Output [T, H], and with `save` what `backward` needs."""

    def backward(self, saved: SavedForward, grad_output: Tensor) -> Gradients:
        """Gradients for the forward that gave `saved`."""


@dataclass
class _Product:
    """A product W_gateᵀ v or W_upᵀ v of one expert, to be added to a token's gradient."""

    row: int
    expert: int
    gate: bool
    v: Tensor  # [I], fp32


def careful_backward(
    backend: SupportsProbing, x: Tensor, ids: Tensor, weights: Tensor, grad_output: Tensor, bad: Tensor
) -> Gradients:
    """Gradients of a forward some of whose tokens have gate pre-activations below -88.

    Costs a forward and backward of all other tokens, one of a single token for each affected one, and a few more.

    Args:
        backend: The layer's backend. It must hold the LoRA values of that forward; it holds them again afterwards.
        x: Hidden states [T, H], bf16, of that forward, as are `ids` and `weights`.
        ids: [T, K] int64, -1 for no expert.
        weights: Routing weights [T, K], fp32.
        grad_output: The gradient of the forward's output [T, H], bf16.
        bad: [T] bool, the affected tokens.

    Returns:
        Gradients of all tokens on the CPU, those of hidden states in bf16, those of LoRA in fp32.

    Raises:
        KTAMXBackwardError: The experts were packed without LoRA.
    """
    if not backend.max_rank:
        raise KTAMXBackwardError(
            f"{backend.label}: {int(bad.sum())} tokens have a gate pre-activation below -87, and experts packed with "
            "kt_lora_rank=0 cannot compute their gradient. Pack with kt_lora_rank=1, or use kt_backend=torch."
        )
    if not backend.overflow_noted:
        backend.overflow_noted = True
        logger.warning(
            "%s: %d of %d tokens have a gate pre-activation below -87; they are computed apart, which is slower "
            "(told once a layer).", backend.label, int(bad.sum()), len(bad),
        )  # fmt: skip
    held = backend.lora_copy()
    try:
        hidden, grad_weights, lora = _others(backend, x, ids, weights, grad_output, bad)
        products: list[_Product] = []
        for row in bad.nonzero().flatten().tolist():
            one = slice(row, row + 1)
            products += _one_token(backend, held, row, x[one], ids[one], weights[one], grad_output[one],
                                   hidden, grad_weights, lora)  # fmt: skip
        _add_products(backend, products, hidden)
    finally:
        backend.set_lora(held)
    return Gradients(hidden.to(x.dtype), grad_weights, tuple(lora) if held else ())


def _others(
    backend: SupportsProbing, x: Tensor, ids: Tensor, weights: Tensor, grad_output: Tensor, bad: Tensor
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Gradients of the tokens that are not bad, zeros for the bad: hidden [T, H] fp32, weights [T, K], LoRA fp32."""
    ids = torch.where(bad[:, None], -1, ids)
    _, saved = backend.forward(x, ids, weights, save=True)
    assert saved is not None
    gradients = backend.backward(saved, grad_output)
    return gradients.hidden_states.float(), gradients.top_k_weights, [t.float() for t in gradients.lora]


def _one_token(
    backend: SupportsProbing, held: tuple[Tensor, ...], row: int, x: Tensor, ids: Tensor, weights: Tensor,
    grad_output: Tensor, hidden: Tensor, grad_weights: Tensor, lora: list[Tensor],
) -> list[_Product]:  # fmt: skip
    """Add the gradients of one token [1, H], except for the products with packed weights, which are returned."""
    experts = sorted({e for e in ids.flatten().tolist() if e >= 0})
    wide = x[0].float()
    zeros = tuple(torch.zeros(size, dtype=torch.bfloat16, device="cpu") for size in backend.shape.lora_shapes(1))
    values, probes = tuple(t.clone() for t in held or zeros), set()
    for expert in experts:
        for a in (0, 2):
            if not (values[a][expert].float() @ wide).any():
                # LoRA adds nothing to this projection (it has none, or it is switched off): probe by another A, B = 0.
                probes.add((a, expert))
                values[a][expert, 0] = (x[0] / wide.square().sum()).to(torch.bfloat16)
                values[a + 1][expert, :, 0] = 0
    if probes:
        backend.set_lora(values)
    _, saved = backend.forward(x, ids, weights, save=True)
    assert saved is not None
    gradients = backend.backward(saved, grad_output)
    grad_weights[row] = gradients.top_k_weights[0]
    products: list[_Product] = []
    for expert in experts:
        for a in (0, 2):
            inner = values[a][expert].float() @ wide  # A x, [r]
            at = int(inner.abs().argmax())
            v = gradients.lora[a + 1][expert, :, at].float() / inner[at]
            products.append(_Product(row, expert, a == 0, v))
            if not held:
                continue
            through = held[a + 1][expert].float().T @ v  # Bᵀ v, [r]
            hidden[row] += held[a][expert].float().T @ through
            lora[a][expert] += through[:, None] * wide
            if (a, expert) not in probes:
                lora[a + 1][expert] += gradients.lora[a + 1][expert]
        if held:
            for index in (4, 5):
                lora[index][expert] += gradients.lora[index][expert]
    if probes:
        backend.set_lora(held)
    return products


def _add_products(backend: SupportsProbing, products: list[_Product], hidden: Tensor) -> None:
    """Compute the products and add each to its row of hidden [T, H].

    A run of the operators computes as many products of an expert as there are LoRA ranks.
    """
    left = [product for product in products if product.v.any()]
    while left:
        slots: dict[int, int] = {}
        now: list[tuple[_Product, int]] = []
        later: list[_Product] = []
        for product in left:
            slot = slots.get(product.expert, 0)
            if slot < backend.max_rank and len(now) < backend.max_len:
                slots[product.expert] = slot + 1
                now.append((product, slot))
            else:
                later.append(product)
        # LoRA answers in the coordinates that hold the probing tokens: two runs, each for what the other spoils.
        first, second = _computed(backend, now, (0, 1)), _computed(backend, now, (2, 3))
        first[:, :2] = second[:, :2]
        for (product, _), value in zip(now, first, strict=True):
            hidden[product.row] += value
        left = later


def _computed(backend: SupportsProbing, products: list[tuple[_Product, int]], at: tuple[int, int]) -> Tensor:
    """[n, H] fp32: the values of the products, wrong in the two coordinates `at`."""
    shape, rank = backend.shape, max(slot for _, slot in products) + 1
    gate_a, gate_b, up_a, up_b, down_a, down_b = (
        torch.zeros(size, dtype=torch.bfloat16, device="cpu") for size in shape.lora_shapes(rank)
    )
    n, H, K = len(products), shape.hidden_size, shape.top_k
    x, grad_output = torch.zeros(n, H, device="cpu"), torch.zeros(n, H, device="cpu")
    ids = torch.full((n, K), -1, device="cpu")
    scales = torch.empty(n, 1, device="cpu")
    up_a[:, 0, at[0]] = gate_a[:, 0, at[1]] = 1 / _SMALL
    up_b[:, :, 0], gate_b[:, :, 0] = 2.0, _GATE_AS_IT_IS
    for i, (product, slot) in enumerate(products):
        x[i, at[0] if product.gate else at[1]] = _SMALL
        ids[i, 0] = product.expert
        largest = product.v.abs().max()
        down_a[product.expert, slot] = (product.v / largest).to(torch.bfloat16)
        down_b[product.expert, slot, slot] = 1 / _SMALL
        grad_output[i, slot] = _SMALL
        scales[i] = largest / (1 if product.gate else _GATE_AS_IT_IS)
    backend.set_lora((gate_a, gate_b, up_a, up_b, down_a, down_b))
    _, saved = backend.forward(x.to(torch.bfloat16), ids, torch.ones(n, K, device="cpu"), save=True)
    assert saved is not None
    return backend.backward(saved, grad_output.to(torch.bfloat16)).hidden_states.float() * scales
