"""`StreamedBackend` and `Streamer`, on the CPU: with weights in place, and with copies through real buffers."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from kt_hf import KTAMXConfigError, KTAMXError
from kt_hf.backends import ExpertWeights
from kt_hf.backends.gpu.pinned_weights import HostWeights
from kt_hf.backends.gpu.streamed import StreamedBackend
from kt_hf.backends.gpu.weight_stream import Streamer
from kt_hf.shapes import LORA_NAMES, ExpertShape
from tests.support.helpers import MIXTRAL
from tests.support.layers import LayerInputs, make_inputs, random_lora
from tests.support.models import base_weights
from tests.support.reference import assert_all_close, assert_close, experts_forward_backward
from tests.support.tiered import E, Watched, layer_weights

pytestmark = pytest.mark.usefixtures("cpu_for_gpu")

K, H, I = MIXTRAL.top_k, MIXTRAL.hidden, MIXTRAL.intermediate  # noqa: E741
ONE = 3 * H * I * 2  # bytes of an expert
CPU = torch.device("cpu")
FORWARD, GRAD = 1e-2, 2e-2


def backend(streamer: Streamer, layer: int = 0) -> StreamedBackend:
    return StreamedBackend(HostWeights.taken_over(layer_weights(layer)), ExpertShape(E, K, H, I), streamer)


def results(one: StreamedBackend, x: LayerInputs) -> tuple[Tensor, dict[str, Tensor]]:
    out, saved = one.forward(x.hidden, x.ids, x.weights.float(), save=True)
    assert saved is not None
    assert one.can_backward(saved)
    found = one.backward(saved, x.grad_output)
    grads = {"hidden": found.hidden_states, "weights": found.top_k_weights}
    return out, grads | dict(zip(LORA_NAMES, found.lora, strict=bool(found.lora)))


def check(one: StreamedBackend, x: LayerInputs, base: object, lora: dict[str, Tensor] | None) -> None:
    out, grads = results(one, x)
    expected = experts_forward_backward(*x, base, lora)
    assert_close(out, expected.output, FORWARD, "output")
    assert_all_close(grads, expected.grads, GRAD)


def streamers() -> Iterator[Streamer]:
    for size in (1, ONE, 3 * ONE, 100 * ONE):
        yield Streamer(CPU, size)
        for buffers in (1, 2, 3):
            yield Watched(size, buffers)


@pytest.mark.parametrize("rank", [0, 8, 12])
def test_against_the_reference(rank: int) -> None:
    """Chunks of one expert, of some, of all; rows of no expert; experts without rows."""
    base = base_weights(MIXTRAL(torch.bfloat16))[0]
    lora = random_lora(MIXTRAL, rank=rank) if rank else None
    for streamer in streamers():
        one = backend(streamer)
        one.set_lora(tuple(lora.values()) if lora else ())
        assert one.rank == rank
        for used in (None, [0, 3, 4], [7, 6]):
            x = make_inputs(MIXTRAL, 37, torch.bfloat16, experts=used)
            x.ids[::4, 0] = -1
            check(one, x, base, lora)


def test_no_row_at_all_copies_nothing() -> None:
    streamer = Watched(2 * ONE)
    one = backend(streamer)
    one.set_lora(tuple(random_lora(MIXTRAL).values()))
    for tokens in (0, 5):
        x = make_inputs(MIXTRAL, tokens, torch.bfloat16)
        x.ids.fill_(-1)
        out, grads = results(one, x)
        assert out.shape == (tokens, H)
        assert not out.any()
        assert not any(grad.any() for grad in grads.values())
    assert not streamer.copied


def test_experts_without_rows_are_not_copied() -> None:
    streamer = Watched(4 * ONE)
    one = backend(streamer)
    x = make_inputs(MIXTRAL, 21, torch.bfloat16, experts=[1, 4, 6])
    one.forward(x.hidden, x.ids, x.weights.float(), save=False)
    assert streamer.experts(one.weights) == [1, 4, 6]


def test_a_layer_of_one_chunk_is_computed_without_counts() -> None:
    """Where there are rows enough for all experts: the host need not wait for their numbers. The bits are the same."""
    lora = tuple(random_lora(MIXTRAL).values())
    for tokens, counted in ((16 * E // K, False), (16 * E // K - 1, True)):
        streamer = Watched(100 * ONE)
        one = backend(streamer)
        one.set_lora(lora)
        x = make_inputs(MIXTRAL, tokens, torch.bfloat16, experts=[e for e in range(E) if e != 3])
        out, grads = results(one, x)
        saved: Any = one.forward(x.hidden, x.ids, x.weights.float(), save=True)[1]
        assert (saved.counts is not None) == counted
        assert set(streamer.experts(one.weights)) == {e for e in range(E) if e != 3 or not counted}
        chunked = backend(Watched(3 * ONE))
        chunked.set_lora(lora)
        expected, expected_grads = results(chunked, x)
        assert torch.equal(out, expected)
        assert all(torch.equal(grads[name], expected_grads[name]) for name in grads)


def test_a_saved_forward_without_counts_goes_back_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    streamer = Watched(100 * ONE)
    one = backend(streamer)
    one.set_lora(tuple(random_lora(MIXTRAL).values()))
    x = make_inputs(MIXTRAL, 16 * E, torch.bfloat16)
    expected, expected_grads = results(one, x)
    out, saved = one.forward(x.hidden, x.ids, x.weights.float(), save=True)
    assert saved is not None
    assert saved.counts is None  # type: ignore[attr-defined]
    monkeypatch.setattr(streamer, "in_one_chunk", lambda weights: False)
    found = one.backward(saved, x.grad_output)
    assert torch.equal(out, expected)
    assert torch.equal(found.hidden_states, expected_grads["hidden"])


def test_weights_are_taken_over_or_copied() -> None:
    weights = layer_weights()
    assert HostWeights.taken_over(weights).down.data_ptr() == weights.down.data_ptr()
    some = HostWeights.copied(weights, [5, 2])
    assert torch.equal(some.gate_up, weights.gate_up[[5, 2]])
    assert torch.equal(some.down, weights.down[[5, 2]])
    assert some.gate_up.data_ptr() % 4096 == some.down.data_ptr() % 4096 == 0
    wide = ExpertWeights(weights.gate_up.float(), weights.down.float())
    assert HostWeights.taken_over(wide).down.dtype == torch.bfloat16


def test_shapes_that_cannot_be_streamed() -> None:
    weights = HostWeights(torch.zeros(2, 24, 16, dtype=torch.bfloat16), torch.zeros(2, 16, 12, dtype=torch.bfloat16))
    with pytest.raises(KTAMXConfigError, match="multiples of 8"):
        StreamedBackend(weights, ExpertShape(2, 1, 16, 12), Streamer(CPU))


def saved_forward(one: StreamedBackend, x: LayerInputs) -> object:
    return one.forward(x.hidden, x.ids, x.weights.float(), save=True)[1]


def test_what_comes_next_is_sent_for() -> None:
    """From the second round on, the first chunks of a layer are there before it asks."""
    streamer = Watched(2 * ONE)
    layers = [backend(streamer, i) for i in (0, 1)]
    x = make_inputs(MIXTRAL, 64, torch.bfloat16)
    assert len(x.ids.unique()) == E
    steps: list[tuple[StreamedBackend, list[int]]] = []
    for round_ in range(3):
        saved = []
        for one in (*layers, *layers[::-1]):
            ahead = [(c.weights, sorted(c.filled)) for c in streamer._ahead]
            streamer.copied.clear()
            if len(saved) < 2:
                saved.append(saved_forward(one, x))
            else:
                one.backward(saved[layers.index(one)], x.grad_output)  # type: ignore[arg-type]
            if round_ == 2:
                assert [w is one.weights for w, _ in ahead] == [True] * 3, "not the layer that came"
                assert [e for _, experts in ahead for e in experts] == [0, 1, 2, 3, 4, 5]
                steps.append((one, streamer.experts(one.weights)))
    # The last chunk of its own, and the first three of what follows, which may be the same layer.
    for (one, own), (after, _) in itertools.pairwise(steps):
        assert own == ([6, 7] if after is not one else [6, 7, 0, 1, 2, 3, 4, 5])


def test_a_forward_that_checkpointing_repeats_is_not_the_first() -> None:
    """Its backward follows it, where the next layer's forward followed before: both are guessed."""
    streamer = Watched(2 * ONE)
    layers = [backend(streamer, i) for i in (0, 1)]
    x = make_inputs(MIXTRAL, 64, torch.bfloat16)
    for round_ in range(3):
        for i, repeated in ((0, False), (1, False), (1, True), (0, True)):
            first = [c.weights for c in streamer._ahead]
            saved = saved_forward(layers[i], x)
            second = [c.weights for c in streamer._ahead]
            if repeated:
                layers[i].backward(saved, x.grad_output)  # type: ignore[arg-type]
            if round_ == 2:
                guessed = [*first, *(second if repeated else [])]
                assert [w is layers[i].weights for w in guessed] == [True] * len(guessed), "not the layer that came"
                assert len(guessed) == (6 if repeated else 3)


