"""Backends: experts of one layer computed forward and backward, knowing nothing of autograd, PEFT or Trainer."""

from ..shapes import LORA_NAMES, ExpertShape
from .base import CALL_LOCK, Availability, ExpertsBackend, ExpertWeights, Gradients, Resumable, SavedForward
from .base import SavedForward as Saved  # Saved, QUANTISED, SavedLayer, pack and save_packed: the names of 0.1.0
from .kt_kernel.installation import bytes_per_weight
from .kt_kernel.kept_memory import KEPT
from .kt_kernel.operators import LOW_BIT, OPERATORS, QUANTIZED, most_tokens, shape_problem
from .kt_kernel.operators import QUANTIZED as QUANTISED
from .kt_kernel.packed_files import PackedLayerFiles
from .kt_kernel.packed_files import PackedLayerFiles as SavedLayer
from .registry import (
    FEW_CORES,
    build_backend,
    choose_backend,
    describe_cpu,
    kernel_availability,
    quantize_layer,
)
from .registry import build_backend as pack
from .registry import quantize_layer as save_packed
from .torch_loop import TorchBackend

__all__ = [
    "CALL_LOCK",
    "FEW_CORES",
    "KEPT",
    "LORA_NAMES",
    "LOW_BIT",
    "OPERATORS",
    "QUANTISED",
    "QUANTIZED",
    "Availability",
    "ExpertShape",
    "ExpertWeights",
    "ExpertsBackend",
    "Gradients",
    "PackedLayerFiles",
    "Resumable",
    "Saved",
    "SavedForward",
    "SavedLayer",
    "TorchBackend",
    "build_backend",
    "bytes_per_weight",
    "choose_backend",
    "describe_cpu",
    "kernel_availability",
    "most_tokens",
    "pack",
    "quantize_layer",
    "save_packed",
    "shape_problem",
]
