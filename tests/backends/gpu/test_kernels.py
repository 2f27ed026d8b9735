"""Triton's kernels and the grouped product on a real GPU: `kernel_cases.py`, larger sizes, and no wait for the GPU."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

from kt_hf.backends import ExpertWeights
from kt_hf.backends.gpu import grouped_product, kernels
from kt_hf.backends.gpu.pinned_weights import HostWeights
from kt_hf.backends.gpu.resident import GroupedBackend
from kt_hf.backends.gpu.streamed import StreamedBackend
from kt_hf.backends.gpu.weight_stream import Streamer
from kt_hf.shapes import ExpertShape
from tests.backends import kernel_cases
from tests.backends.kernel_cases import *  # noqa: F403
from tests.backends.kernel_cases import DEVICE, WAYS, choose, drawn
from tests.support.reference import relative_error

SHAPE = ExpertShape(num_experts=32, top_k=4, hidden_size=1024, intermediate_size=704)


def backend(rank: int = 16) -> GroupedBackend:
    E, H, I = SHAPE.num_experts, SHAPE.hidden_size, SHAPE.intermediate_size  # noqa: E741
    gate_up, down = (drawn(E, *size, seed=i, scale=0.03).bfloat16().to(DEVICE) for i, size in enumerate([(2 * I, H), (H, I)]))  # fmt: skip # noqa: E501
    one = GroupedBackend(ExpertWeights(gate_up, down), SHAPE)
    one.set_lora(tuple(drawn(*size, seed=7 + i, scale=0.03) for i, size in enumerate(SHAPE.lora_shapes(rank))))
    return one


def inputs(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = torch.rand(tokens, SHAPE.num_experts, device=DEVICE).topk(SHAPE.top_k, dim=1).indices
    ids[::7, 0] = -1
    return drawn(tokens, SHAPE.hidden_size).bfloat16().to(DEVICE), ids, torch.rand(ids.shape, device=DEVICE)


def test_triton_runs() -> None:
    """Else the tests below compare PyTorch with itself."""
    assert kernels.triton_runs(DEVICE)
    major = torch.cuda.get_device_capability()[0]
    assert kernels.has_native_grouped_mm(DEVICE) == (major in (9, 10))
    assert kernel_cases.GPU


@pytest.mark.parametrize("tokens", [1, 100, 1000, 4000])
def test_all_ways_agree_on_large_sizes(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16, 64 and 128 rows; sizes that blocks do not divide."""
    one, x, found = backend(), inputs(tokens), {}
    choose(monkeypatch, "PyTorch")
    many = inputs(100)
    _, saved = one.forward(*many, save=True)
    assert saved is not None
    # A token's routing weight has a gradient of 704 terms, which may cancel: its error is held against a usual one.
    usual = float(one.backward(saved, many[0]).top_k_weights.float().abs().mean())
    for way in WAYS:
        choose(monkeypatch, way)
        out, saved = one.forward(*x, save=True)
        assert saved is not None
        grads = one.backward(saved, x[0])
        found[way] = [out, grads.hidden_states, grads.top_k_weights, *grads.lora]
    for way in WAYS:
        for i, (value, wanted) in enumerate(zip(found[way], found["PyTorch"], strict=True)):
            if i == 2 and tokens == 1:
                assert float((value - wanted).float().abs().mean()) < 8e-3 * usual, way
            else:
                assert relative_error(value.float(), wanted.float()) < 8e-3, (way, i)


@pytest.mark.parametrize("tokens", [100, 4000])
@pytest.mark.parametrize("way", ["PyTorch", "fused", "own"])
def test_a_layer_at_once_and_in_chunks_is_the_same_to_the_bit(
    way: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(monkeypatch, way)
    whole, x = backend(), inputs(tokens)
    host = HostWeights.copied(ExpertWeights(whole.weights.gate_up.cpu(), whole.weights.down.cpu()), range(32))
    one = StreamedBackend(host, SHAPE, Streamer(DEVICE, chunk_bytes=5 * 3 * 2 * 1024 * 704))
    one.set_lora(tuple(drawn(*size, seed=7 + i, scale=0.03) for i, size in enumerate(SHAPE.lora_shapes(16))))
    results = []
    for layer in (whole, one):
        out, saved = layer.forward(*x, save=True)
        assert saved is not None
        grads = layer.backward(saved, x[0])
        results.append([out, grads.hidden_states, grads.top_k_weights, *grads.lora])
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        assert torch.equal(a, b), i


@pytest.mark.parametrize("way", ["fused", "own"])
def test_the_host_does_not_wait(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch raises where an operation waits for the GPU; kernels are compiled before."""
    choose(monkeypatch, way)
    one, x = backend(), inputs(1000)
    before = torch.cuda.get_sync_debug_mode()
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            _, saved = one.forward(*x, save=True)
            assert saved is not None
            one.backward(saved, x[0])
        finally:
            torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("large", [True, False])
def test_the_blocks_of_small_gpus_compute_the_same(large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a 3090 or 4090 on whatever is here."""
    choose(monkeypatch, "own")
    one, x = backend(), inputs(4000)
    wanted, _ = one.forward(*x, save=False)
    monkeypatch.setattr(grouped_product, "_large", lambda device: large)
    found, _ = one.forward(*x, save=False)
    assert relative_error(found.float(), wanted.float()) < 4e-3
