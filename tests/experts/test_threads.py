"""Several threads call several layers."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from tests.support.cases import Case
from tests.support.helpers import MIXTRAL
from tests.support.layers import forward_backward, random_lora, set_lora
from tests.support.one_layer import expected_grads, inputs
from tests.support.patched import adapted_layers, adapted_model
from tests.support.reference import assert_all_close


def test_calls_of_several_threads_come_one_after_the_other(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of several threads to several layers never run beside each other, and each gets its own results."""
    model = adapted_model(MIXTRAL, case)
    layers, busy, overlaps = model._kt_wrappers, threading.Lock(), []

    def watch(backend: Any, name: str) -> None:
        original = getattr(backend, name)

        def alone(*args: Any, **kwargs: Any) -> Any:
            if not busy.acquire(blocking=False):
                overlaps.append(name)
                return original(*args, **kwargs)
            try:
                time.sleep(0.002)
                return original(*args, **kwargs)
            finally:
                busy.release()

        monkeypatch.setattr(backend, name, alone)

    for layer in layers:
        for name in ("forward", "backward", "set_lora"):
            watch(layer._runner.backend, name)
    bases = [base for _, base in adapted_layers(MIXTRAL, case)]
    failures: list[BaseException] = []

    def work(index: int) -> None:
        try:
            for seed in range(6):
                x, lora = inputs(case, seed), random_lora(MIXTRAL, seed)
                set_lora(layers[index], lora)
                actual = forward_backward(layers[index], x)
                assert_all_close(actual.grads, expected_grads(x, bases[index], lora), case.grad)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert not overlaps
