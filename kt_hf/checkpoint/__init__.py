"""Expert weights in safetensors files: found by header, checked, read layer by layer."""

from .expert_index import ExpertCheckpoint
from .hub import checkpoint_folder

__all__ = ["ExpertCheckpoint", "checkpoint_folder"]
