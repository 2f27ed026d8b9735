"""kt-kernel's operator classes, one for each arithmetic: what they demand and in what they differ."""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch

from ...errors import KTAMXConfigError
from ...shapes import ExpertShape
from ..packed import Code, PackedMatrices

# What the operators reserve, in bytes for each token of their length, expert of a token, and element of H + I: 11.7 to
# 14.9 on the shapes of four models. Address space, not memory: pages are used as far as batches are long.
_RESERVED = 16


@dataclass(frozen=True)
class Operators:
    """One of kt-kernel's classes of SFT operators.

    Attributes:
        name: The value of `kt_backend` that selects it.
        class_name: Its name in `kt_kernel_ext.moe`.
        multiple: H, and I after the split over pools, must be multiples of this. BF16 does not check it, it crashes.
        bytes_per_weight: Memory of a weight, packed once: 2, 1 or 0.5 bytes without its scales; of those with a `code`
            as measured, scales and all that loading allocates included.
        bytes_on_avx2: The same in kt-kernel's AVX2 variant, where it is other memory; None where it is not.
        clears_gradients: Whether backward overwrites the LoRA gradient buffers; else it adds to some of them.
        saved_as: What names of saved files begin with; None where the weights cannot be saved packed.
        code: What weights must be packed in (`kt_hf.backends.packed`) before they get them; None for bf16.
        block: Of those with a `code`: rows and columns that share a scale.
        rank: The only LoRA rank that they compute; smaller ones are padded. None for any.
        most_pools: The most pools of threads that they split an expert over; None for any number.
        shares_backward: Whether layers share backward weights, where that cannot be chosen; None where it can.
        one_saved: Whether a saved forward must get its backward before the next is saved, or the process ends. They
            keep one a layer then, never one for all layers.
        variants: The variants of kt-kernel that have them.
        needs: Instructions that the CPU must have for them beside those of the variant.
    """

    name: str
    class_name: str
    multiple: int
    bytes_per_weight: float
    bytes_on_avx2: float | None = None
    clears_gradients: bool = True
    saved_as: str | None = None
    code: Code | None = None
    block: tuple[int, int] = (1, 1)
    rank: int | None = None
    most_pools: int | None = None
    shares_backward: bool | None = None
    one_saved: bool = False
    variants: tuple[str, ...] = ("amx", "avx512_bf16")
    needs: tuple[str, ...] = ()

    def packed_rank(self, rank: int) -> int:
        """The LoRA rank to build for, where adapters have up to `rank`: those with a `code` are built for one at least.

        Args:
            rank: 0 for inference.
        """
        return self.rank or (max(rank, 1) if self.code else rank)

    def takes(self, stored: PackedMatrices) -> bool:
        """Whether they compute with these weights as they are, to the bit.

        Args:
            stored: In low bits, [n, rows, columns].
        """
        if stored.code != self.code or stored.zeros is not None or stored.factor is not None:
            return False
        if self.code == "e4m3":  # gate and up must begin a block each
            return stored.block == self.block and stored.shape[1] % (self.block[0] * stored.scales.shape[1]) == 0
        dtypes = (torch.uint8, torch.bfloat16) if self.code == "e2m1" else (torch.bfloat16,)
        return stored.group == self.block[1] and stored.scales.dtype in dtypes


# Measured on kt-kernel 0.7.2: 159, 172 and 158 MiB for 151 M weights of one layer, AVX512-BF16.
_MXFP4_BYTES, _KGROUP_BYTES, _FP8_BYTES = 1.10, 1.19, 1.10
# Eight layers of 69 M weights: 0.65 to 0.93 as they are built, 0.81 with what a step works in. Nothing is transposed
# for backward there.
_MXFP4_BYTES_ON_AVX2 = 0.8

