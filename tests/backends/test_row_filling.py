"""An expert's rows are filled up on a CPU, so that products come in few sizes; nobody sees the rows that were added."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kt_hf.backends import ExpertWeights, TorchBackend
from kt_hf.backends.torch_loop import _filled
from kt_hf.shapes import ExpertShape

SHAPE = ExpertShape(6, 2, 32, 48)


def backend(fill: bool) -> TorchBackend:
    draw = torch.Generator().manual_seed(0)
    gate_up, down = (torch.randn(size, generator=draw).bfloat16() * 0.1 for size in ((6, 96, 32), (6, 32, 48)))
    made = TorchBackend(ExpertWeights(gate_up, down), SHAPE)
    made._fill = fill
    made.set_lora(tuple(torch.randn(size, generator=draw) * 0.1 for size in SHAPE.lora_shapes(4)))
    return made


def inputs(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Expert 5 gets nothing, expert 0 most; some ids are of no expert."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.stack([torch.zeros(tokens, dtype=torch.int64), torch.randint(-1, 5, (tokens,), generator=draw)], 1)
    x, weights = torch.randn(tokens, 32, generator=draw).bfloat16(), torch.rand(tokens, 2, generator=draw)
    return x, ids, weights


def run(made: TorchBackend, x: Tensor, ids: Tensor, weights: Tensor) -> list[Tensor]:
    out, saved = made.forward(x, ids, weights, save=True)
    assert saved is not None
    found = made.backward(saved, torch.sin(x))
    return [out, found.hidden_states, found.top_k_weights, *found.lora]


def test_numbers_of_rows() -> None:
    assert [_filled(n) for n in (0, 1, 2, 3, 5, 9, 16, 17, 32, 33, 100)] == [0, 1, 2, 4, 8, 16, 16, 32, 32, 48, 112]


@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_results_are_those_without(tokens: int) -> None:
    given = inputs(tokens)
    for ours, expected in zip(run(backend(True), *given), run(backend(False), *given), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-2, atol=1e-3)
        assert not torch.isnan(ours).any()


def test_few_sizes_are_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: dict[bool, set[int]] = {True: set(), False: set()}
    original = torch.mm
    for fill in (True, False):
        made = backend(fill)

        def seen(a: Tensor, b: Tensor, fill: bool = fill, **more: Any) -> Tensor:
            sizes[fill].add(a.shape[0])
            return original(a, b, **more)

        monkeypatch.setattr(torch, "mm", seen)
        for tokens in range(40, 60):
            made.forward(*inputs(tokens), save=False)
    assert sizes[True] <= {8, 16, 32, 48, 64, 80}
    assert len(sizes[False]) > 15


def test_a_token_that_is_not_finite_stays_alone() -> None:
    """Rows of zeros are added, not of any token's."""
    x, ids, weights = inputs(21)
    x[0] = torch.inf
    got = run(backend(True), x, ids, weights)
    assert not torch.isfinite(got[0][0]).any()
    assert torch.isfinite(got[0][1:]).all()
    assert torch.isfinite(got[1][1:]).all()
    others = [e for e in range(6) if e not in ids[0].tolist()]
    for gradient in got[3:]:
        assert torch.isfinite(gradient[others]).all()


def test_only_16_bits_on_a_cpu_are_filled() -> None:
    weights = ExpertWeights(torch.zeros(6, 96, 32), torch.zeros(6, 32, 48))
    assert not TorchBackend(weights, SHAPE)._fill
    narrow = TorchBackend(ExpertWeights(weights.gate_up.bfloat16(), weights.down.bfloat16()), SHAPE)
    assert narrow._fill == torch.ops.mkldnn._is_mkldnn_bf16_supported()
