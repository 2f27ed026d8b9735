"""What a step of training takes of the GPU's memory: pure functions of sizes, for the planner, `estimate` and `bench`.

A step is at its peak at one of three moments: at the loss, when all layers' activations are there; when backward
begins, at the last layer, which is computed again if it is checkpointed; or when backward ends, at the first layer,
when all gradients are there. What is there at each was counted from the live tensors of the code (tests/placement/
test_memory_model.py counts them again) and compared with peaks measured on an H100.

Sizes are by token: H is the hidden size, I an expert's intermediate size, K the experts of a token. "Bytes" are those
of PyTorch's tensors: the CUDA context and what its caching allocator loses to fragments come on top.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from ..shapes import BF16, ExpertShape
from ..system.gpu import segments_grow
from .expert_memory import (
    buffer_bytes,
    chunk_bytes,
    lora_copy_bytes,
    lora_parameters,
    resident_bytes,
    row_work,
    streamed_work,
)
from .tiers import Tiers

# How logits become a loss. `chunked`: TRL's SFTTrainer and DPOTrainer since 1.16 (`ChunkedLogProbFunction`): a tile of
# logits at a time, forward and again backward. `full`: any trainer that has the model compute its loss.
Loss = Literal["chunked", "full"]
LOSSES: tuple[str, ...] = get_args(Loss)
_TILE = 4096, 32_768  # tokens and logits of a tile
# A logit of ForCausalLMLoss: 10 when the loss is there (bf16, fp32, its logarithm of probability), 12 in backward
# (that logarithm, its gradient, the logit's gradient), and the bf16 logits if the caller keeps the model's output.
_FULL = 14
_MASTER = 12  # bytes of a LoRA parameter: itself and Adam's two moments, in fp32
_GRADIENT = 4
_RESERVE = 0.1  # of the free memory, not to be planned with: fragments, libraries
# Of what comes and goes in a step: so much more PyTorch's allocator holds in fragments, where its segments grow and
# where they do not. 12 layers of Qwen3-30B on an H200, 32,768 tokens, GB: 15.4 of tensors, half of which comes and
# goes, were 15.9 and 18.8. What cannot leave the GPU in a run, as layers can, has to leave room for it: 48 layers and
# 16,384 tokens ran out of memory with LoRA in it, and 94 of Qwen3-235B, on 24 GB, with the activations of 20 layers.
# Kept activations and chunks are planned with the larger part wherever they run: they have no other reserve.
_GROWING, FRAGMENTS = 0.1, 0.3
_PASSING = "activations", "activations of experts", "logits and loss"
_SMALLER = 0.8  # a chunk that is tried after one that has no room
_STASH = 5  # activations that TRL's activation_offloading keeps on the GPU, on their way


@dataclass(frozen=True)
class MemoryBudget:
    """Everything but expert weights that must fit on the GPU.

    Attributes:
        tokens: Tokens of a forward in training; None if unknown. With DPO chosen and rejected ones count.
        rest_bytes: Bytes of the model's weights outside the experts, as far as they are not on the GPU yet.
        layers: Decoder layers of the model, with experts or without.
        vocabulary: Logits of a token.
        dtype: The experts' dtype; None for bf16.
        lora_rank: Rank of the experts' LoRA if its parameters and their optimizer are on the GPU, else 0.
        lora_layers: Layers of which that is so; None for all of them.
        bits: Of a weight of experts on the GPU as it is stored, scales included.
        computed_rank: Rank of the experts' LoRA if it is on the CPU and the GPU has a copy in bf16 to multiply with;
            that of a LoRA on the GPU (`lora_rank`) need not be given.
        other_lora: LoRA parameters outside the experts.
        inner_bytes: That a token leaves for backward inside of a layer, outside its experts; 0 for 40 H.
        loss: How logits become a loss: "chunked" or "full".
        checkpointing: Whether layers are computed again in backward.
        offloading: Whether what is kept for backward is moved to host memory (`activation_offloading` of TRL).
        retained: Layers whose experts' inputs and outputs are kept for the recompute; None for all.
        accumulating: Whether gradients of earlier micro-batches are there in a forward.
    """

    tokens: int | None = None
    rest_bytes: int = 0
    layers: int = 0
    vocabulary: int = 0
    dtype: torch.dtype | None = None
    lora_rank: int = 0
    lora_layers: int | None = None
    bits: float = BF16
    computed_rank: int = 0
    other_lora: int = 0
    inner_bytes: int = 0
    loss: Loss = "full"
    checkpointing: bool = True
    offloading: bool = False
    retained: int | None = None
    accumulating: bool = False

    def free_for_experts(self, free: int, tokens: int, shape: ExpertShape) -> int:
        """Bytes that experts' weights and the buffers of streamed ones may take on the GPU; 0 if there is no room.

        A tenth of the free memory is left, and room for the activations of streamed experts. Those of resident ones
        take `resident_extra` more.

        Args:
            free: Bytes that are free on the GPU.
            tokens: Of a forward.
            shape: Sizes of a layer.
        """
        streamed = Tiers(0, shape.num_experts)
        taken = gpu_memory(self, shape, self.layers, tokens, streamed)
        return max(0, room_for(free) - taken.total + buffer_bytes(shape, shape.num_experts, self.bits))


@dataclass(frozen=True)
class GpuMemory:
    """What is in the GPU's memory when most is.

    Attributes:
        moment: When that is: "at the loss", "as backward begins" or "as backward ends".
        parts: Bytes by what takes them.
    """

    moment: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self.parts.values())


def gpu_memory(
    budget: MemoryBudget,
    shape: ExpertShape,
    expert_layers: int,
    tokens: int,
    tiers: Tiers,
    chunk_bytes: int | None = None,
    fragments: float = 0.0,
) -> GpuMemory:
    """What a step takes of the GPU's memory at its peak.

    Args:
        budget: The model outside of the experts, and how it is trained.
        shape: Sizes of a layer.
        expert_layers: How many layers have experts.
        tokens: Of a forward.
        tiers: Where experts are.
        chunk_bytes: Of a chunk of experts in bf16; None for the widest.
        fragments: Part of what comes and goes within a step that PyTorch's allocator takes beside it.
    """
    H, E = shape.hidden_size, shape.num_experts
    with_lora = expert_layers if budget.lora_layers is None else min(budget.lora_layers, expert_layers)
    masters = lora_parameters(shape, budget.lora_rank) * with_lora
    streamed = tiers.streamed if tiers.resident_layers < expert_layers else 0
    inside = tokens * (budget.inner_bytes or 40 * H)
    work = _expert_work(shape, tokens, tiers, expert_layers, chunk_bytes, budget)
    kept, of_one = _kept(budget, shape, expert_layers, tokens, tiers)
    always = {
        "attention, embeddings and the rest": budget.rest_bytes,
        "experts": resident_bytes(shape, tiers, expert_layers, budget.bits),
        "buffers of experts": buffer_bytes(shape, min(streamed, E), budget.bits, chunk_bytes, tiers.need_gpu),
        "LoRA of experts, as it is multiplied": _copies(budget, shape, tiers) * expert_layers,
    }
    lora = {"LoRA of experts and its optimizer": masters, "LoRA of the rest and its optimizer": budget.other_lora}
    before = {name: count * (_MASTER + _GRADIENT * budget.accumulating) for name, count in lora.items()}
    after = {name: count * (_MASTER + _GRADIENT) for name, count in lora.items()}
    again = inside if budget.checkpointing or budget.offloading else 0
    moments = {
        "at the loss": before | {"activations": kept, "logits and loss": _loss(budget, tokens, H)},
        "as backward begins": before | {"activations": kept + again, "activations of experts": work},
        "as backward ends": after | {"activations": of_one + inside, "activations of experts": work},
    }
    for parts in moments.values():
        parts["fragments"] = int(fragments * sum(parts.get(part, 0) for part in _PASSING))
    peaks = [GpuMemory(name, {part: n for part, n in (always | parts).items() if n}) for name, parts in moments.items()]
    return max(peaks, key=lambda peak: peak.total)


def fragments() -> float:
    """Part of what comes and goes within a step that PyTorch's allocator takes beside it in this process."""
    return _GROWING if segments_grow() else FRAGMENTS


