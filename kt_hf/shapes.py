"""Names and sizes of one layer's experts, as every other module spells them.

E  experts of a layer            T  tokens of a call
K  experts a token is sent to    R, r  LoRA rank
H  hidden size                   I  intermediate size of an expert
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .gates import PLAIN, Gate

# The projections of an expert, by the names that PEFT's target_modules give them.
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# Mixtral's names in transformers 4, on the hub, and in people's configs.
ALIASES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
# Bits of a weight that is not packed in fewer.
BF16 = 16.0
LORA_NAMES = ("gate_lora_a", "gate_lora_b", "up_lora_a", "up_lora_b", "down_lora_a", "down_lora_b")
"""The order in which the LoRA tensors of a layer are passed everywhere: all six, or the last four without a gate."""


@dataclass(frozen=True)
class ExpertShape:
    """Sizes of one layer's experts.

    Attributes:
        num_experts: Experts of the layer, or of the part of it that a backend holds, E.
        top_k: Experts a token is sent to, K.
        hidden_size: H.
        intermediate_size: I.
        gate: How gate and up become the input of the down projection. Without a gate an expert has two matrices.
        biased: Whether the projections have biases.
        ranks: Processes that the layer's experts are divided among. A backend of one of them gets the tokens of all, so
            that of the T*K choices it gets only one in `ranks` is of its experts, on average.
    """

    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    gate: Gate = PLAIN
    biased: bool = False
    ranks: int = 1

    @property
    def projections(self) -> tuple[str, ...]:
        """Those of `PROJECTIONS` that an expert has, in order: all three, or up and down without a gate."""
        return PROJECTIONS if self.gate.gated else PROJECTIONS[1:]

    @property
    def up_rows(self) -> int:
        """Rows of an expert's first product: 2I of gate and up, or I of up alone."""
        return self.gate.halves * self.intermediate_size

    @property
    def num_weights(self) -> int:
        """Elements of all experts' weights, 3EHI (2EHI without a gate); biases are not counted."""
        return len(self.projections) * self.num_experts * self.hidden_size * self.intermediate_size

    def lora_shapes(self, rank: int) -> tuple[tuple[int, int, int], ...]:
        """Shapes of the LoRA tensors in the order of `LORA_NAMES`: A is [E, rank, in], B is [E, out, rank].

        Six tensors, or the last four of them without a gate.

        Args:
            rank: LoRA rank, r.
        """
        E, H, I = self.num_experts, self.hidden_size, self.intermediate_size  # noqa: E741
        up = (E, rank, H), (E, I, rank)
        return *up * self.gate.halves, (E, rank, I), (E, H, rank)

    def part(self, experts: int) -> ExpertShape:
        """The same for a part of the layer's experts.

        Args:
            experts: How many.
        """
        return replace(self, num_experts=experts)


def expert_bytes(shape: ExpertShape, bits: float = BF16) -> int:
    """Bytes of one expert's matrices.

    Args:
        shape: Sizes of the layer.
        bits: Of a weight as it is stored, its part of the scales included.
    """
    matrices = len(shape.projections)
    return int(matrices * shape.hidden_size * shape.intermediate_size * bits / 8)
