"""Backends: experts of one layer computed forward and backward, knowing nothing of autograd, PEFT or Trainer."""

from ..shapes import LORA_NAMES, ExpertShape
from .base import Availability, ExpertsBackend, ExpertWeights, Gradients, SavedForward
from .kt_kernel.operators import OPERATORS, QUANTIZED, most_tokens, shape_problem
from .kt_kernel.packed_files import PackedLayerFiles
from .registry import (
    CALL_LOCK,
    FEW_CORES,
    build_backend,
    choose_backend,
    describe_cpu,
    kernel_availability,
    quantize_layer,
)
from .torch_loop import TorchBackend

# The names that these had in 0.1.0.
QUANTISED, Saved, SavedLayer, pack, save_packed = (
    QUANTIZED,
    SavedForward,
    PackedLayerFiles,
    build_backend,
    quantize_layer,
)

__all__ = [
    "CALL_LOCK",
    "FEW_CORES",
    "LORA_NAMES",
    "OPERATORS",
    "QUANTISED",
    "QUANTIZED",
    "Availability",
    "ExpertShape",
    "ExpertWeights",
    "ExpertsBackend",
    "Gradients",
    "PackedLayerFiles",
    "Saved",
    "SavedForward",
    "SavedLayer",
    "TorchBackend",
    "build_backend",
    "choose_backend",
    "describe_cpu",
    "kernel_availability",
    "most_tokens",
    "pack",
    "quantize_layer",
    "save_packed",
    "shape_problem",
]
