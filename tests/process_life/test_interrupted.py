"""Ctrl-C at any moment of a step or of packing: the next steps are right to the bit."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest
import torch
from peft import get_peft_model

from tests.support.cases import KERNEL_BF16, KERNEL_MARKS
from tests.support.helpers import MIXTRAL
from tests.support.layers import forward_backward, random_lora, set_lora
from tests.support.models import base_weights
from tests.support.one_layer import expected_grads, inputs
from tests.support.patched import adapted_model, lora_config, patched_model
from tests.support.reference import assert_all_close

pytestmark = [*KERNEL_MARKS, pytest.mark.slow]


@contextmanager
def alarm_after(seconds: float) -> Iterator[None]:
    """A KeyboardInterrupt after so long, wherever the code inside is then."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def interrupt_at(line: int) -> Iterator[list[int]]:
    """A KeyboardInterrupt before the Nth line of the package that is run, as a signal may come before any."""
    count = [0]

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        file = frame.f_code.co_filename
        if f"{os.sep}kt_hf{os.sep}" not in file or file.endswith("_native_output.py"):
            return None  # the latter's own clean-up cannot be cut short without harm; it is a few system calls long
        if event == "line":
            count[0] += 1
            if count[0] == line:
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        yield count
    finally:
        sys.settrace(None)


def step_of(model: Any) -> Callable[[], None]:
    """A step of a layer, with new LoRA values, so that they are copied in it as well."""
    layer, x = model._kt_wrappers[0], inputs(KERNEL_BF16)

    def step() -> None:
        set_lora(layer, random_lora(MIXTRAL, seed=1))
        forward_backward(layer, x)

    return step


def assert_good(model: Any, base: Any) -> None:
    """Steps with other values, and with none, against the reference."""
    layer, x = model._kt_wrappers[0], inputs(KERNEL_BF16, seed=3)
    lora = random_lora(MIXTRAL, seed=2)
    set_lora(layer, lora)
    assert_all_close(forward_backward(layer, x).grads, expected_grads(x, base, lora), KERNEL_BF16.grad)
    with model.disable_adapter(), torch.no_grad():
        off = layer(x.hidden, x.ids, x.weights)
    zero = {name: torch.zeros_like(value) if name.endswith("_b") else value for name, value in lora.items()}
    set_lora(layer, zero)
    assert torch.equal(forward_backward(layer, x).output, off)


@pytest.mark.parametrize("what", ["a step", "switched off"])
def test_before_every_line_of_a_step(what: str) -> None:
    model = adapted_model(MIXTRAL, KERNEL_BF16, seed=1)
    base = base_weights(MIXTRAL(KERNEL_BF16.dtype))[0]
    layer, x = model._kt_wrappers[0], inputs(KERNEL_BF16)

    def off() -> None:
        set_lora(layer, random_lora(MIXTRAL, seed=1))
        with torch.no_grad():
            layer(x.hidden, x.ids, x.weights)
            with model.disable_adapter():
                layer(x.hidden, x.ids, x.weights)

    action = step_of(model) if what == "a step" else off
    action()  # buffers that only the first one makes
    with interrupt_at(-1) as count:
        action()
    lines, hits, tried = count[0], 0, 0
    assert lines > 100
    for line in range(1, lines, max(1, lines // 90)):
        tried += 1
        try:
            with interrupt_at(line):
                action()
        except KeyboardInterrupt:
            hits += 1
        assert_good(model, base)
    assert hits > 0.9 * tried  # after a step that was cut short, the next may have fewer lines
    assert torch.get_num_threads() == 1


def test_by_a_signal_during_the_operators_calls() -> None:
    """They hold the interpreter for the whole call, so the exception comes right after one."""
    model = adapted_model(MIXTRAL, KERNEL_BF16, seed=1)
    base, step = base_weights(MIXTRAL(KERNEL_BF16.dtype))[0], step_of(model)
    step()
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    length, hits = min(seconds), 0  # a busy machine makes the steps to come longer, not shorter
    for part in range(1, 30):
        try:
            with alarm_after(length * part / 30):
                step()
        except KeyboardInterrupt:
            hits += 1
        assert_good(model, base)
    assert hits > 5


def test_before_every_line_of_packing() -> None:
    """The layer stays whole and is packed by the next call; standard output is the user's."""
    base = base_weights(MIXTRAL(KERNEL_BF16.dtype))[0]
    output = os.fstat(1)

    def build(line: int) -> tuple[Any, int]:
        model = patched_model(MIXTRAL, KERNEL_BF16)
        for layer in model._kt_wrappers:
            layer.pack = lambda: None  # not yet
        model = get_peft_model(model, lora_config(MIXTRAL))
        for layer in model._kt_wrappers:
            del layer.pack
        layer = model._kt_wrappers[0]
        with interrupt_at(line) as count:
            try:
                layer.pack()
            except KeyboardInterrupt:
                assert layer.packed == (layer.backend_name == "AMXBF16")
        return model, count[0]

    build(-1)
    lines = build(-1)[1]
    assert lines > 50
    for line in range(2, lines, max(1, lines // 50)):
        model, _ = build(line)
        assert (os.fstat(1).st_dev, os.fstat(1).st_ino) == (output.st_dev, output.st_ino)
        assert_good(model, base)
        assert model._kt_wrappers[0].backend_name == "AMXBF16"
