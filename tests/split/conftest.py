"""Models whose experts are split: the CPU stands for the GPU, so that everything but CUDA itself is tested here."""

from __future__ import annotations

import pytest
import torch

from kt_hf.placement import packer as packing
from tests.helpers import one_torch_thread as one_torch_thread


@pytest.fixture(autouse=True)
def cpu_for_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_TIER", torch.device("cpu"))
