"""On GPUs ranks look at each other's headers later, inside of a pass. The CPU, connected by gloo, stands for them."""

from __future__ import annotations

import os
import signal
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from kt_hf.backends.transfer import Arriving
from kt_hf.errors import KTAMXBackwardError, KTAMXError, KTAMXForwardError
from kt_hf.experts import exchange, tickets
from kt_hf.ranks import Kind, Place, Ranks
from kt_hf.ranks import ranks as kt_hf_ranks
from kt_hf.ranks.channel import Channel
from kt_hf.ranks.ranks import _empty_rows
from kt_hf.ranks.world import World
from tests.support.cases import TORCH_BF16
from tests.support.helpers import MIXTRAL
from tests.support.patched import adapted_model, trainable
from tests.support.ranks import fill_whole, on_ranks, results, timed

STREAMED = {"resident": 0, "streamed": MIXTRAL.num_experts}


@pytest.fixture(autouse=True)
def cpu_as_gpu(cpu_for_gpu: None) -> None:
    """Where experts of GPUs are computed."""


def model_of(deferring: bool = True) -> Any:
    """In a process of its own, which ends with the test."""
    Ranks._on_gpu = staticmethod(lambda _: deferring)  # type: ignore[method-assign]
    tickets._on_gpu = lambda _: deferring
    model = adapted_model(MIXTRAL, TORCH_BF16, kt_expert_placement=STREAMED, kt_expert_activations="retain")
    fill_whole(model, 1)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    return model.train()


def ids_of(rank: int, step: int) -> Tensor:
    return MIXTRAL.inputs(1, 5 + rank + step % 2, seed=10 * rank + step)


def step(model: Any, rank: int, number: int = 0) -> None:
    model(input_ids=ids_of(rank, number), labels=ids_of(rank, number)).loss.backward()


def test_bits_are_the_same_and_meetings_that_wait_few() -> None:
    """Of a step: one where it begins, and five where a pass, or a recompute of it, enters or leaves the layers."""

    def work(rank: int, deferring: bool) -> tuple[list[dict[str, Tensor]], list[int]]:
        model, waits = DistributedDataParallel(model_of(deferring)), list[int]()
        gathered = Channel.gathered

        def counted(channel: Channel, values: Tensor) -> Tensor:
            waits.append(1)
            return gathered(channel, values)

        Channel.gathered = counted  # type: ignore[method-assign]
        found, counts = [], []
        for number in range(4):
            waits.clear()
            model.zero_grad()
            step(model, rank, number)
            counts.append(len(waits))
            found.append({name: p.grad.clone() for name, p in trainable(model).items() if p.grad is not None})
        return found, counts

    deferred, counts = zip(*results(on_ranks(2, lambda rank: work(rank, True))), strict=True)
    at_once, others = zip(*results(on_ranks(2, lambda rank: work(rank, False))), strict=True)
    for mine, wanted in zip(deferred, at_once, strict=True):
        for one, other in zip(mine, wanted, strict=True):
            assert one.keys() == other.keys()
            assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert [found[-1] for found in counts] == [1 + 5] * 2
    assert [found[-1] for found in others] == [1 + 2 * 3] * 2, "on a CPU headers ride with outputs"


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


def test_ranks_that_take_other_forwards_for_the_one_recomputed() -> None:
    """One knows the only open forward; the other, whose layer has lost it, would compute it again."""

    def work(rank: int) -> None:
        model = model_of()
        step(model, rank, 0)
        step(model, rank, 1)
        loss = model(input_ids=ids_of(rank, 2), labels=ids_of(rank, 2)).loss
        if rank == 1:
            for ticket in model.base_model.model._kt_wrappers[1]._runner._live.values():
                ticket.retained = None
        loss.backward()

    (first, _), _ = results(on_ranks(2, timed(work), 6))
    assert "Or set kt_expert_activations to recompute" in str(first)


