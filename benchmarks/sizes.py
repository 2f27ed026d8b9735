"""Sizes of the models whose expert layers are measured, and what a layer of them costs at least. Plain arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

SIZES = {  # experts, experts a token, hidden size, expert intermediate size
    "deepseek-v2-lite": (64, 6, 2048, 1408),
    "deepseek-v3": (256, 8, 7168, 2048),
    "qwen3-30b-a3b": (128, 8, 2048, 768),
    "qwen3-235b-a22b": (128, 8, 4096, 1536),
    "mixtral-8x7b": (8, 2, 4096, 14336),
    "smol": (8, 2, 576, 1536),
    "tiny": (8, 2, 128, 128),
}


@dataclass(frozen=True)
class Shape:
    """A layer's experts E, of which each token takes K, hidden size H, intermediate size I (`inner`)."""

    name: str
    E: int
    K: int
    H: int
    inner: int

    @property
    def expert_weights(self) -> int:
        return 3 * self.H * self.inner

    @property
    def bytes(self) -> int:
        """Of a layer's experts in bf16."""
        return 2 * self.E * self.expert_weights

    def label(self, rank: int) -> str:
        """As the CSV has it: the number of experts is named where memory did not allow them all."""
        fewer = f" E={self.E}" if SIZES[self.name][0] > self.E else ""
        return f"{self.name}{fewer} r={rank}"

    def flops(self, part: str, tokens: int, rank: int) -> float:
        """Multiplications and additions of a layer. The weights are frozen, so backward has one product with each of
        them, as forward has; LoRA has two (its inputs' gradient and its own) in backward.
        """
        lora = 3 * rank * (self.H + self.inner)
        return 2.0 * tokens * self.K * (self.expert_weights + (2 if part == "backward" else 1) * lora)

    def moved_bytes(self, tokens: int, rank: int) -> float:
        """Bytes of bf16 weights and LoRA that a forward, or a backward, must read: those of the experts that tokens
        spread evenly at random reach.
        """
        reached = self.E * (1 - (1 - self.K / self.E) ** tokens)
        return 2.0 * reached * (self.expert_weights + 3 * rank * (self.H + self.inner))


def parse(label: str) -> tuple[Shape, int]:
    """The shape and LoRA rank of a label."""
    name, *rest = label.split()
    given = dict(part.split("=") for part in rest if "=" in part)
    E, K, H, inner = SIZES[name]
    return Shape(name, int(given.get("E", E)), K, H, inner), int(given["r"])


def bound(shape: Shape, part: str, tokens: int, rank: int, flops: float, rate: float) -> tuple[float, str]:
    """The least seconds of a part at so many FLOP and bytes a second, and which of the two limits it."""
    by_flops, by_bytes = shape.flops(part, tokens, rank) / flops, shape.moved_bytes(tokens, rank) / rate
    return max((by_flops, "FLOPs"), (by_bytes, "bytes"))
