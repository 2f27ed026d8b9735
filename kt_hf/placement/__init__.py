"""Which expert is computed where, and the building of the layers' backends."""

from .assembly import packer_of
from .order import PLACEMENT, Placement, as_placement, read_placement, write_placement
from .packer import Packer
from .routing_profile import count_experts

__all__ = [
    "PLACEMENT",
    "Packer",
    "Placement",
    "as_placement",
    "count_experts",
    "packer_of",
    "read_placement",
    "write_placement",
]