@pytest.mark.parametrize("parted", ["rank 0 has fewer", "rank 1 has none", "both have fewer"])
def test_a_layer_that_has_other_tokens_than_the_first_is_computed_anew(parted: str) -> None:
    """No bit is lost where ranks went on with a wrong number; the layer waits for the right one from then on."""

    def work(rank: int, deferring: bool) -> tuple[list[dict[str, Tensor]], bool, int]:
        model = model_of(deferring)
        layer, waits = model.base_model.model._kt_wrappers[1], list[int]()
        forward, agree, kept = layer.forward, Ranks.agree, {0: 3, 1: 9} if "both" in parted else {int(parted[5]): 0}

        def sparse(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            count = min(kept.get(rank, 9), len(ids)) if parted != "rank 0 has fewer" or rank else 2
            if parted == "both have fewer":
                count = 3 - rank
            return torch.cat((forward(hidden[:count], ids[:count], weights[:count]), hidden[count:]))

        def counted(ranks: Ranks, place: Place, *rest: Any, **how: Any) -> Any:
            waits.append(place.kind is Kind.TOKENS and place.layer == 1)
            return agree(ranks, place, *rest, **how)

        layer.forward, Ranks.agree = sparse, counted  # type: ignore[method-assign]
        found = []
        for number in range(3):
            waits.clear()
            model.zero_grad()
            step(model, rank, number)
            found.append({name: p.grad.clone() for name, p in trainable(model).items() if p.grad is not None})
        return found, layer.exchange._steady, sum(waits)

    deferred = results(on_ranks(2, lambda rank: work(rank, True)))
    at_once = results(on_ranks(2, lambda rank: work(rank, False)))
    for (mine, steady, waits), (wanted, *_) in zip(deferred, at_once, strict=True):
        assert not steady
        assert waits == 1, "in the forward alone"
        for one, other in zip(mine, wanted, strict=True):
            assert one.keys() == other.keys()
            assert all(torch.equal(value, other[name]) for name, value in one.items())


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


def test_what_was_computed_in_vain_is_let_go_first() -> None:
    """Two layers' outputs of all ranks' tokens would be in memory at a time."""

    def work(rank: int) -> list[bool]:
        model, alive, made = model_of(), list[bool](), list[weakref.ref[Tensor]]()
        layer = model.base_model.model._kt_wrappers[1]
        forward, compute = layer.forward, layer.backend.forward

        def noted(*given: Any, **how: Any) -> Any:
            alive.extend(ref() is not None for ref in made)
            result = compute(*given, **how)
            made[:] = weakref.ref(given[0]), weakref.ref(result[0])
            return result

        step(model, rank)
        layer.forward = lambda x, *rest: torch.cat((forward(x[:2], *(part[:2] for part in rest)), x[2:]))
        layer.backend.forward = noted
        step(model, rank, 1)
        return alive

    assert on_ranks(2, work) == [[False, False]] * 2


def test_no_layer_keeps_rows_that_were_sent() -> None:
    """But for their widths: of 48 layers they would be more than a layer's weights."""

    def work(rank: int) -> int:
        model = model_of()
        for number in range(2):
            step(model, rank, number)
        kept = [layer.exchange._rows for layer in model.base_model.model._kt_wrappers]
        return sum(rows.untyped_storage().nbytes() for pair in kept for rows in pair)

    assert on_ranks(2, work) == [0, 0]


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


def test_edges_are_those_of_the_pass() -> None:
    ranks = object.__new__(Ranks)
    ranks._edges = {}
    for _ in range(2):
        edges = [
            (kind, layer)
            for kind, layers in ((Kind.OUTPUTS, range(3)), (Kind.GRADIENTS, range(2, -1, -1)),
                                 (Kind.INPUT_GRADIENTS, range(2, -1, -1)))
            for layer in layers
            if ranks._is_edge(Place(kind, layer))
        ]  # fmt: skip
    assert edges == [(Kind.OUTPUTS, 2), (Kind.GRADIENTS, 2), (Kind.INPUT_GRADIENTS, 0)]


@pytest.mark.parametrize("chunk", [None, 1])
def test_a_recompute_whose_router_chooses_otherwise_is_the_forward(chunk: int | None) -> None:
    """Kernels that do not repeat their bits may choose another of two experts that are as good."""

    def work(rank: int, other: bool) -> dict[str, Tensor]:
        model = model_of()
        layers = model.base_model.model._kt_wrappers
        if chunk:
            layers[0].backend._streamer._chunk_bytes = chunk
        forward = layers[1].forward

        def chosen(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            if other and tickets.in_backward():
                ids = ids.clone()
                ids[0] = (ids[0] + MIXTRAL.num_experts // 2) % MIXTRAL.num_experts  # the other rank's
            return forward(hidden, ids, weights)

        layers[1].forward = chosen
        for number in range(3):
            model.zero_grad()
            step(model, rank, number)
        return {name: p.grad.clone() for name, p in trainable(model).items() if p.grad is not None}

    for found, wanted in zip(
        *(results(on_ranks(2, lambda rank, other=other: work(rank, other))) for other in (True, False)), strict=True
    ):
        assert found.keys() == wanted.keys()
        for name, value in found.items():
            assert torch.equal(value, wanted[name]), name


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