def test_what_was_guessed_is_not_copied_again_and_what_was_not_is() -> None:
    """Other experts have rows than the last time."""
    streamer, base = Watched(2 * ONE), base_weights(MIXTRAL(torch.bfloat16))[0]
    one = backend(streamer)
    for _ in range(3):
        check(one, make_inputs(MIXTRAL, 21, torch.bfloat16, experts=[0, 2, 6]), base, None)
    assert [sorted(c.filled) for c in streamer._ahead] == [[0], [2], [6]]
    streamer.copied.clear()
    x = make_inputs(MIXTRAL, 21, torch.bfloat16, experts=[0, 1, 4, 5, 7])
    saved = saved_forward(one, x)
    assert streamer.experts(one.weights)[:5] == [1, 4, 5, 7, 0], "1 beside 0, which was there; 7 beside 6; then a guess"
    assert saved is not None
    check(one, x, base, None)


def test_a_decoded_token_copies_the_experts_it_chose_alone() -> None:
    """The last token's experts are no guess of the next one's: copies of them would delay those that are needed."""
    streamer = Watched(2 * ONE)
    layers = [backend(streamer, i) for i in (0, 1)]
    for token in range(8):
        x = make_inputs(MIXTRAL, 1, torch.bfloat16, token)
        for one in layers:
            streamer.copied.clear()
            one.forward(x.hidden, x.ids, x.weights.float(), save=False)
            assert sorted(streamer.experts(one.weights)) == sorted(x.ids[0].tolist())
            assert not streamer._ahead
            assert len(streamer.copied) <= 2 * K


