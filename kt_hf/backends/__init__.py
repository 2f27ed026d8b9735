"""Backends: experts of one layer computed forward and backward, knowing nothing of autograd, PEFT or Trainer."""

from ..shapes import LORA_NAMES, ExpertShape
from .base import Availability, ExpertsBackend, ExpertWeights, Gradients, Saved
from .kt_kernel.operators import OPERATORS, QUANTISED, most_tokens, shape_problem
from .kt_kernel.packed_files import SavedLayer
from .registry import CALL_LOCK, FEW_CORES, choose_backend, describe_cpu, kernel_availability, pack, save_packed
from .torch_loop import TorchBackend

__all__ = [
    "CALL_LOCK",
    "FEW_CORES",
    "LORA_NAMES",
    "OPERATORS",
    "QUANTISED",
    "Availability",
    "ExpertShape",
    "ExpertWeights",
    "ExpertsBackend",
    "Gradients",
    "Saved",
    "SavedLayer",
    "TorchBackend",
    "choose_backend",
    "describe_cpu",
    "kernel_availability",
    "most_tokens",
    "pack",
    "save_packed",
    "shape_problem",
]
