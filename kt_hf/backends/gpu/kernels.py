"""Which kernels compute on a device: Triton's, PyTorch's grouped product, or plain operations of PyTorch's.

The one place where this is decided. Tests and benchmarks replace the functions of this module.
"""

from __future__ import annotations

import functools
import logging
from types import ModuleType

import torch

logger = logging.getLogger(__name__)


@functools.cache
def triton_runs(device: torch.device) -> bool:
    """Whether Triton's kernels run on a device: a GPU of sm_80 or newer, with Triton and what it compiles with.

    Asked for the first time, it builds the smallest of the kernels, and logs why it cannot.

    Args:
        device: The device, a GPU with its index.

    Raises:
        torch.OutOfMemoryError: The GPU's memory is full: that says nothing about Triton.
    """
    if device.type != "cuda" or (torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0)):
        return False
    try:
        from . import fused_kernels

        fused_kernels.gated(torch.ones(1, 16, dtype=torch.bfloat16, device=device), None, _one_row(device))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no Triton, no compiler: what is raised then is not documented
        logger.warning("kt_hf: experts on %s are computed without Triton's kernels, slower: %s", device, error)
        return False
    return True


@functools.cache
def has_native_grouped_mm(device: torch.device) -> bool:
    """Whether `torch._grouped_mm` is fast on a device, and does not wait for it.

    By ATen's source (2.9 to 2.11) that is so on sm_90 and sm_100 alone, whose kernels run on no other GPU. Elsewhere it
    copies row ends to the host and multiplies one expert after the other. On the CPU that is right, and for ROCm,
    whose own kernels nobody has measured here, it is left as it is.

    Args:
        device: The device, a GPU with its index.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return True
    return torch.cuda.get_device_capability(device) in ((9, 0), (10, 0))


def row_operations(device: torch.device) -> ModuleType:
    """What computes around the grouped products: `fused_kernels` by Triton, or `torch_rows`, the same by PyTorch."""
    if triton_runs(device):
        from . import fused_kernels

        return fused_kernels
    from . import torch_rows

    return torch_rows


def own_product(device: torch.device) -> ModuleType | None:
    """`grouped_product` where it is the one to take; None where `torch._grouped_mm` is, fast or for lack of Triton."""
    if has_native_grouped_mm(device) or not triton_runs(device):
        return None
    from . import grouped_product

    return grouped_product


def _one_row(device: torch.device) -> torch.Tensor:
    return torch.ones(1, dtype=torch.int32, device=device)
