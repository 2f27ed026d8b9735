"""Models whose experts are split: the CPU stands for the GPU, so that everything but CUDA itself is tested here."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import one_torch_thread as one_torch_thread


@pytest.fixture(autouse=True)
def cpu_for_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kt_hf.system.gpu.experts_device", lambda: torch.device("cpu"))
