"""Where ranks divide a layer's experts: rows kept before their number is known, the CPU in place of a GPU."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kt_hf.backends import ExpertWeights
from kt_hf.backends.base import SavedForward
from kt_hf.backends.gpu import row_room
from kt_hf.backends.gpu.pinned_weights import HostWeights
from kt_hf.backends.gpu.resident import GroupedBackend
from kt_hf.backends.gpu.rows import Rows
from kt_hf.backends.gpu.streamed import StreamedBackend
from kt_hf.backends.gpu.weight_stream import Streamer
from kt_hf.shapes import ExpertShape

E, K, H, I, T = 4, 2, 64, 32, 96  # noqa: E741
SHAPE = ExpertShape(E, K, H, I, ranks=2)
# Experts of tokens: about half of the rows are this rank's; then none, all, and a few more than there is room for.
PARTS = [0.5, 0.5, 0.0, 1.0, 0.5, 0.6, 0.02]


@pytest.fixture(autouse=True)
def few_rows_are_many(cpu_for_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_room, "_FEW", 16)


def weights() -> ExpertWeights:
    torch.manual_seed(0)
    return ExpertWeights((torch.randn(E, 2 * I, H) / 8).bfloat16(), (torch.randn(E, H, I) / 8).bfloat16())


def backend(kind: str, shape: ExpertShape) -> GroupedBackend | StreamedBackend:
    """Both compute a layer at once."""
    if kind == "resident":
        made: GroupedBackend | StreamedBackend = GroupedBackend(weights(), shape)
    else:
        streamer = Streamer(torch.device("cpu"), 2**30)
        made = StreamedBackend(HostWeights.taken_over(weights()), shape, streamer)
    g = torch.Generator().manual_seed(2)
    made.set_lora(tuple(torch.randn(size, generator=g) / 8 for size in shape.lora_shapes(8)))
    return made


def batch(part: float, seed: int, tokens: int = T) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(E, (tokens, K), generator=g).masked_fill_(torch.rand(tokens, K, generator=g) >= part, -1)
    return torch.randn(tokens, H, generator=g).bfloat16(), ids, torch.rand(tokens, K, generator=g) + 0.1


def results(made: Any, inputs: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    out, saved = made.forward(*inputs, save=True)
    assert isinstance(saved, SavedForward)
    assert saved.rows.tokens.shape[0] == max(1, int((inputs[1] >= 0).sum())), "backward has no row in vain"  # type: ignore[attr-defined]
    gradients = made.backward(saved, torch.ones_like(inputs[0]))
    return [out, gradients.hidden_states, gradients.top_k_weights, *gradients.lora]


@pytest.mark.parametrize("kind", ["resident", "streamed"])
def test_results_are_those_of_all_rows(kind: str) -> None:
    """Whatever the batches before were like; a backend of one rank keeps all rows."""
    divided, whole = backend(kind, SHAPE), GroupedBackend(weights(), replace(SHAPE, ranks=1))
    whole.set_lora(divided.lora_copy())
    for seed, part in enumerate(PARTS):
        inputs = batch(part, seed)
        out, saved = whole.forward(*inputs, save=True)
        assert saved is not None
        gradients = whole.backward(saved, torch.ones_like(inputs[0]))
        wanted = [out, gradients.hidden_states, gradients.top_k_weights, *gradients.lora]
        for found, value in zip(results(divided, inputs), wanted, strict=True):
            assert torch.equal(found, value), part


@pytest.mark.parametrize("kind", ["resident", "streamed"])
def test_the_number_of_rows_is_waited_for_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then it is taken from the batches before; products are launched again where it was too small."""
    made, sorts = backend(kind, SHAPE), list[int | None]()
    sort = Rows.by_expert.__func__  # type: ignore[attr-defined]

    def counted(*given: Any) -> Rows:
        sorts.append(given[5])
        return sort(*given)  # type: ignore[no-any-return]

    monkeypatch.setattr(Rows, "by_expert", classmethod(counted))
    seen = []
    for seed, part in enumerate(PARTS):
        sorts.clear()
        made.forward(*batch(part, seed), save=False)
        seen.append(list(sorts))
    assert seen[0] == [None]
    assert all(None not in one for one in seen[1:]), "a wait"
    assert [len(one) for one in seen] == [1, 1, 1, 2, 1, 1, 1]
    assert all(one[0] > 0.5 * T for one in seen[1:])


@pytest.mark.parametrize("kind", ["resident", "streamed"])
def test_of_few_rows_all_are_kept(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a token that is decoded: it says nothing of a batch."""
    made = backend(kind, SHAPE)
    monkeypatch.setattr(row_room, "to_host", lambda *_: pytest.fail("a wait"))
    inputs = batch(1.0, 0, tokens=8)
    _, saved = made.forward(*inputs, save=True)
    assert saved is not None
    assert made._room._part == 0.0
    assert saved.rows.tokens.shape[0] == 16  # type: ignore[attr-defined]


def test_what_was_computed_in_vain_is_let_go_first() -> None:
    """Two outputs of all ranks' tokens, and two sorts of their rows, would be in memory at a time."""
    made, room, noted = backend("resident", SHAPE), row_room.RowRoom(2), list[weakref.ref[Any]]()
    x, ids, given = batch(1.0, 0)
    room._part = 0.01

    def new(value: Any) -> Any:
        assert len(noted) < 2 or noted[0]() is noted[1]() is None
        noted.append(weakref.ref(value))
        return value

    room.computed(ids.numel(), lambda rows: new(made.saved_of(x, ids, given, rows)), lambda _: new(x.clone()))
    assert len(noted) == 4
