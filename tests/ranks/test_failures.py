"""What goes wrong on one rank is an error on every rank, soon, in words that name the rank and the layer."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from kt_hf.errors import KTAMXBackwardError, KTAMXConfigError, KTAMXError, KTAMXForwardError
from kt_hf.experts import clip_grad_norm_
from kt_hf.ranks import Kind, Place, Ranks, channel, current_world
from tests.support.cases import TORCH_FP32
from tests.support.helpers import MIXTRAL
from tests.support.patched import adapted_model
from tests.support.ranks import Outcome, fill_whole, on_ranks, results, timed

IDS = MIXTRAL.inputs(1, 6)


def slowly(*case: Any) -> Any:
    return pytest.param(*case, marks=pytest.mark.slow)


def model_of() -> Any:
    model = adapted_model(MIXTRAL, TORCH_FP32)
    fill_whole(model, 1)
    return model.train()


def loss_of(model: Any) -> torch.Tensor:
    return model(input_ids=IDS, labels=IDS).loss


def raise_in(owner: Any, name: str, error: Exception, after: int = 0) -> None:
    """The method raises at its call `after`, as a backend that is out of memory does."""
    original, calls = getattr(owner, name), []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if len(calls) > after:
            raise error
        return original(*args, **kwargs)

    setattr(owner, name, failing)


def outcomes(ranks: int, work: Callable[[int], Any], timeout: float = 20, hosts: int = 1) -> list[Outcome]:
    """What each rank raised, and after how many seconds."""
    return results(on_ranks(ranks, timed(work), timeout, hosts=hosts))


def fails_in_forward(rank: int) -> None:
    model = model_of()
    if rank == 1:
        backend = model.base_model.model._kt_wrappers[1].backend
        raise_in(backend, "forward", torch.OutOfMemoryError("CUDA out of memory"))
    loss_of(model).backward()


def fails_in_backward(rank: int) -> None:
    model = model_of()
    if rank == 1:
        raise_in(model.base_model.model._kt_wrappers[0].backend, "backward", RuntimeError("no luck"))
    loss_of(model).backward()


def gives_nan(rank: int) -> None:
    model = model_of()
    if rank == 1:
        with torch.no_grad():
            model.base_model.model._kt_wrappers[1].down_proj.lora_B.default.weight.fill_(float("nan"))
    loss_of(model).backward()


def gives_nan_in_backward(rank: int) -> None:
    model = model_of()
    if rank == 1:
        backend = model.base_model.model._kt_wrappers[0].backend
        original = backend.backward

        def backward(*args: Any, **kwargs: Any) -> Any:
            gradients = original(*args, **kwargs)
            gradients.hidden_states.fill_(float("nan"))
            return gradients

        backend.backward = backward
    loss_of(model).backward()


def bad_input(rank: int) -> None:
    layer = model_of().base_model.model._kt_wrappers[1]
    ids = torch.zeros(3, 2, dtype=torch.int64)
    layer(torch.randn(3, 64 if rank == 0 else 65), ids, torch.rand(3, 2))


@pytest.mark.parametrize(
    ("work", "layer", "words", "kind"),
    [
        (fails_in_forward, 1, "CUDA out of memory", KTAMXForwardError),
        slowly(fails_in_backward, 0, "no luck", KTAMXBackwardError),
        slowly(gives_nan, 1, "not finite", KTAMXForwardError),
        slowly(gives_nan_in_backward, 0, "hidden_states is not finite", KTAMXBackwardError),
        slowly(bad_input, 1, "hidden_states is", KTAMXForwardError),
    ],
)
def test_an_error_of_one_rank_is_raised_on_all(
    work: Callable[[int], None], layer: int, words: str, kind: type[Exception]
) -> None:
    (told, after), (own, own_after) = outcomes(2, work)
    assert isinstance(told, kind), told
    assert all(part in str(told) for part in ("rank 1 has failed", f"layers.{layer}.mlp.experts", words)), told
    assert own is not None
    assert words in str(own)
    assert max(after, own_after) < 5


def one_more_micro_batch(rank: int) -> None:
    model = model_of()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, 0.01)
    for step in range(2):
        for _ in range(3 if rank == 1 and step == 0 else 2):
            loss_of(model).backward()
        optimizer.step()


def one_more_accumulated(rank: int) -> None:
    model = DistributedDataParallel(model_of())
    count = 3 if rank == 1 else 2
    for micro in range(count):
        if micro < count - 1:
            with model.no_sync():
                loss_of(model).backward()
        else:
            loss_of(model).backward()


def one_more_before_clipping(by: int) -> Callable[[int], None]:
    """Each micro-batch ends in DDP's exchange of gradients, and the next begins with its broadcast of buffers."""

    def one_more(rank: int) -> None:
        model = model_of()
        wrapped = DistributedDataParallel(model)
        for _ in range(2 if rank == by else 1):
            loss_of(wrapped).backward()
        clip_grad_norm_(model.parameters(), 1.0)

    return one_more


def without_gradients(rank: int) -> None:
    model = model_of()
    with torch.set_grad_enabled(rank == 0):
        loss_of(model)


def another_layer(rank: int) -> None:
    layer = model_of().base_model.model._kt_wrappers[rank]
    layer(torch.randn(3, 64), torch.zeros(3, 2, dtype=torch.int64), torch.rand(3, 2))


def saves_alone(rank: int) -> None:
    model = model_of()
    if rank == 0:
        model.save_pretrained("/nonexistent/kt_hf")
    else:
        loss_of(model)


