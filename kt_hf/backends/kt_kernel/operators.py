"""kt-kernel's operator classes, one for each arithmetic: what they demand and in what they differ."""

from __future__ import annotations

from dataclasses import dataclass

import psutil

from ...errors import KTAMXConfigError
from ...shapes import ExpertShape

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
        bytes_per_weight: Memory of a weight, packed once: 2, 1 or 0.5 bytes; scales are not counted.
        clears_gradients: Whether backward overwrites the LoRA gradient buffers; else it adds to some of them.
        saved_as: What names of saved files begin with; None where the weights cannot be saved packed.
    """

    name: str
    class_name: str
    multiple: int
    bytes_per_weight: float
    clears_gradients: bool = True
    saved_as: str | None = None


OPERATORS = {
    operators.name: operators
    for operators in (
        Operators("AMXBF16", "AMXBF16_SFT_MOE", 32, 2.0),
        Operators("AMXInt8", "AMXInt8_SFT_MOE", 64, 1.0, saved_as="INT8"),
        Operators("AMXInt4", "AMXInt4_SFT_MOE", 128, 0.5, clears_gradients=False, saved_as="INT4"),
    )
}
QUANTIZED = tuple(operators.name for operators in OPERATORS.values() if operators.saved_as)


def shape_problem(shape: ExpertShape, pools: int = 1, backend: str = "AMXBF16") -> str | None:
    """Why the operators of `backend` cannot compute experts of this shape, split over `pools`; None if they can."""
    if not shape.gate.plain:
        return f"their gate is not silu(gate) * up, but {shape.gate}"
    if shape.biased:
        return "they have biases"
    multiple = OPERATORS[backend].multiple
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
    finer = [o.name for o in OPERATORS.values() if o.multiple < OPERATORS[backend].multiple]
    fitting = [f"kt_backend={name}" for name in finer if not shape_problem(shape, pools, name)]
    raise KTAMXConfigError(
        (f"{label}: " if label else "")
        + f"kt_backend={backend}: {problem}. "
        + (f"{' and '.join(fitting)} can compute them; " if fitting else "")
        + "kt_backend=torch takes any shape."
    )


def most_tokens(shape: ExpertShape) -> int:
    """The most tokens in a call that experts of this shape can be packed for.

    With these a layer reserves less than the machine's memory. Beyond that the system may refuse, and the operators'
    constructor does not return then.
    """
    one = _RESERVED * shape.top_k * (shape.hidden_size + shape.intermediate_size)
    return max(1, int(psutil.virtual_memory().total) // one)
