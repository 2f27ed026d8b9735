"""What autocast does on a GPU and does not on a CPU, for tests on machines without one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Of autocast's list for CUDA ("ops that can autocast to float32"), those that code around experts may call.
_IN_FP32 = {
    function
    for name in ("cumprod", "cumsum", "exp", "log", "norm", "pow", "prod", "rsqrt", "softmax", "sum")
    for function in (getattr(torch, name), getattr(Tensor, name))
} | {Tensor.__pow__}


class _Widening(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        widens = function in _IN_FP32 and kwargs.get("dtype") is None and torch.is_autocast_enabled("cpu")
        if widens and torch.is_tensor(args[0]) and args[0].dtype in (torch.bfloat16, torch.float16):
            args = (args[0].float(), *args[1:])
        return function(*args, **kwargs)


@contextlib.contextmanager
def gpu_autocast() -> Iterator[None]:
    """Autocast to bf16 on the CPU that computes sums, powers and the like in fp32, as on a GPU."""
    with torch.autocast("cpu", torch.bfloat16), _Widening():
        assert torch.ones(2, dtype=torch.bfloat16).sum(0).dtype == torch.float32
        yield
