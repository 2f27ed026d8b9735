"""Fixtures of all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from tests.support.cases import CASES, KERNEL_MARKS, KERNEL_MISSING, Case
from tests.support.models import FAMILIES, Family
from tests.support.tokenizer import word_tokenizer


def pytest_report_header() -> str:
    return (
        f"kt-kernel's operators: {'tested' if KERNEL_MISSING is None else 'their tests are skipped, ' + KERNEL_MISSING}"
    )


@pytest.fixture(params=["torch", pytest.param("AMXBF16", marks=KERNEL_MARKS)])
def backend(request: pytest.FixtureRequest) -> str:
    """The kt_backend to test with; AMXBF16 only where the CPU and the installed kt-kernel can run it."""
    return request.param


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    """Backend, model dtype and tolerances together."""
    return request.param


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


@pytest.fixture
def cpu_for_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU stands for the GPU, so that everything but CUDA itself is tested on any machine."""
    monkeypatch.setattr("kt_hf.system.gpu.experts_device", lambda: torch.device("cpu"))


@pytest.fixture(autouse=True)
def one_torch_thread() -> Iterator[None]:
    """Most tensors here are tiny: more threads only wait for each other, and bit-equality needs one order of sums."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