OPERATORS = {
    operators.name: operators
    for operators in (
        Operators("AMXBF16", "AMXBF16_SFT_MOE", 32, 2.0),
        Operators("AMXInt8", "AMXInt8_SFT_MOE", 64, 1.0, saved_as="INT8"),
        Operators("AMXInt4", "AMXInt4_SFT_MOE", 128, 0.5, clears_gradients=False, saved_as="INT4"),
        Operators(
            "MXFP4",
            "MXFP4_SFT_MOE",
            32,
            _MXFP4_BYTES,
            _MXFP4_BYTES_ON_AVX2,
            code="e2m1",
            block=(1, 32),
            most_pools=2,
            shares_backward=False,
            one_saved=True,
            variants=("amx", "avx512_bf16", "avx2"),
        ),
        Operators(
            "AMXFP8",
            "AMXFP8_SFT_MOE",
            128,
            _FP8_BYTES,
            code="e4m3",
            block=(128, 128),
            shares_backward=True,
            needs=("avx512_vbmi",),
        ),
        Operators(
            "AMXInt4KGroup",
            "AMXInt4_KGroup_SFT_MOE",
            32,
            _KGROUP_BYTES,
            clears_gradients=False,
            code="int4",
            block=(1, 32),
            rank=8,
            most_pools=2,
            shares_backward=False,
            one_saved=True,
        ),
    )
}
"""kt-kernel's operators by their `kt_backend`, with what each demands: multiples of sizes, pools, ranks, its code."""
QUANTIZED = tuple(operators.name for operators in OPERATORS.values() if operators.saved_as)
"""The backends that quantize experts themselves while they pack, and can save them: AMXInt8 and AMXInt4."""
LOW_BIT = tuple(operators.name for operators in OPERATORS.values() if operators.code)
"""The backends whose weights are packed in low bits before they get them: MXFP4, AMXFP8 and AMXInt4KGroup."""


def shape_problem(shape: ExpertShape, pools: int = 1, backend: str = "AMXBF16") -> str | None:
    """Why the operators of `backend` cannot compute experts of this shape, split over `pools`; None if they can."""
    if not shape.gate.plain:
        return f"their gate is not silu(gate) * up, but {shape.gate}"
    if shape.biased:
        return "they have biases"
    multiple, most = OPERATORS[backend].multiple, OPERATORS[backend].most_pools
    if most is not None and pools > most:
        return f"its operators split experts over {most} pools of threads, not {pools} (kt_tp_enabled=False makes one)"
    for name, size in (("hidden size", shape.hidden_size), ("expert intermediate size", shape.intermediate_size)):
        if size < 1 or size % multiple:
            return f"the {name} {size} is not a multiple of {multiple}"
    if shape.intermediate_size % (multiple * pools):
        return (
            f"the expert intermediate size {shape.intermediate_size} does not split into {pools} pools of multiples of "
            f"{multiple} (kt_tp_enabled=False makes one pool)"
        )
    if not 1 <= shape.top_k <= shape.num_experts:
        return f"{shape.top_k} experts a token of {shape.num_experts} make no sense"
    return None


def check_shape(shape: ExpertShape, pools: int, backend: str, label: str = "") -> None:
    """Refuse experts that the operators of `backend` cannot compute.

    Args:
        shape: Sizes of a layer's experts.
        pools: Number of pools of the operators' worker threads.
        backend: The value of `kt_backend`.
        label: The layer's name, for the message; empty where it is about the whole model.

    Raises:
        KTAMXConfigError: Naming the size, and the backends that can compute them.
    """
    problem = shape_problem(shape, pools, backend)
    if problem is None:
        return
    finer = [o.name for o in OPERATORS.values() if o.multiple < OPERATORS[backend].multiple and not o.code]
    fitting = [f"kt_backend={name}" for name in finer if not shape_problem(shape, pools, name)]
    raise KTAMXConfigError(
        (f"{label}: " if label else "")
        + f"kt_backend={backend}: {problem}. "
        + (f"{' and '.join(fitting)} can compute them; " if fitting else "")
        + "kt_backend=torch takes any shape."
    )


def check_rank(rank: int | None, backend: str, label: str = "") -> None:
    """Refuse a LoRA rank that the operators of `backend` cannot compute.

    Args:
        rank: Of the adapter; None if it is not known.
        backend: The value of `kt_backend`; "torch" takes any.
        label: The layer's name, for the message.

    Raises:
        KTAMXConfigError: It is larger than the only one.
    """
    only = OPERATORS[backend].rank if backend in OPERATORS else None
    if only is not None and rank is not None and rank > only:
        raise KTAMXConfigError(
            (f"{label}: " if label else "")
            + f"kt_backend={backend} computes LoRA of rank {only} and less, not of {rank}. Train with r={only}, or "
            "with another backend."
        )


def most_tokens(shape: ExpertShape) -> int:
    """The most tokens in a call that experts of this shape can be packed for.

    With these a layer reserves less than the machine's memory. Beyond that the system may refuse, and the operators'
    constructor does not return then.
    """
    one = _RESERVED * shape.top_k * (shape.hidden_size + shape.intermediate_size)
    return max(1, int(psutil.virtual_memory().total) // one)
