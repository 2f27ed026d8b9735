"""What the experts of a layer take of the GPU: weights, buffers, rows in backward, LoRA. All sizes are bytes."""

from __future__ import annotations

from ..backends.gpu.grouped_mm import ALIGN
from ..backends.gpu.weight_stream import BUFFERS, CHUNK_BYTES
from ..shapes import BF16, ExpertShape, expert_bytes
from .tiers import Tiers

# Routing is not even: the rows of a chunk of experts, by those that it would have if it were.
_UNEVEN = 1.5
LEAST_CHUNK = 16 * 2**20  # smaller copies than this are slower (54 GB/s at 16 MB, 46.8 at 1 MB)


def row_work(shape: ExpertShape, tokens: int, fused: bool = True) -> int:
    """Bytes of the rows (a token at one expert) of a layer in backward, all of them at a time (`grouped_mm.gradients`).

    They are most before the gate's derivative: inputs of the rows and gradients of their outputs (4 H), gate and up
    and the gradient that comes from down (6 I), LoRA's share of these (6 I); without a gate 4 I each.

    Args:
        shape: Sizes of the layer.
        tokens: Of a forward.
        fused: Whether the derivative is one kernel; PyTorch's operations take 14 I more, 16 I without a gate.
    """
    in_parts = 14 if shape.gate.gated else 16
    width = 4 * (shape.gate.halves + 1) + (0 if fused else in_parts)
    return tokens * shape.top_k * (4 * shape.hidden_size + width * shape.intermediate_size)


def widest_chunk(bits: float = BF16) -> int:
    """Bytes of a chunk in bf16, at most: low bits cross the bus faster, and small chunks would leave launches to wait.

    A layer of Qwen3-30B is one chunk then, which needs no rows counted on the host: 12 of them in int4, 2,048 tokens,
    took 0.37 s a step streamed by halves of a GB, where stock takes 0.22 on an H200 and the bus 0.15.

    Args:
        bits: Of a weight of experts on the GPU as it is stored, scales included.
    """
    return CHUNK_BYTES if bits >= BF16 else 5 * CHUNK_BYTES


def streamed_work(shape: ExpertShape, tokens: int, chunk_bytes: int | None = None, bits: float = BF16) -> int:
    """Bytes of the rows of a streamed layer in backward: those of a chunk of experts, and all rows' results (2 H).

    Args:
        shape: Sizes of the layer.
        tokens: Of a forward.
        chunk_bytes: Of a chunk in bf16; None for the widest.
        bits: Of a weight of experts on the GPU as it is stored, scales included.
    """
    part = max(1, (chunk_bytes or widest_chunk(bits)) // expert_bytes(shape)) / shape.num_experts
    return int(2 * tokens * shape.top_k * shape.hidden_size + min(1.0, _UNEVEN * part) * row_work(shape, tokens))


def resident_extra(shape: ExpertShape, tokens: int, bits: float = BF16) -> int:
    """Bytes that backward of a resident layer takes more than that of a streamed one; of low bits both come in chunks.

    Args:
        shape: Sizes of the layer.
        tokens: Of a forward.
        bits: Of a weight of experts on the GPU as it is stored, scales included.
    """
    return max(0, row_work(shape, tokens) - streamed_work(shape, tokens)) if bits >= BF16 else 0


def resident_bytes(shape: ExpertShape, tiers: Tiers, layers: int, bits: float = BF16) -> int:
    """Bytes of the experts in the GPU's memory, of all layers.

    Args:
        shape: Sizes of a layer.
        tiers: Where experts are.
        layers: How many layers have experts.
        bits: Of a weight of experts on the GPU as it is stored, scales included.
    """
    E, whole = shape.num_experts, min(tiers.resident_layers, layers)
    return (min(tiers.resident, E) * (layers - whole) + whole * E) * expert_bytes(shape, bits)


def chunk_bytes(room: int, shape: ExpertShape, experts: int, bits: float = BF16, copied: bool = True) -> int:
    """Bytes of a chunk of experts in bf16: less than the widest where room is short, never too little.

    Args:
        room: Bytes of the GPU's memory for buffers.
        shape: Sizes of a layer.
        experts: Of a layer, that come in chunks.
        bits: Of a weight of experts on the GPU as it is stored, scales included.
        copied: Whether they are streamed, and not resident in low bits.
    """
    one = expert_bytes(shape)
    fitting = max(int(room / (_chunks(bits) if copied else 1)), int(LEAST_CHUNK * BF16 / bits))
    return max(one, min(widest_chunk(bits), fitting, experts * one))


def buffer_bytes(
    shape: ExpertShape, streamed: int, bits: float = BF16, chunk_bytes: int | None = None, resident: bool = False
) -> int:  # fmt: skip
    """Bytes of the GPU's buffers for experts: chunks on their way, and one that is widened from low bits.

    Args:
        shape: Sizes of a layer.
        streamed: Experts of a layer that are streamed.
        bits: Of a weight of experts on the GPU as it is stored, scales included.
        chunk_bytes: Of a chunk in bf16; None for the widest.
        resident: Whether experts are resident: those of low bits are widened too.
    """
    one, widest = expert_bytes(shape), chunk_bytes or widest_chunk(bits)
    if streamed:
        return int(_chunks(bits) * max(one, min(widest, streamed * one)))
    return max(one, min(widest, shape.num_experts * one)) if resident and bits < BF16 else 0


def _chunks(bits: float) -> float:
    """Size of the buffers, in chunks of bf16: those on their way as they are stored, and a widened one."""
    return BUFFERS if bits >= BF16 else BUFFERS * bits / BF16 + 1


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
    padded, halves = -(-rank // ALIGN) * ALIGN, shape.gate.halves
    of_hidden, of_intermediate = halves + 1, halves**2 + 1  # A of gate and up side by side, B block-diagonal; down's
    return 2 * experts * padded * (of_hidden * shape.hidden_size + of_intermediate * shape.intermediate_size)


def shares_backward(copies: int, free: int | None) -> bool:
    """Whether layers have to share one buffer of backward weights, for a copy for each would not leave memory enough.

    Args:
        copies: Bytes of a copy for each layer, all together.
        free: Bytes of host memory that would be left beside the copies and the packed weights; None if unknown, which
            counts as enough.
    """
    return free is not None and copies > 0.8 * free
