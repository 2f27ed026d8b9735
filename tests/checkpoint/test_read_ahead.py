"""`read_ahead`: in order, one ahead, nothing kept, errors in their turn, the thread gone at the end."""

from __future__ import annotations

import threading
import weakref
from contextlib import closing

import pytest

from kt_hf.checkpoint.read_ahead import read_ahead


class Layer:
    """What is read: a number that weak references can follow."""

    def __init__(self, number: int) -> None:
        self.number = number


def test_in_order_and_one_ahead() -> None:
    """While a layer is used the next one is read, and not the one after."""
    begun = [threading.Event() for _ in range(4)]

    def read(number: int) -> Layer:
        begun[number].set()
        return Layer(number)

    for expected, layer in enumerate(read_ahead(range(4), read)):
        assert layer.number == expected
        assert all(event.wait(10) for event in begun[: expected + 2])
        assert not any(event.is_set() for event in begun[expected + 2 :])


def test_a_layer_is_kept_by_its_user_alone() -> None:
    gone = [threading.Event() for _ in range(3)]

    def read(number: int) -> Layer:
        layer = Layer(number)
        weakref.finalize(layer, gone[number].set)
        return layer

    layers = read_ahead(range(3), read)
    for number in range(3):
        layer = next(layers)
        assert not gone[number].is_set()
        del layer
        assert gone[number].wait(10)  # the other thread lets go of it when it gets the time
    assert list(layers) == []


def test_an_error_comes_in_its_turn() -> None:
    layers = read_ahead([1, 0, 2], lambda number: 1 // number)
    assert next(layers) == 1
    with pytest.raises(ZeroDivisionError):
        next(layers)


def test_no_job_is_no_layer() -> None:
    assert list(read_ahead([], lambda job: job)) == []


def test_a_user_who_stops_ends_the_thread() -> None:
    with closing(read_ahead(range(9), lambda number: number)) as layers:
        assert next(layers) == 0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kt_hf-read")]