def most_resident_layers(
    budget: MemoryBudget, shape: ExpertShape, expert_layers: int, tokens: int, free: int, reserve: float = _RESERVE
) -> int:
    """How many whole layers have room on the GPU while the others are streamed.

    Args:
        budget: The model outside of the experts, and how it is trained.
        shape: Sizes of a layer.
        expert_layers: How many layers have experts.
        tokens: Of a forward.
        free: Bytes that are free on the GPU.
        reserve: The part of them that is left free.
    """

    def fits(whole: int) -> bool:
        tiers = Tiers(0, shape.num_experts, whole)
        return gpu_memory(budget, shape, expert_layers, tokens, tiers).total <= (1 - reserve) * free

    return max(filter(fits, range(1, expert_layers + 1)), default=0)


def room_for(free: int) -> int:
    """Bytes of the GPU's memory that may be planned with.

    Args:
        free: Bytes that are free on the GPU.
    """
    return int((1 - _RESERVE) * free)


def fitting_chunk(
    budget: MemoryBudget, shape: ExpertShape, expert_layers: int, tokens: int, tiers: Tiers, free: int
) -> int:
    """Bytes of a chunk of experts, in bf16, for which there is room beside everything else.

    Full logits are left out of account: buffers are no larger than 0.8 GB, and too small ones make each step slower.

    Args:
        budget: The model outside of the experts, and how it is trained.
        shape: Sizes of a layer.
        expert_layers: How many layers have experts.
        tokens: Of a forward.
        tiers: Where experts are.
        free: Bytes that are free on the GPU.
    """
    without_logits, copied = replace(budget, loss="chunked"), tiers.streamed > 0
    widened = tiers.resident if budget.bits < BF16 else 0
    experts = min(max(tiers.streamed, widened), shape.num_experts)
    least, chunk = (chunk_bytes(room, shape, experts, budget.bits, copied) for room in (0, free))

    def fits(chunk: int) -> bool:
        taken = gpu_memory(without_logits, shape, expert_layers, tokens, tiers, chunk, FRAGMENTS).total
        return taken <= free

    while chunk > least and not fits(chunk):
        chunk = max(least, int(_SMALLER * chunk))
    return chunk


