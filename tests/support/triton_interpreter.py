"""Triton's interpreter with bf16 as a GPU has it: rounded to the nearest, and multiplied as the numbers they are.

As released (3.5) it truncates where fp32 becomes bf16, its `dot` multiplies the bits of bf16 as integers, and it does
not take a number it has loaded for a loop's bound with NumPy 2.4 (an array of one element is no scalar there). In 3.9
the conjunction of two comparisons is an integer, which it does not take as a mask.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def _to_bf16(values: np.ndarray) -> np.ndarray:
    """The bits of fp32 numbers in bf16."""
    return torch.from_numpy(np.ascontiguousarray(values)).bfloat16().view(torch.int16).numpy().view(np.uint16)


def _to_fp32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def mend() -> None:
    """Needs TRITON_INTERPRET=1 from the process's start, for Triton's own functions are interpreted too."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert, builder, patch = interpreter._convert_float, interpreter.InterpreterBuilder, interpreter._patch_lang_tensor
    dot, load, store = builder.create_dot, builder.create_masked_load, builder.create_masked_store

    def converted(values: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if (source, target) == (tl.float32, tl.bfloat16):
            return _to_bf16(values)
        if (source, target) == (tl.bfloat16, tl.float32):
            return _to_fp32(values)
        return convert(values, source, target, rounding)

    def wide(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle(_to_fp32(handle.data), tl.float32)

    def patched(tensor: Any, *scope: Any) -> None:  # Triton 3.9 gives what undoes the patch
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    def mask(handle: Any) -> Any:
        return interpreter.TensorHandle(handle.data.astype(bool), tl.int1)

    interpreter._convert_float = converted
    interpreter._patch_lang_tensor = patched
    builder.create_dot = lambda self, a, b, *rest: dot(self, wide(a), wide(b), *rest)
    builder.create_masked_load = lambda self, at, inside, *rest: load(self, at, mask(inside), *rest)
    builder.create_masked_store = lambda self, at, value, inside, *rest: store(self, at, value, mask(inside), *rest)
