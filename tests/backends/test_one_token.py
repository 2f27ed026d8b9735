"""One token without saving, as text is generated: the same values as among others and as with saving, to the bit."""

from __future__ import annotations

import pytest
import torch

from kt_hf.backends import ExpertWeights, TorchBackend
from kt_hf.shapes import ExpertShape

SHAPE = ExpertShape(6, 3, 64, 48)


def layer(dtype: torch.dtype, rank: int) -> TorchBackend:
    torch.manual_seed(0)
    weights = ExpertWeights(0.1 * torch.randn(6, 96, 64).to(dtype), 0.1 * torch.randn(6, 64, 48).to(dtype))
    backend = TorchBackend(weights, SHAPE)
    backend.set_lora(tuple(0.1 * torch.randn(size) for size in SHAPE.lora_shapes(rank)) if rank else ())
    return backend


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [0, 4, 40])  # 40: gate's and up's B apart
@pytest.mark.parametrize("ids", [[[5, 0, 3]], [[1, -1, 2]], [[4, 4, 0]], [[-1, -1, -1]]])
def test_one_token_is_equal_to_the_bit(dtype: torch.dtype, rank: int, ids: list[list[int]]) -> None:
    backend = layer(dtype, rank)
    x, chosen, weights = torch.randn(1, 64).to(dtype), torch.tensor(ids), torch.rand(1, 3)
    out, saved = backend.forward(x, chosen, weights, save=False)
    general, kept = backend.forward(x, chosen, weights, save=True)
    assert saved is None
    assert kept is not None
    assert out.dtype == dtype
    assert out.isfinite().all()
    assert torch.equal(out, general)


def test_distinct_experts_take_the_short_way(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = layer(torch.float32, 4)
    monkeypatch.setattr(backend, "_group", lambda ids: pytest.fail("sorted"))
    assert backend.forward(torch.randn(1, 64), torch.tensor([[5, 0, 3]]), torch.rand(1, 3), False)[0].shape == (1, 64)
