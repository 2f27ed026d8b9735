"""The GPU: how its memory is taken."""

from __future__ import annotations

import pytest
import torch

from kt_hf.system import gpu

GROW = "expandable_segments:True"


@pytest.mark.parametrize(
    ("device", "environment", "hip", "asked", "grow"),
    [
        ("cuda", {}, None, [GROW], True),
        ("cuda", {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, None, [], False),
        ("cuda", {"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}, None, [], False),
        ("cuda", {"PYTORCH_CUDA_ALLOC_CONF": f"max_split_size_mb:64,{GROW}"}, None, [], True),
        ("cuda", {"PYTORCH_ALLOC_CONF": "expandable_segments: True"}, None, [], True),
        ("cuda", {"PYTORCH_ALLOC_CONF": f"{GROW},backend:cudaMallocAsync"}, None, [], False),
        ("cuda", {"PYTORCH_ALLOC_CONF": "backend:native", "PYTORCH_CUDA_ALLOC_CONF": GROW}, None, [], False),
        ("cuda", {}, "6.4", [], False),
        ("cpu", {}, None, [], True),  # a machine without a GPU estimates for one
    ],
)
def test_the_allocator_of_a_gpu_is_set_where_nobody_has(
    device: str, environment: dict[str, str], hip: str | None, asked: list[str], grow: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """And it is known whether its segments grow, which memory is planned by."""
    said: list[str] = []
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda.memory, "_set_allocator_settings", said.append)
    gpu.let_segments_grow(torch.device(device))
    assert said == asked
    assert gpu.segments_grow() == grow


def test_an_allocator_that_cannot_be_set_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cuda.memory, "_set_allocator_settings")
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    gpu.let_segments_grow(torch.device("cuda"))
    assert not gpu.segments_grow()


def test_an_allocator_that_refuses_has_fragments(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(_: str) -> None:
        raise RuntimeError("too late")

    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda.memory, "_set_allocator_settings", refuses)
    monkeypatch.setattr(gpu.let_segments_grow, "refused", False, raising=False)
    assert gpu.segments_grow()
    gpu.let_segments_grow(torch.device("cuda"))
    assert not gpu.segments_grow()
