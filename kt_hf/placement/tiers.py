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
    """How many experts of each layer the GPU computes, the most used first; the CPU computes the others.

    Attributes:
        resident: Experts whose weights are in the GPU's memory.
        streamed: Experts whose weights are in host memory, and copied to the GPU each time they are needed.
        resident_layers: Whole layers in the GPU's memory, spread evenly; the numbers of experts are the other layers'.
    """

    resident: int = 0
    streamed: int = 0
    resident_layers: int = 0

    @property
    def on_gpu(self) -> int:
        """Experts of a layer that the GPU computes, but for layers that are resident as a whole."""
        return self.resident + self.streamed

    @property
    def uses_gpu(self) -> bool:
        """Whether the GPU computes any experts."""
        return bool(self.on_gpu or self.resident_layers)

    def on_cpu(self, experts: int) -> int:
        """Experts that the CPU computes, of a layer that has `experts`."""
        return max(0, experts - self.on_gpu)

    def __str__(self) -> str:
        experts = f"{self.resident} experts of each layer on the GPU, {self.streamed} streamed to it"
        if not self.resident_layers:
            return experts
        return f"{self.resident_layers} layers on the GPU, of the others {experts.replace('of each layer ', '')}"


def spread(layers: int) -> list[int]:
    """An order of layers of which every begin is spread about evenly: 2 of 4 are 0 and 2, 4 of 8 every second.

    Args:
        layers: How many there are.

    Returns:
        Each of 0 to layers - 1 once: the numbers with their binary digits turned round in order, those of a power of
        two that is not smaller.
    """
    bits = max(layers - 1, 0).bit_length()
    turned = (int(f"{i:0{bits}b}"[::-1], 2) if bits else 0 for i in range(1 << bits))
    return [i for i in turned if i < layers]


def field_of(config: KTConfig) -> str:
    """The setting that decides, with its value, for messages."""
    if config.kt_expert_placement is not None:
        return f"kt_expert_placement={config.kt_expert_placement!r}"
    return f"kt_num_gpu_experts={config.kt_num_gpu_experts}"


def is_auto(config: KTConfig) -> bool:
    """Whether the placement is to be planned: `auto` is written, or nothing that says where experts are computed.

    A `kt_backend` that is written asks for the CPU's operators.

    Args:
        config: The settings.
    """
    if config.kt_weight_path is not None:
        return False
    if config.kt_expert_placement is not None:
        return config.kt_expert_placement == "auto"
    return config.kt_num_gpu_experts is None and config.kt_backend == "auto"


def asked_for(config: KTConfig, shapes: Sequence[ExpertShape], has_gpu: bool) -> Tiers | None:
    """The tiers that the settings ask for; None if they are to be planned (`auto`), which takes a GPU.

    Args:
        config: The settings.
        shapes: Of the model's layers.
        has_gpu: Whether there is a GPU for experts.
    """
    placement = config.kt_expert_placement
    most = max(shape.num_experts for shape in shapes)
    if is_auto(config):
        return None if has_gpu else Tiers()
    if isinstance(placement, Mapping):
        if (whole := placement.get("resident_layers")) is not None:
            return Tiers(0, most, whole)
        return Tiers(placement.get("resident", 0), placement.get("streamed", 0))
    if placement is None:
        return Tiers(config.kt_num_gpu_experts or 0)
    return Tiers(most) if placement == "gpu" else Tiers()


def order_matters(config: KTConfig, has_gpu: bool) -> bool:
    """Whether it makes a difference which experts are used most: the GPU computes some of them, not all.

    Args:
        config: The settings.
        has_gpu: Whether there is a GPU for experts.
    """
    placement = config.kt_expert_placement
    if isinstance(placement, Mapping):
        return "resident_layers" not in placement and any(placement.values())
    return placement is None and bool(config.kt_num_gpu_experts)


def problem(
    tiers: Tiers, config: KTConfig, shapes: Sequence[ExpertShape], operators: bool, has_gpu: bool = True
) -> str | None:
    """Why these numbers cannot be had, naming the setting, its value and the fix; None if they can.

    Args:
        tiers: Experts of each layer by tier.
        config: The settings that led to them.
        shapes: Of the model's layers.
        operators: Whether kt-kernel's operators compute what is on the CPU. They need as many experts as a token is
            sent to, or none.
        has_gpu: Whether there is a GPU for experts.
    """
    if not tiers.uses_gpu:
        return None
    field = field_of(config)
    if config.kt_weight_path is not None:
        return f"{field} does not go together with kt_weight_path: saved experts are packed for the CPU. Leave one out."
    if not has_gpu:
        nothing = "set it to 0" if config.kt_expert_placement is None else "set it to auto"
        return f"{field} needs a CUDA GPU, and there is none here: leave it out, or {nothing}."
    if tiers.resident_layers > len(shapes):
        return f"{field}: the model has {len(shapes)} layers of experts. Set resident_layers to {len(shapes)} or less."
    return next(filter(None, (_layer_problem(tiers, config, shape, operators) for shape in shapes)), None)


def _layer_problem(tiers: Tiers, config: KTConfig, shape: ExpertShape, operators: bool) -> str | None:
    """Why one layer cannot have these numbers; None if it can."""
    field, what = field_of(config), "resident and streamed together" if tiers.streamed else "it"
    E, K, count = shape.num_experts, shape.top_k, tiers.on_gpu
    if config.kt_expert_placement == "gpu" or tiers.resident_layers or is_auto(config):  # all that a layer has
        count = min(count, E)
    if count > E:
        return f"{field}: a layer has {E} experts. Set {what} to {E} or less."
    if operators and E - K < count < E:
        return (
            f"{field} of {E} leaves {E - count} on the CPU, and the operators need {K} (those a token is sent "
            f"to). Set {what} to {E}, or to {E - K} or less."
        )
    if tiers.streamed and not aligned(shape):
        return (
            f"{field}: experts of hidden size {shape.hidden_size} and intermediate size "
            f"{shape.intermediate_size} cannot be streamed, only multiples of 8 can. Set streamed to 0."
        )
    return None


def check_tiers(
    tiers: Tiers, config: KTConfig, shapes: Sequence[ExpertShape], operators: bool, has_gpu: bool = True
) -> None:
    """Refuse numbers of experts that cannot be had.

    Args:
        tiers: Experts of each layer by tier.
        config: The settings that led to them.
        shapes: Of the model's layers.
        operators: Whether kt-kernel's operators compute what is on the CPU.
        has_gpu: Whether there is a GPU for experts.

    Raises:
        KTAMXConfigError: As `problem` says it.
    """
    text = problem(tiers, config, shapes, operators, has_gpu)
    if text is not None:
        raise KTAMXConfigError(text)