@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_calls_is_right(seed: int) -> None:
    """Layers, directions and experts at random: guesses that fail and guesses that hold."""
    rng = random.Random(seed)
    streamer = Watched(rng.choice([1, 2, 3]) * ONE, rng.choice([1, 2, 3]))
    layers = [backend(streamer, i) for i in (0, 1)]
    bases, lora = base_weights(MIXTRAL(torch.bfloat16)), random_lora(MIXTRAL)
    for one in layers:
        one.set_lora(tuple(lora.values()))
    open_: list[tuple[int, LayerInputs, object]] = []
    for turn in range(24):
        if open_ and rng.random() < 0.5:
            i, x, saved = open_.pop(rng.randrange(len(open_)))
            found = layers[i].backward(saved, x.grad_output)  # type: ignore[arg-type]
            grads = {"hidden": found.hidden_states} | dict(zip(LORA_NAMES, found.lora, strict=True))
            expected = experts_forward_backward(*x, bases[i], lora).grads
            assert_all_close(grads, {name: expected[name] for name in grads}, GRAD)
        else:
            i, used = rng.randrange(2), rng.sample(range(E), rng.randint(2, E))
            x = make_inputs(MIXTRAL, rng.randint(1, 30), torch.bfloat16, turn, used)
            out, saved = layers[i].forward(x.hidden, x.ids, x.weights.float(), save=True)
            assert_close(out, experts_forward_backward(*x, bases[i], lora).output, FORWARD, "output")
            open_.append((i, x, saved))


