"""What a run starts from, kept on the disk until its first checkpoint, so that it can start once more."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import IO

import torch
from torch import Tensor, nn

from .trial_step import RandomState


class StartValues:
    """The trained parameters of a model and the random numbers, as they were.

    Args:
        file: Holds the bytes of the parameters, one after the other.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._numbers = file, RandomState()

    @classmethod
    def of(cls, model: nn.Module, folder: Path) -> StartValues | None:
        """Those of `model` now, in a file of `folder` that has no name and goes with the process; None if the disk has
        no room for them."""
        try:
            file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - it outlives this call
        except OSError:
            return None
        try:
            for parameter in _trained(model):
                file.write(_bytes(parameter.detach().cpu()))
            file.flush()
        except OSError:
            file.close()
            return None
        return cls(file)

    def put_back(self, model: nn.Module) -> None:
        """Give the model's parameters, and the random numbers, the values they had."""
        self._file.seek(0)
        with torch.no_grad():
            for parameter in _trained(model):
                value = torch.empty(parameter.shape, dtype=parameter.dtype)
                self._file.readinto(_bytes(value))  # type: ignore[attr-defined]
                parameter.copy_(value)
        self._numbers.put_back()


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _bytes(value: Tensor) -> memoryview:
    """The memory of a tensor on the CPU, of any dtype; a copy's where it is not contiguous."""
    return value.contiguous().reshape(-1).view(torch.uint8).numpy().data
