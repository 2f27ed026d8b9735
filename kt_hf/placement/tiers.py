"""How many experts of each layer are in which tier: resident on the GPU, streamed to it, or on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..backends.gpu.grouped_mm import aligned
from ..config import KTConfig
from ..errors import KTAMXConfigError
from ..shapes import ExpertShape


@dataclass(frozen=True)
class Tiers:
    """Numbers of experts a layer, the most used in the first tier; what is left is on the CPU.

    Attributes:
        resident: In the GPU's memory.
        streamed: Computed there, with weights in host memory that are copied each time.
    """

    resident: int = 0
    streamed: int = 0

    @property
    def on_gpu(self) -> int:
        return self.resident + self.streamed

    def on_cpu(self, experts: int) -> int:
        """Of a layer of so many."""
        return max(0, experts - self.on_gpu)

    def __str__(self) -> str:
        return f"{self.resident} experts of each layer on the GPU, {self.streamed} streamed to it"


def field_of(config: KTConfig) -> str:
    """The setting that decides, with its value, for messages."""
    if config.kt_expert_placement is not None:
        return f"kt_expert_placement={config.kt_expert_placement!r}"
    return f"kt_num_gpu_experts={config.kt_num_gpu_experts}"


def asked_for(config: KTConfig, shapes: Sequence[ExpertShape], has_gpu: bool) -> Tiers | None:
    """What the settings say of layers of these shapes; None if it is to be planned, which takes a GPU."""
    placement = config.kt_expert_placement
    if placement is None:
        return Tiers(config.kt_num_gpu_experts or 0)
    if isinstance(placement, Mapping):
        return Tiers(placement.get("resident", 0), placement.get("streamed", 0))
    if placement == "gpu":
        return Tiers(max(shape.num_experts for shape in shapes))
    return None if placement == "auto" and has_gpu and config.kt_weight_path is None else Tiers()


def order_matters(config: KTConfig, has_gpu: bool) -> bool:
    """Whether it makes a difference which experts are used most: the GPU computes some, not all."""
    placement = config.kt_expert_placement
    if isinstance(placement, Mapping):
        return any(placement.values())
    return has_gpu if placement == "auto" else placement is None and bool(config.kt_num_gpu_experts)


def check_tiers(tiers: Tiers, config: KTConfig, shapes: Sequence[ExpertShape], operators: bool) -> None:
    """Refuse numbers that layers of these shapes cannot have.

    Args:
        operators: Whether kt-kernel's operators compute what is on the CPU. They need as many experts as a token is
            sent to, or none.

    Raises:
        KTAMXConfigError: Too many experts, or too few of them left for the operators, or of a shape that grouped
            products cannot compute.
    """
    field = field_of(config)
    for shape in shapes:
        E, K, count = shape.num_experts, shape.top_k, tiers.on_gpu
        what = "resident and streamed together" if tiers.streamed else "it"
        if config.kt_expert_placement != "gpu" and count > E:
            raise KTAMXConfigError(f"{field}: a layer has {E} experts. Set {what} to {E} or less.")
        if operators and E - K < count < E:
            raise KTAMXConfigError(
                f"{field} of {E} leaves {E - count} on the CPU, and the operators need {K} (those a token is sent "
                f"to). Set {what} to {E}, or to {E - K} or less."
            )
        if tiers.streamed and not aligned(shape):
            raise KTAMXConfigError(
                f"{field}: experts of hidden size {shape.hidden_size} and intermediate size "
                f"{shape.intermediate_size} cannot be streamed, only multiples of 8 can. Set streamed to 0."
            )
