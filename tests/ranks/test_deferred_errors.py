"""On GPUs ranks look at each other's headers later, inside of a pass: errors are told all the same.

The CPU, connected by gloo, stands for the GPUs.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kt_hf.backends.transfer import Arriving
from kt_hf.errors import KTAMXBackwardError, KTAMXError, KTAMXForwardError
from kt_hf.experts import exchange, tickets
from kt_hf.ranks import Kind, Place, Ranks
from kt_hf.ranks import ranks as kt_hf_ranks
from kt_hf.ranks.ranks import _empty_rows
from kt_hf.ranks.world import World
from tests.support.deferral import ids_of, model_of, step
from tests.support.ranks import on_ranks, results, timed


@pytest.fixture(autouse=True)
def cpu_as_gpu(cpu_for_gpu: None) -> None:
    """Where experts of GPUs are computed."""


def fails(name: str, layer: int) -> Callable[[int], None]:
    """Rank 1 is out of memory in the third pass, in the forward or the backward of a layer."""

    def work(rank: int) -> None:
        model = model_of()
        for number in range(4):
            if rank == 1 and number == 2:
                backend = model.base_model.model._kt_wrappers[layer].backend

                def failing(*_: Any, **__: Any) -> None:
                    raise torch.OutOfMemoryError("CUDA out of memory")

                setattr(backend, name, failing)
            step(model, rank, number)

    return work


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(("name", "kind"), [("forward", KTAMXForwardError), ("backward", KTAMXBackwardError)])
def test_a_failure_is_told(name: str, kind: type[KTAMXError], layer: int) -> None:
    """Rank 0 learns of it where the ranks meet next; the place that is named is the one of the failure."""
    (first, _), (second, _), *others = results(on_ranks(4, timed(fails(name, layer)), 20))
    assert isinstance(second, torch.OutOfMemoryError)
    for error in (first, *(error for error, _ in others)):
        assert isinstance(error, kind), error
        assert f"model.layers.{layer}." in str(error)
        assert "rank 1 has failed there: OutOfMemoryError: CUDA out of memory" in str(error)


@pytest.mark.parametrize("refusals", [0, 1, 2])
def test_memory_for_the_rows_of_a_rank_that_failed(refusals: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks once more after what is cached was given back; then it sends none."""
    asked: list[str] = []

    class Like:
        shape = (0, 3)

        def new_zeros(self, *size: int) -> Tensor:
            asked.append("rows")
            if asked.count("rows") <= refusals:
                raise torch.OutOfMemoryError
            return torch.zeros(size)

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: asked.append("freed"))
    rows = _empty_rows(Like(), 5)  # type: ignore[arg-type]
    assert asked == ["rows", "freed", "rows"][: 1 if refusals == 0 else 3]
    assert rows is None if refusals == 2 else rows is not None and rows.shape == (5, 3)


def test_another_forward_is_told_before_rows_are_sent() -> None:
    def work(rank: int) -> None:
        model = model_of()
        for number in range(3):
            step(model, rank, number)
        if rank == 1:
            with torch.no_grad():
                model(input_ids=ids_of(rank, 0))
        step(model, rank, 3)

    for error, seconds in results(on_ranks(2, timed(work), 20)):
        assert isinstance(error, KTAMXForwardError), error
        assert "the ranks are in different places" in str(error)
        assert seconds < 20


@pytest.mark.parametrize("how", ["killed", "stands still"])
def test_a_rank_that_never_comes(how: str) -> None:
    """In the middle of a pass, where the others do not wait at once."""

    def work(rank: int) -> None:
        model = model_of()
        step(model, rank, 0)
        step(model, rank, 1)
        if rank == 1:
            backend = model.base_model.model._kt_wrappers[0].backend
            forward = backend.forward

            def gone(*args: Any, **kwargs: Any) -> Any:
                if how == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(12)
                return forward(*args, **kwargs)

            backend.forward = gone
        step(model, rank, 2)

    first, _ = on_ranks(2, timed(work), 6)
    assert isinstance(first, tuple), first
    error, seconds = first
    assert isinstance(error, KTAMXError)
    assert "rank 1, which has ended or stands still" in str(error)
    assert seconds < 6 + 5


