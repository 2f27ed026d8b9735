"""Which expert is computed where, and the building of the layers' backends."""

from .order import (
    PLACEMENT,
    Placement,
    as_placement,
    count_experts,
    placement_of,
    read_placement,
    take_over,
    write_placement,
)

__all__ = [
    "PLACEMENT",
    "Placement",
    "as_placement",
    "count_experts",
    "placement_of",
    "read_placement",
    "take_over",
    "write_placement",
]
