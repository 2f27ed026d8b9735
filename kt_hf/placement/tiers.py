"""How many experts of each layer are in which tier: resident on the GPU, streamed to it, or on the CPU.

Where every expert has tokens, a few resident experts in each layer save no more than as many bytes of whole layers, and
cost a second group of products in each. So some layers can be resident whole, between others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..backends.gpu.grouped_mm import aligned
from ..config import KTConfig
from ..errors import KTAMXConfigError
from ..shapes import ExpertShape


@dataclass(frozen=True)
class Tiers:
    """How many experts of each layer the GPU computes, the most used first; the CPU computes the others.

    Attributes:
        resident: Experts whose weights are in the GPU's memory, of a layer that is not resident whole.
        streamed: Experts whose weights are in host memory, and copied to the GPU each time they are needed, of such a
            layer.
        resident_layers: Layers all of whose experts are in the GPU's memory; `spread` says which.
    """

    resident: int = 0
    streamed: int = 0
    resident_layers: int = 0

    @property
    def on_gpu(self) -> int:
        """Experts that the GPU computes, of a layer that is not resident whole."""
        return self.resident + self.streamed

    @property
    def need_gpu(self) -> bool:
        """Whether the GPU computes any expert."""
        return bool(self.on_gpu or self.resident_layers)

    def on_cpu(self, experts: int) -> int:
        """Experts that the CPU computes, of a layer that has `experts` and is not resident whole."""
        return max(0, experts - self.on_gpu)

    def of_rank(self, ranks: int) -> Tiers:
        """The part of each of so many processes that a layer's experts are divided among."""
        return replace(self, resident=-(-self.resident // ranks), streamed=-(-self.streamed // ranks))

    def __str__(self) -> str:
        if not self.resident_layers:
            return f"{self.resident} experts of each layer on the GPU, {self.streamed} streamed to it"
        whole = f"{self.resident_layers} whole layer{'s' if self.resident_layers > 1 else ''} on the GPU"
        return f"{whole}; of each other layer {self.resident} experts on the GPU, {self.streamed} streamed to it"


def spread(count: int, layers: int) -> list[int]:
    """Which layers are resident whole, in the order in which they become so: each in the middle of the widest gap.

    Any number of the first ones is spread about evenly (no gap is more than about twice as wide as another): layers are
    added and taken away one at a time, at the end, and the compute of one lies between copies of others.

    Args:
        count: How many layers; more than there are counts as all.
        layers: How many layers there are.

    Returns:
        Positions from 0 to `layers` - 1, `count` of them; `spread(n, layers)` begins as every shorter one.
    """
    gaps, order = [(0, layers)], list[int]()  # [first, last) of layers that are not resident, in a row
    while len(order) < min(count, layers):
        first, last = gaps.pop(max(range(len(gaps)), key=lambda i: (gaps[i][1] - gaps[i][0], -gaps[i][0])))
        middle = (first + last) // 2
        order.append(middle)
        gaps += [(first, middle), (middle + 1, last)]
    return order


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
    if is_auto(config):
        return None if has_gpu else Tiers()
    if placement is None:
        return Tiers(config.kt_num_gpu_experts or 0)
    experts = max((shape.num_experts for shape in shapes), default=0)
    if isinstance(placement, Mapping) and "resident_layers" in placement:
        return Tiers(0, experts, placement["resident_layers"])
    if isinstance(placement, Mapping):
        return Tiers(placement.get("resident", 0), placement.get("streamed", 0))
    return Tiers(experts) if placement == "gpu" else Tiers()


def order_matters(config: KTConfig) -> bool:
    """Whether it makes a difference which experts are used most: settings send some to the GPU, not all.

    Args:
        config: The settings.
    """
    placement = config.kt_expert_placement
    if isinstance(placement, Mapping):
        return bool(placement.get("resident") or placement.get("streamed"))
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
    if not tiers.need_gpu:
        return None
    field = field_of(config)
    if tiers.resident_layers > len(shapes):
        return f"{field}: the model has {len(shapes)} layers of experts. Set resident_layers to {len(shapes)} or less."
    if config.kt_weight_path is not None:
        return f"{field} does not go together with kt_weight_path: saved experts are packed for the CPU. Leave one out."
    if not has_gpu:
        nothing = "set it to 0" if config.kt_expert_placement is None else "set it to auto"
        return f"{field} needs a CUDA GPU, and there is none here: leave it out, or {nothing}."
    return next(filter(None, (_layer_problem(tiers, config, shape, operators) for shape in shapes)), None)


def _layer_problem(tiers: Tiers, config: KTConfig, shape: ExpertShape, operators: bool) -> str | None:
    """Why one layer cannot have these numbers; None if it can."""
    field, what = field_of(config), "resident and streamed together" if tiers.streamed else "it"
    E, K, count = shape.num_experts, shape.top_k, tiers.on_gpu
    placement = config.kt_expert_placement
    whole = placement == "gpu" or is_auto(config) or (isinstance(placement, Mapping) and "resident_layers" in placement)
    if not whole and count > E:
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