@pytest.mark.parametrize("where", ["computed", "gathered anew"])
def test_an_error_where_a_layer_has_other_tokens_is_told(where: str) -> None:
    """The others gather anew meanwhile, other numbers of rows than the rank that failed knows of."""

    def work(rank: int) -> None:
        model = model_of()
        layer = model.base_model.model._kt_wrappers[1]
        forward, compute, pack, packs = layer.forward, layer.backend.forward, exchange.packed, list[int]()

        def sparse(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            return torch.cat((forward(hidden[:2], ids[:2], weights[:2]), hidden[2:]))

        def failing(*given: Any, **how: Any) -> Any:
            if where == "computed":
                raise torch.OutOfMemoryError("CUDA out of memory")
            exchange.packed = failing_later
            return compute(*given, **how)

        def failing_later(tensors: list[Tensor]) -> Any:
            packs.append(1)
            if len(packs) == 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return pack(tensors)

        for number in range(3):
            if number == 2:
                layer.forward = sparse
            if number == 2 and rank == 1:
                layer.backend.forward = failing
            step(model, rank, number)

    (first, _), (second, seconds), *others = results(on_ranks(4, timed(work), 20))
    assert isinstance(second, torch.OutOfMemoryError), second
    assert seconds < 20
    for error in (first, *(error for error, _ in others)):
        assert isinstance(error, KTAMXForwardError), error
        assert "layers.1.mlp.experts: rank 1 has failed there: OutOfMemoryError: CUDA" in str(error)


@pytest.mark.parametrize(("recomputed", "passes"), [(False, 0), (False, 2), (True, 2)])
def test_an_error_before_tokens_are_sent_is_told(recomputed: bool, passes: int) -> None:
    """The others, who went on, get rows of any values and the words; in a layer's first forward they wait."""

    def work(rank: int) -> None:
        model = model_of()
        layer = model.base_model.model._kt_wrappers[1]
        prepared = layer._prepared

        def failing(*given: Any) -> Any:
            if tickets.in_backward() is recomputed:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return prepared(*given)

        for number in range(4):
            if rank == 1 and number == passes:
                layer._prepared = failing
            if not passes:
                with torch.no_grad():
                    model(input_ids=ids_of(rank, number))
            step(model, rank, number)

    (first, _), (second, seconds), *others = results(on_ranks(4, timed(work), 20))
    assert isinstance(second, torch.OutOfMemoryError)
    assert seconds < 20
    for error in (first, *(error for error, _ in others)):
        assert isinstance(error, KTAMXError), error
        assert "layers.1.mlp.experts: rank 1 has failed there: OutOfMemoryError: CUDA" in str(error)


def test_ranks_that_are_to_go_on_after_an_error_wait() -> None:
    """As where accumulation is folded, and batches become smaller when one runs out of memory."""
    places = [Place(Kind.INPUT_GRADIENTS, layer) for layer in (2, 1, 0)]
    ranks = Ranks(World(0, 2, 0, 2))
    ranks._on_gpu = lambda _: True  # type: ignore[method-assign]
    for patient in (False, True):
        ranks.patient = patient
        for _ in range(2):
            deferred = [ranks.defers(place, torch.device("cuda")) for place in places]
        assert deferred == [not patient, not patient, False]


@pytest.mark.parametrize(("layer", "even"), [(0, False), (0, True), (1, False)])
def test_gradients_that_cannot_be_sent_are_told(layer: int, even: bool) -> None:
    """Rank 1 has no memory to put them together; the others, of equally many tokens or not, have begun to send."""

    def work(rank: int) -> None:
        model = model_of()
        pack, left = exchange.packed, [2 - layer]  # the last layer's come first

        def failing(tensors: list[Tensor]) -> Any:
            if len(tensors) == 4 and len(tensors[0]):
                left[0] -= 1
                if not left[0]:
                    raise torch.OutOfMemoryError("CUDA out of memory")
            return pack(tensors)

        for number in range(4):
            if rank == 1 and number == 2:
                exchange.packed = failing
            step(model, 0 if even else rank, number)

    (first, _), (second, seconds), *others = results(on_ranks(4, timed(work), 20))
    assert isinstance(second, torch.OutOfMemoryError)
    assert seconds < 20
    for error in (first, *(error for error, _ in others)):
        assert isinstance(error, KTAMXBackwardError), error
        assert f"layers.{layer}.mlp.experts: rank 1 has failed there: OutOfMemoryError: CUDA" in str(error)


def test_no_memory_for_what_the_others_send_to_a_rank_that_failed() -> None:
    """It is asked for together with what it sends, in one place."""

    def work(rank: int) -> None:
        model = model_of()
        find, new = kt_hf_ranks._empty_rows, Tensor.new_zeros

        def scarce(tensor: Tensor, *size: Any, **like: Any) -> Tensor:
            if tensor.dtype == torch.uint8 and tensor.dim() == 2 and size[0]:
                raise torch.OutOfMemoryError("again")
            return new(tensor, *size, **like)

        def found(*given: Any) -> Tensor | None:
            Tensor.new_zeros = new  # type: ignore[method-assign]
            rows = find(*given)
            Tensor.new_zeros = scarce  # type: ignore[method-assign,assignment]
            return rows

        def failing(*_: Any, **__: Any) -> None:
            kt_hf_ranks._empty_rows = found
            Tensor.new_zeros = scarce  # type: ignore[method-assign,assignment]
            raise torch.OutOfMemoryError("CUDA out of memory")

        for number in range(4):
            if rank == 1 and number == 2:
                model.base_model.model._kt_wrappers[0].backend.forward = failing
            step(model, rank, number)

    (first, _), (second, _) = results(on_ranks(2, timed(work), 20))
    assert "CUDA out of memory" in str(second)
    assert "rank 1 has failed there: OutOfMemoryError: CUDA out of memory" in str(first)


@pytest.mark.parametrize("name", ["prepared", "forward", "backward"])
def test_a_host_looks_at_the_others_before_it_waits_for_its_gpu(name: str) -> None:
    """Which waits for rows that rank 1 never sends; what it said is raised, and not told again to those who know it."""

    class Never:
        def query(self) -> bool:
            return False

        def synchronize(self) -> None:
            raise AssertionError("stands still")

    def work(rank: int) -> None:
        model = model_of()
        backend, layer = (model.base_model.model._kt_wrappers[1].backend, model.base_model.model._kt_wrappers[1])
        packed, holder = exchange.packed, layer if name == "prepared" else backend
        called = "_prepared" if name == "prepared" else name
        compute = getattr(holder, called)

        def failing(*_: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory")

        def failing_gradients(tensors: list[Tensor]) -> Any:
            return failing() if len(tensors) == 4 and len(tensors[0]) else packed(tensors)

        def waiting(*given: Any, **how: Any) -> Any:
            if name == "prepared":
                layer._runner._loaded = Never()
                layer._runner.finish_load()
            Arriving((), Never()).wait()  # type: ignore[arg-type]
            return compute(*given, **how)

        def once(meet: Any) -> Any:
            def met(*given: Any, failure: Any = None, **how: Any) -> Any:
                assert failure is None, "told again"
                return meet(*given, **how)

            return met

        for number in range(3):
            if number == 2 and rank == 0:
                setattr(holder, called, waiting)
                for meet in ("rows_to_owners", "agree"):
                    setattr(Ranks, meet, once(getattr(Ranks, meet)))
            elif number == 2 and name == "prepared":
                model.base_model.model._kt_wrappers[0].backend.forward = failing
            elif number == 2 and name == "forward":
                layer._prepared = failing
            elif number == 2:
                exchange.packed = failing_gradients
            step(model, rank, number)

    (first, seconds), (second, _) = results(on_ranks(2, timed(work), 20))
    assert isinstance(second, torch.OutOfMemoryError)
    assert isinstance(first, KTAMXError)
    assert "rank 1 has failed there: OutOfMemoryError: CUDA out of memory" in str(first)
    assert seconds < 15
