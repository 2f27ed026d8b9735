"""One token without saving, as text is generated: near an fp64 reference, as the general way is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kt_hf.backends import ExpertWeights, TorchBackend
from kt_hf.shapes import ExpertShape

SHAPE = ExpertShape(6, 3, 64, 48)
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 0.02, torch.float16: 2e-3}  # of the output's largest value


class Layer:
    """A layer of random values, of the size that trained ones have, and its formula in fp64."""

    def __init__(self, dtype: torch.dtype, rank: int) -> None:
        torch.manual_seed(0)
        self.gate_up, self.down = ((torch.randn(size) / 8).to(dtype) for size in ((6, 96, 64), (6, 64, 48)))
        self.lora = tuple((torch.randn(size) / 8).to(dtype) for size in SHAPE.lora_shapes(rank)) if rank else ()
        self.backend = TorchBackend(ExpertWeights(self.gate_up, self.down), SHAPE)
        self.backend.set_lora(self.lora)

    def reference(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        total = torch.zeros(1, 64, dtype=torch.float64)
        for e, weight in zip(ids[0].tolist(), weights[0].double(), strict=True):
            if e < 0:
                continue
            gate, up = self.gate_up[e].double().split(48)
            down = self.down[e].double()
            if self.lora:
                (ga, gb, ua, ub, da, db) = (tensor[e].double() for tensor in self.lora)
                gate, up, down = gate + gb @ ga, up + ub @ ua, down + db @ da
            g, u = x.double() @ gate.t(), x.double() @ up.t()
            total += weight * ((g * torch.sigmoid(g) * u) @ down.t())
        return total


@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("rank", [0, 4, 40])  # 40: gate's and up's B apart
@pytest.mark.parametrize("ids", [[[5, 0, 3]], [[1, -1, 2]], [[4, 4, 0]]])
def test_one_token_is_right(dtype: torch.dtype, rank: int, ids: list[list[int]]) -> None:
    layer = Layer(dtype, rank)
    x, chosen, weights = torch.randn(1, 64).to(dtype), torch.tensor(ids), torch.rand(1, 3)
    expected = layer.reference(x, chosen, weights)
    for save in (False, True):
        out, saved = layer.backend.forward(x, chosen, weights, save=save)
        assert (saved is not None) == save
        assert out.dtype == dtype
        assert (out.double() - expected).abs().max() <= BOUNDS[dtype] * expected.abs().max()


@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_it_repeats_its_bits(dtype: torch.dtype) -> None:
    layer, x, ids, weights = Layer(dtype, 4), torch.randn(1, 64).to(dtype), torch.tensor([[5, 0, 3]]), torch.rand(1, 3)
    first, second = (layer.backend.forward(x, ids, weights, False)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_no_expert_gives_zero() -> None:
    out, _ = Layer(torch.float32, 4).backend.forward(
        torch.randn(1, 64), torch.full((1, 3), -1), torch.rand(1, 3), False
    )
    assert not out.any()


def test_distinct_experts_take_the_short_way(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Layer(torch.float32, 4).backend
    monkeypatch.setattr(backend, "_group", lambda ids: pytest.fail("sorted"))
    assert backend.forward(torch.randn(1, 64), torch.tensor([[5, 0, 3]]), torch.rand(1, 3), False)[0].shape == (1, 64)


def test_routing_weights_keep_their_digits() -> None:
    """A weight between two of bf16's would be off by 0.3 % for a whole row, in forward and in backward."""
    layer = Layer(torch.bfloat16, 4)
    exact = TorchBackend(ExpertWeights(layer.gate_up.float(), layer.down.float()), SHAPE)
    exact.set_lora(layer.lora)
    x, grad = torch.randn(256, 64).bfloat16(), torch.randn(256, 64).bfloat16()
    ids, weights = torch.tensor([[5, 0, 3]]).expand(256, 3).contiguous(), torch.full((256, 3), 0.7011)

    def results(backend: TorchBackend) -> list[Tensor]:
        out, saved = backend.forward(x.to(backend.dtype), ids, weights, save=True)
        assert saved is not None
        gradients = backend.backward(saved, grad.to(backend.dtype))
        rows = [backend.forward(x[[i]].to(backend.dtype), ids[[i]], weights[[i]], False)[0] for i in range(256)]
        return [out, torch.cat(rows), gradients.hidden_states, *gradients.lora]

    for mine, expected in zip(results(layer.backend), results(exact), strict=True):
        ratio = (mine.double() * expected.double()).sum() / (expected.double() ** 2).sum()
        assert abs(ratio - 1) < 1e-3
