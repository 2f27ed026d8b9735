"""LoRA values that changed, in whatever way, are those the next forward computes with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kt_hf import KTExperts
from tests.support.cases import Case
from tests.support.one_layer import DEFAULT, build, check, stacked


def drawn(like: Tensor) -> Tensor:
    """New values each time."""
    return torch.randn(like.shape) * 0.1


def step_of(**settings: Any) -> Callable[[KTExperts], None]:
    def step(layer: KTExperts) -> None:
        optimizer = torch.optim.AdamW(layer.lora_params.values(), lr=0.05, **settings)
        for parameter in layer.lora_params.values():
            parameter.grad = drawn(parameter)
        optimizer.step()
        optimizer.zero_grad()

    return step


@torch.no_grad()
def copy(layer: KTExperts) -> None:
    for parameter in layer.lora_params.values():
        parameter.copy_(drawn(parameter))


@torch.no_grad()
def part_of_one(layer: KTExperts) -> None:
    layer.lora_params["up_lora_b"].view(-1)[:500] += 0.3


@torch.no_grad()
def foreach_by_hand(layer: KTExperts) -> None:
    parameters = list(layer.lora_params.values())
    torch._foreach_add_(parameters, [drawn(parameter) for parameter in parameters])


def replace(layer: KTExperts) -> None:
    for projection in layer.projections:
        for holder in (projection.lora_A["default"], projection.lora_B["default"]):
            holder.weight = nn.Parameter(drawn(holder.weight))


def replace_by_a_double(layer: KTExperts) -> None:
    """By one that has the first's identity, memory and version, which the memory just freed makes likely."""
    holder = layer.down_proj.lora_B["default"]

    def looks() -> tuple[int, int, int]:
        return id(holder.weight), holder.weight.data_ptr(), holder.weight._version

    first = looks()
    for _ in range(100):
        like = holder.weight.shape
        del holder.weight
        holder.weight = nn.Parameter(torch.randn(like))
        if looks() == first:
            break


def swap(layer: KTExperts) -> None:
    for parameter in layer.lora_params.values():
        torch.utils.swap_tensors(parameter, nn.Parameter(drawn(parameter)))


def load(layer: KTExperts) -> None:
    state = layer.state_dict()
    new = {name: drawn(value) for name, value in state.items() if ".lora_" in name}
    assert len(new) == 6
    layer.load_state_dict({**state, **new})


CHANGES = {
    "adamw_fused": step_of(fused=True),
    "adamw_foreach": step_of(foreach=True),
    "adamw_plain": step_of(foreach=False, fused=False),
    **{
        change.__name__: change
        for change in (copy, part_of_one, foreach_by_hand, replace, replace_by_a_double, swap, load)
    },
}


@pytest.mark.parametrize("name", CHANGES)
def test_seen_without_a_word(case: Case, name: str) -> None:
    _, layer, base = build(case)
    check(case, layer, base, DEFAULT)
    for _ in range(5):
        before = stacked(layer, DEFAULT)
        CHANGES[name](layer)
        after = stacked(layer, DEFAULT)
        assert not all(torch.equal(after[key], before[key]) for key in before)
        check(case, layer, base, DEFAULT)


def test_bare_edit_of_data_is_seen_after_update_lora_pointers(case: Case) -> None:
    _, layer, base = build(case)
    check(case, layer, base, DEFAULT)
    for parameter in layer.lora_params.values():
        parameter.data.copy_(drawn(parameter))
    layer.update_lora_pointers()
    check(case, layer, base, DEFAULT)


def test_unchanged_lora_is_copied_once(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check must cost less than the copy it saves."""
    _, layer, base = build(case)
    backend, copies = layer._runner.backend, []
    original = backend.set_lora
    monkeypatch.setattr(backend, "set_lora", lambda tensors: (copies.append(1), original(tensors)))
    for _ in range(3):
        check(case, layer, base, DEFAULT)
    assert len(copies) == 1
    copy(layer)
    check(case, layer, base, DEFAULT)
    assert len(copies) == 2