@pytest.mark.parametrize(
    ("work", "words"),
    [
        (one_more_micro_batch, ("layer 0", "step 0", "step 1")),
        slowly(one_more_accumulated, ("the step's last micro-batch", "not the step's last")),
        (one_more_before_clipping(1), ("the beginning of a forward", "the gradient norm")),
        slowly(one_more_before_clipping(0), ("the beginning of a forward", "the gradient norm")),
        slowly(without_gradients, ("with gradients", "without gradients")),
        slowly(another_layer, ("layer 0", "layer 1")),
        slowly(saves_alone, ("the beginning of a save", "forward of layer 0")),
    ],
)
def test_ranks_in_different_places_raise_at_once(work: Callable[[int], None], words: tuple[str, ...]) -> None:
    for error, after in outcomes(2, work):
        assert isinstance(error, KTAMXError), error
        assert "different places" in str(error)
        assert all(f"rank {rank}: " in str(error) for rank in (0, 1)), error
        assert all(word in str(error) for word in words), error
        assert after < 5


@pytest.mark.slow
def test_a_rank_that_stands_still_is_named_after_the_timeout() -> None:
    def work(rank: int) -> None:
        model = model_of()
        loss_of(model)
        if rank == 1:
            time.sleep(6)
            os._exit(0)
        loss_of(model)

    values = on_ranks(2, lambda rank: outcome(rank, work), timeout=2)
    error, after = values[0]
    assert isinstance(error, KTAMXForwardError)
    assert "rank 0 waited in the forward of layer 0" in str(error)
    assert "for rank 1, which has ended or stands still" in str(error)
    assert 1.5 < after < 2 + 5


def is_killed(rank: int, model: Any) -> None:
    if rank == 3:
        os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does with a process that takes too much memory
    loss_of(model).backward()


def fails_elsewhere(rank: int, model: Any) -> None:
    """In a part of the model that knows nothing of ranks, and the script ends."""
    if rank == 3:
        raise_in(model.base_model.model.model.norm, "forward", torch.OutOfMemoryError("CUDA out of memory"))
        with pytest.raises(torch.OutOfMemoryError):
            loss_of(model)
        os._exit(1)
    loss_of(model).backward()


def does_one_batch_less(rank: int, model: Any) -> None:
    if rank == 3:
        os._exit(0)
    loss_of(model).backward()


@pytest.mark.slow
@pytest.mark.parametrize("work", [is_killed, fails_elsewhere, does_one_batch_less])
def test_a_rank_that_ends_is_named_at_once(work: Callable[[int, Any], None]) -> None:
    def after_one(rank: int) -> Outcome:
        model = model_of()
        loss_of(model)
        return outcome(rank, lambda rank: work(rank, model))

    values = on_ranks(4, after_one)
    for error, after in values[:3]:
        assert isinstance(error, KTAMXError), error
        assert re.search(r"layers?.\d.*for rank 3, which has ended", str(error)), error
        assert after < 5


def outcome(rank: int, work: Callable[[int], Any]) -> Outcome:
    begin = time.perf_counter()
    try:
        work(rank)
    except Exception as error:
        error.__cause__ = None
        return error, time.perf_counter() - begin
    return None, time.perf_counter() - begin


@pytest.mark.parametrize("computed", [False, True])
def test_owned_lora_that_was_broadcast_is_refused_at_the_first_step(computed: bool) -> None:
    """The first with DDP, whether or not the model was computed without."""

    def work(rank: int) -> None:
        model = model_of()
        if computed:
            loss_of(model)
        del model.base_model.model._ddp_params_and_buffers_to_ignore
        loss_of(DistributedDataParallel(model))

    for error, _ in outcomes(2, work):
        assert isinstance(error, KTAMXConfigError)
        assert "ranks 0 and 1 hold the same LoRA" in str(error)


@pytest.mark.slow
def test_after_an_error_that_is_caught_the_ranks_go_on() -> None:
    def work(rank: int) -> float:
        model = model_of()
        backend = model.base_model.model._kt_wrappers[1].backend
        original = backend.forward
        if rank == 1:
            raise_in(backend, "forward", torch.OutOfMemoryError("CUDA out of memory"))
        with pytest.raises((KTAMXForwardError, torch.OutOfMemoryError)):
            loss_of(model)
        backend.forward = original
        return float(loss_of(model).detach())

    first, second = results(on_ranks(2, work))
    assert first == second > 0


def test_experts_that_cannot_be_divided_are_refused() -> None:
    def work(rank: int) -> None:
        adapted_model(MIXTRAL, TORCH_FP32)

    for error, _ in outcomes(3, work):
        assert isinstance(error, KTAMXConfigError)
        assert "8 experts cannot be divided evenly among 3 processes" in str(error)
        assert "Start 2, or another number that divides 8" in str(error)


def test_threads_of_gloo_end_before_python_does() -> None:
    """One that is at work when Python ends asks for its lock, and ends the process by SIGABRT."""

    def work(rank: int) -> tuple[int, int, str]:
        ranks = Ranks(current_world())
        before = len(os.listdir("/proc/self/task"))
        ranks.agree(Place(Kind.PLAN))
        during = len(os.listdir("/proc/self/task"))
        channel._end_threads()
        with pytest.raises(KTAMXError, match="the process ends") as error:
            ranks.agree(Place(Kind.PLAN))
        return during - before, len(os.listdir("/proc/self/task")) - before, str(error.value)

    for during, after, _ in results(on_ranks(2, work)):
        assert during > 0
        assert after <= 0
