"""Several processes that train one model together: who is there, who owns which experts, and how they talk."""

from .measured import least_of_all, of_all_ranks
from .meetings import is_told
from .place import Kind, Place
from .ranks import PendingMean, Ranks
from .world import Share, World, current_world

__all__ = [
    "Kind", "PendingMean", "Place", "Ranks", "Share", "World", "current_world", "is_told", "least_of_all",
    "of_all_ranks",
]  # fmt: skip