def test_a_call_that_ends_early_leaves_the_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    streamer, base = Watched(ONE), base_weights(MIXTRAL(torch.bfloat16))[0]
    one, x = backend(streamer), make_inputs(MIXTRAL, 37, torch.bfloat16)
    check(one, x, base, None)
    with monkeypatch.context() as patched:
        patched.setattr("kt_hf.backends.gpu.grouped_mm.outputs", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            saved_forward(one, x)
    assert len(streamer._idle) + len(streamer._ahead) == 3
    check(one, x, base, None)


@pytest.mark.parametrize("before", [False, True])
def test_running_out_of_memory_for_the_buffers(before: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A smaller batch is tried then, and has to find everything in order."""
    streamer, base = Watched(1 << 30), base_weights(MIXTRAL(torch.bfloat16))[0]
    if before:  # buffers of a smaller layer
        small = HostWeights(torch.ones(2, 32, 16, dtype=torch.bfloat16), torch.ones(2, 16, 16, dtype=torch.bfloat16))
        first = StreamedBackend(small, ExpertShape(2, 1, 16, 16), streamer)
        first.forward(torch.ones(3, 16).bfloat16(), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1), save=False)
    one, x, empty, made = backend(streamer), make_inputs(MIXTRAL, 37, torch.bfloat16), torch.empty, [0]

    def scarce(*size: int, **kwargs: Any) -> Tensor:
        made[0] += size == (E * ONE,)
        if made[0] == 2:
            made[0] += 1
            raise torch.cuda.OutOfMemoryError("no memory")
        return empty(*size, **kwargs)

    monkeypatch.setattr(torch, "empty", scarce)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        saved_forward(one, x)
    check(one, x, base, None)


def test_layers_of_other_sizes_share_the_buffers() -> None:
    streamer = Watched(1 << 30)
    small = HostWeights(torch.ones(2, 32, 16, dtype=torch.bfloat16), torch.ones(2, 16, 16, dtype=torch.bfloat16))
    first, one = StreamedBackend(small, ExpertShape(2, 1, 16, 16), streamer), backend(streamer)
    for _ in range(2):
        x = torch.ones(3, 16, dtype=torch.bfloat16)
        first.forward(x, torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1), save=False)
        check(one, make_inputs(MIXTRAL, 9, torch.bfloat16), base_weights(MIXTRAL(torch.bfloat16))[0], None)


@pytest.mark.parametrize("moves", ["before", "between", "back between"])
@pytest.mark.parametrize("rank", [0, 12])
def test_a_layer_on_the_gpu_computes_the_same_to_the_bit(moves: str, rank: int) -> None:
    """Moved before a forward, or between it and its backward, either way."""
    streamer = Watched(2 * ONE)
    one = backend(streamer)
    one.set_lora(tuple(random_lora(MIXTRAL, rank=rank).values()) if rank else ())
    x = make_inputs(MIXTRAL, 37, torch.bfloat16)
    x.ids[::4, 0] = -1
    expected, expected_grads = results(one, x)
    streamer.copied.clear()
    if moves != "between":
        one.weights.to_gpu(CPU)
    out, saved = one.forward(x.hidden, x.ids, x.weights.float(), save=True)
    (one.weights.to_gpu if moves == "between" else lambda _: one.weights.to_host() if moves != "before" else None)(CPU)
    copied_forward = streamer.experts(one.weights)
    assert saved is not None
    found = one.backward(saved, x.grad_output)
    grads = {"hidden": found.hidden_states, "weights": found.top_k_weights}
    grads |= dict(zip(LORA_NAMES, found.lora, strict=bool(found.lora)))
    assert torch.equal(out, expected)
    assert all(torch.equal(grads[name], expected_grads[name]) for name in expected_grads)
    assert bool(copied_forward) == (moves == "between")
    assert bool(streamer.copied) == (moves == "back between")


def test_copies_go_on_past_layers_on_the_gpu() -> None:
    """The middle one of three layers is moved to the GPU: what is sent for ahead of it is the last one's."""
    streamer = Watched(2 * ONE)
    layers = [backend(streamer, i % 2) for i in range(3)]
    x = make_inputs(MIXTRAL, 64, torch.bfloat16)
    for round_ in range(4):
        if round_ == 3:
            layers[1].weights.to_gpu(CPU)
        for i, one in enumerate(layers):
            ahead = [c.weights for c in streamer._ahead]
            saved_forward(one, x)
            if round_ == 3 and i:
                assert [w is layers[2].weights for w in ahead] == [True] * 3
    assert [w is layers[0].weights for w in [c.weights for c in streamer._ahead]] == [True] * 3


def test_buffers_left_are_filled_for_the_layers_after_the_next() -> None:
    """Layers of one chunk, three buffers: three layers are on their way."""
    streamer = Watched(E * ONE)
    layers = [backend(streamer, i % 2) for i in range(4)]
    x = make_inputs(MIXTRAL, 64, torch.bfloat16)
    for _ in range(3):
        for one in layers:
            saved_forward(one, x)
    ahead = [c.weights for c in streamer._ahead]
    assert [w is one.weights for w, one in zip(ahead, layers[:3], strict=True)] == [True] * 3
    streamer.copied.clear()
    saved_forward(layers[0], x)
    assert not streamer.experts(layers[0].weights)


def test_memory_that_cannot_be_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error, or ordinary memory and the reason."""

    def refuse(_: Tensor) -> bool:
        raise KTAMXError("no more locked memory")

    monkeypatch.setattr("kt_hf.backends.gpu.pinned_weights.lock_pages", refuse)
    with pytest.raises(KTAMXError, match="no more locked memory"):
        HostWeights.taken_over(layer_weights())
    weights = HostWeights.taken_over(layer_weights(), must_lock=False)
    assert weights.refusal == "no more locked memory"
    one = StreamedBackend(weights, ExpertShape(E, K, H, I), Watched(2 * ONE))
    check(one, make_inputs(MIXTRAL, 9, torch.bfloat16), base_weights(MIXTRAL(torch.bfloat16))[0], None)
