"""What the experts of a layer take of the GPU: weights, buffers, rows in backward, LoRA. All sizes are bytes."""

from __future__ import annotations

from ..backends.gpu.grouped_mm import ALIGN
from ..backends.gpu.weight_stream import BUFFERS, CHUNK_BYTES
from ..shapes import ExpertShape, expert_bytes
from .tiers import Tiers

# Routing is not even: the rows of a chunk of experts, by those that it would have if it were.
_UNEVEN = 1.5
LEAST_CHUNK = 16 * 2**20  # smaller copies than this are slower (54 GB/s at 16 MB, 46.8 at 1 MB)


def row_work(shape: ExpertShape, tokens: int, fused: bool = True) -> int:
    """Bytes of the rows (a token at one expert) of a layer in backward, all of them at a time (`grouped_mm.gradients`).

    They are most before the gate's derivative: inputs of the rows and gradients of their outputs (4 H), gate and up
    and the gradient that comes from down (6 I), LoRA's share of these (6 I).

    Args:
        shape: Sizes of the layer.
        tokens: Of a forward.
        fused: Whether the derivative is one kernel; PyTorch's operations take 14 I more.
    """
    width = 12 if fused else 26
    return tokens * shape.top_k * (4 * shape.hidden_size + width * shape.intermediate_size)


def streamed_work(shape: ExpertShape, tokens: int, chunk_bytes: int = CHUNK_BYTES, keep_8bit: bool = False) -> int:
    """Bytes of the rows of a streamed layer in backward: those of a chunk of experts, and all rows' results (2 H).

    Args:
        shape: Sizes of the layer.
        tokens: Of a forward.
        chunk_bytes: Of a chunk.
        keep_8bit: Whether experts are streamed in 8 bits.
    """
    part = max(1, chunk_bytes // expert_bytes(shape, keep_8bit)) / shape.num_experts
    return int(2 * tokens * shape.top_k * shape.hidden_size + min(1.0, _UNEVEN * part) * row_work(shape, tokens))


def resident_extra(shape: ExpertShape, tokens: int, keep_8bit: bool = False) -> int:
    """Bytes that backward of a resident layer takes more than that of a streamed one.

    Args:
        shape: Sizes of the layer.
        tokens: Of a forward.
        keep_8bit: Whether experts are streamed in 8 bits.
    """
    return max(0, row_work(shape, tokens) - streamed_work(shape, tokens, keep_8bit=keep_8bit))


def resident_bytes(shape: ExpertShape, tiers: Tiers, layers: int, keep_8bit: bool = False) -> int:
    """Bytes of the experts in the GPU's memory, of all layers; whole layers stay in 8 bits where streamed ones do.

    Args:
        shape: Sizes of a layer.
        tiers: Where experts are.
        layers: How many layers have experts.
        keep_8bit: Whether streamed experts stay in 8 bits.
    """
    E, whole = shape.num_experts, min(tiers.resident_layers, layers)
    some = min(tiers.resident, E) * (layers - whole) * expert_bytes(shape)
    return some + whole * E * expert_bytes(shape, keep_8bit)


def chunk_bytes(room: int, shape: ExpertShape, streamed: int, keep_8bit: bool = False) -> int:
    """Bytes of a chunk of streamed experts: 256 MiB, less where room is short, never too little for streaming.

    Args:
        room: Bytes of the GPU's memory for buffers.
        shape: Sizes of a layer.
        streamed: Experts of a layer that are streamed.
        keep_8bit: Whether they stay in 8 bits.
    """
    one = expert_bytes(shape, keep_8bit)
    fitting = max(room // _chunks(keep_8bit), LEAST_CHUNK)
    return max(one, min(CHUNK_BYTES, fitting, streamed * one))


def buffer_bytes(
    shape: ExpertShape, streamed: int, keep_8bit: bool = False, chunk_bytes: int = CHUNK_BYTES
) -> int:  # fmt: skip
    """Bytes of the GPU's buffers for streamed experts.

    Args:
        shape: Sizes of a layer.
        streamed: Experts of a layer that are streamed.
        keep_8bit: Whether they stay in 8 bits; the buffers then include a chunk in bf16.
        chunk_bytes: Of a chunk.
    """
    one = expert_bytes(shape, keep_8bit)
    return _chunks(keep_8bit) * max(one, min(chunk_bytes, streamed * one)) if streamed else 0


def _chunks(keep_8bit: bool) -> int:
    """Chunks in the buffers; one in bf16 is as large as two of 8 bits."""
    return BUFFERS + 2 if keep_8bit else BUFFERS


def lora_parameters(shape: ExpertShape, rank: int) -> int:
    """Parameters of the LoRA of a layer's experts.

    Args:
        shape: Sizes of the layer.
        rank: LoRA rank.
    """
    return sum(a * b * c for a, b, c in shape.lora_shapes(rank)) if rank else 0


def lora_copy_bytes(shape: ExpertShape, rank: int, experts: int) -> int:
    """Bytes of LoRA as the GPU multiplies it (`grouped_mm.Lora`): bf16, ranks of 8, B of gate and up block-diagonal.

    Args:
        shape: Sizes of the layer.
        rank: LoRA rank.
        experts: Of the layer, that the GPU computes.
    """
    padded = -(-rank // ALIGN) * ALIGN
    return 2 * experts * padded * (3 * shape.hidden_size + 5 * shape.intermediate_size)


def shares_backward(copies: int, free: int | None) -> bool:
    """Whether layers have to share one buffer of backward weights, for a copy for each would not leave memory enough.

    Args:
        copies: Bytes of a copy for each layer, all together.
        free: Bytes of host memory that would be left beside the copies and the packed weights; None if unknown, which
            counts as enough.
    """
    return free is not None and copies > 0.8 * free
