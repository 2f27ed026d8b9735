"""Linear layers of a model that writes: one row is right, everything else is as always, and so are the layers after."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kt_hf.system.row_linear import has_row_linear
from kt_hf.use import row_linears as module
from kt_hf.use.row_linears import row_linears

needs_bf16 = pytest.mark.skipif(not has_row_linear(), reason="the CPU has no products of bf16")


class Noted:
    """Shapes of the rows that `row_linear` got."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[tuple[int, ...]] = []
        inner = module.row_linear

        def noted(x: Tensor, *rest: Any) -> Tensor:
            self.rows.append(tuple(x.shape))
            return inner(x, *rest)

        monkeypatch.setattr(module, "row_linear", noted)


@needs_bf16
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (1,), ()])
def test_one_row_is_right(bias: bool, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = nn.Linear(200, 72, bias).bfloat16(), torch.randn(*shape, 200).bfloat16()
    expected = x.double() @ layer.weight.double().t() + (layer.bias.double() if bias else 0)
    noted = Noted(monkeypatch)
    with row_linears(layer), torch.no_grad():
        out = layer(x)
    assert noted.rows == [(1, 200)]
    assert out.dtype == torch.bfloat16
    assert out.shape == (*shape, 72)
    assert (out - expected).abs().max() <= 0.01 * expected.abs().max()


@needs_bf16
def test_the_last_row_of_a_prompt_is_one_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head's input after a prompt: a view of one row among several."""
    layer, x = nn.Linear(64, 500, False).bfloat16(), torch.randn(1, 9, 64).bfloat16()
    noted = Noted(monkeypatch)
    with row_linears(layer), torch.no_grad():
        out = layer(x[:, -1:])
    assert noted.rows == [(1, 64)]
    assert torch.allclose(out, layer(x)[:, -1:], atol=0.02)


def test_what_is_no_single_row_is_computed_as_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several rows, other dtypes, gradients, autocast, subclasses and layers that somebody has changed."""
    noted = Noted(monkeypatch)
    layer, x = nn.Linear(64, 32).bfloat16(), torch.randn(1, 64).bfloat16()
    sub = type("Sub", (nn.Linear,), {})(64, 32).bfloat16()
    changed = nn.Linear(64, 32).bfloat16()
    changed.forward = lambda x: x  # type: ignore[method-assign]
    with row_linears(nn.ModuleList([layer, sub, changed, nn.Linear(64, 32)])):
        assert layer(x).requires_grad
        with torch.no_grad():
            assert torch.equal(layer(x.expand(3, 64))[0], nn.Linear.forward(layer, x.expand(3, 64))[0])
            with torch.autocast("cpu", torch.bfloat16):
                layer(x.float())
            sub(x)
            assert torch.equal(changed(x), x)
    assert not noted.rows
    assert "forward" in vars(changed)


def test_layers_are_left_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(8, 8).bfloat16(), nn.Linear(8, 8))
    changed = []

    def interrupted() -> None:
        with row_linears(model):
            changed.append("forward" in vars(model[0]))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert changed == [has_row_linear()]
    assert not [layer for layer in model if "forward" in vars(layer)]