def _kept(budget: MemoryBudget, shape: ExpertShape, expert_layers: int, tokens: int, tiers: Tiers) -> tuple[int, int]:
    """Bytes that all layers keep from their forward for backward, and those of one of them.

    Experts keep the order of the rows beside their input (8 + 8 + 1 + 4 bytes a row, and ids and weights). Where ranks
    divide them, other ranks' inputs come again with the gradients.
    """
    H = shape.hidden_size
    rows = 33 * shape.top_k if tiers.need_gpu else 0
    in_experts = 4 * H + rows
    retained = expert_layers if budget.retained is None else min(budget.retained, expert_layers)
    in_layer = 2 * H if budget.checkpointing else budget.inner_bytes or 40 * H
    layers = min(_STASH, budget.layers) if budget.offloading else budget.layers
    # What is offloaded are tensors saved by autograd; experts keep theirs themselves.
    return tokens * (in_layer * layers + in_experts * retained), tokens * (2 * H + in_experts)


def _expert_work(
    shape: ExpertShape, tokens: int, tiers: Tiers, expert_layers: int, chunk_bytes: int | None, budget: MemoryBudget
) -> int:
    """Bytes that backward of one layer's experts takes on the GPU besides their weights."""
    H, lora = shape.hidden_size, _copies(budget, shape, tiers)
    if not tiers.need_gpu:
        return 6 * tokens * H  # on their way to the CPU and back
    whole = row_work(shape, tokens) + lora
    if (tiers.resident or tiers.resident_layers) and budget.bits >= BF16:
        return whole
    return streamed_work(shape, tokens, chunk_bytes, budget.bits) + 2 * lora


def _copies(budget: MemoryBudget, shape: ExpertShape, tiers: Tiers) -> int:
    """Bytes of a layer's LoRA as the GPU multiplies it."""
    on_gpu = shape.num_experts if tiers.resident_layers else min(shape.num_experts, tiers.on_gpu)
    return lora_copy_bytes(shape, budget.lora_rank or budget.computed_rank, on_gpu)


def _loss(budget: MemoryBudget, tokens: int, hidden: int) -> int:
    """Bytes of logits and all that becomes of them, and of the hidden states that they are computed from."""
    if budget.loss == "full":
        return _FULL * tokens * budget.vocabulary
    # A tile; hidden states that have a label (bf16), and their gradient in fp32 and bf16.
    return 2 * min(tokens, _TILE[0]) * min(budget.vocabulary, _TILE[1]) + 8 * tokens * hidden


def inner_bytes(hidden: int, linears: Iterable[tuple[int, int]], layers: int) -> int:
    """Bytes that a token leaves for backward inside of a layer, outside its experts, if attention keeps no scores.

    Norms keep fp32 copies of hidden states; a linear layer with LoRA its input in fp32 and bf16, if it is none that
    others keep (6 bytes), and its output in bf16 as it is and as rotated or activated (4).

    Args:
        hidden: H.
        linears: Inputs and outputs of all linear layers outside of experts and head.
        layers: How many layers they belong to.
    """
    widths = sum(6 * (a != hidden) * a + 4 * (b != hidden) * b for a, b in linears)
    return 20 * hidden + widths // max(layers, 1)
