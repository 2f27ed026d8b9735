"""Several patched models in one process, beside each other and one after the other."""

from __future__ import annotations

import gc
import os
import weakref
from typing import Any

import psutil
import pytest
import torch
from peft import PeftModel
from torch import Tensor

from kt_hf.backends import ExpertWeights
from kt_hf.backends.kt_kernel import backend as kt_kernel
from kt_hf.backends.kt_kernel import operator_config
from kt_hf.backends.kt_kernel.engine import Engine
from kt_hf.shapes import ExpertShape
from kt_hf.system.cpu import ThreadPlan
from kt_hf.system.memory import return_freed_memory
from tests.support.cases import KERNEL_MARKS, Case
from tests.support.helpers import MIXTRAL
from tests.support.models import FAMILIES
from tests.support.patched import adapted_model, fill_lora, logits_of, loss_of, patched_model, trainable

QWEN3 = FAMILIES["qwen3_moe"]
kernel = pytest.mark.parametrize("mark", [pytest.param(None, marks=KERNEL_MARKS, id="kernel")])


class Training:
    """A model and its optimizer, a step at a time."""

    def __init__(self, family: Any, case: Case, seed: int, **config: Any) -> None:
        self.family = family
        self.model: PeftModel = adapted_model(family, case, seed=seed, **config)
        self.optimizer = torch.optim.AdamW(trainable(self.model).values(), lr=0.01)
        self.losses: list[float] = []
        self.pending: Tensor | None = None

    def forward(self) -> None:
        self.pending = loss_of(self.model, self.family.inputs(seed=len(self.losses)))

    def finish(self) -> None:
        assert self.pending is not None
        self.pending.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(self.pending.item())
        self.pending = None


@pytest.mark.parametrize("activations", ["retain", "recompute"])
@pytest.mark.parametrize("second", [MIXTRAL, QWEN3], ids=["same", "another family"])
def test_two_models_in_turns(case: Case, second: Any, activations: str) -> None:
    """As each alone, to the bit: forwards of both before a backward of either, and with one pool of saved forwards."""
    config = {"kt_expert_activations": activations}
    makers = [(MIXTRAL, 1), (second, 2)]
    alone = []
    for family, seed in makers:
        one = Training(family, case, seed, **config)
        for _ in range(4):
            one.forward()
            one.finish()
        alone.append(one.losses)
        del one
    both = [Training(family, case, seed, **config) for family, seed in makers]
    for turn in range(4):
        for training in both:
            training.forward()
        for training in both if turn % 2 else reversed(both):
            training.finish()
    assert [training.losses for training in both] == alone
    assert alone[0] != alone[1]


def test_one_of_two_is_deleted(case: Case) -> None:
    first, second = adapted_model(MIXTRAL, case, seed=1), adapted_model(QWEN3, case, seed=2)
    expected = logits_of(second, QWEN3.inputs())
    del first
    gc.collect()
    assert torch.equal(logits_of(second, QWEN3.inputs()), expected)
    third = adapted_model(MIXTRAL, case, seed=3)
    logits_of(third, MIXTRAL.inputs())
    assert torch.equal(logits_of(second, QWEN3.inputs()), expected)


@pytest.mark.parametrize("adapt", [False, True], ids=["patched", "trained"])
def test_a_deleted_model_goes_at_once(case: Case, adapt: bool) -> None:
    """As a stock model does, without the garbage collector: its weights may be most of the machine's memory."""
    gc.collect()
    gc.disable()
    try:
        model = adapted_model(MIXTRAL, case, seed=1) if adapt else patched_model(MIXTRAL, case, kt_lora_rank=8)
        if adapt:
            loss_of(model, MIXTRAL.inputs()).backward()
        base = model.get_base_model() if adapt else model
        layer = model._kt_wrappers[0]
        watched = [weakref.ref(part) for part in (base, layer, layer.gate_proj, layer._runner.backend)]
        del model, base, layer
        assert [ref() for ref in watched] == [None] * 4
    finally:
        gc.enable()


@kernel
def test_deleted_and_made_again(mark: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time the same numbers; no threads, descriptors or operators stay, and no layer_idx is used twice."""
    from tests.support.cases import KERNEL_BF16

    gc.collect()
    keys: list[int] = []
    numbers = operator_config._layer_keys
    monkeypatch.setattr(operator_config, "_layer_keys", iter(lambda: keys.append(next(numbers)) or keys[-1], None))
    process, seen, logits = psutil.Process(), [], []
    for _ in range(5):
        model = adapted_model(MIXTRAL, KERNEL_BF16, seed=1)
        loss_of(model, MIXTRAL.inputs()).backward()
        fill_lora(model, seed=2)
        logits.append(logits_of(model, MIXTRAL.inputs()))
        engine = weakref.ref(model._kt_wrappers[0]._runner.backend.engine)
        alone = engine() is not None and model._kt_cpu_infer is engine()
        del model
        assert alone
        seen.append((len(os.listdir("/proc/self/fd")), process.num_threads()))
    assert len(set(seen[1:])) == 1, seen
    assert all(torch.equal(one, logits[0]) for one in logits)
    assert len(keys) == len(set(keys)) == 10
    assert keys == sorted(keys)


@kernel
@pytest.mark.parametrize("share", [False, True], ids=["copies", "shared"])
def test_memory_of_deleted_layers(mark: None, share: bool) -> None:
    """kt-kernel 0.7.2 never frees the packed weights of the forward, 48 MiB here: nothing else may stay beside them."""
    shape = ExpertShape(16, 2, 512, 1024)
    plan, process, resident = ThreadPlan(((0, 1),)), psutil.Process(), []
    kept = Engine.get(plan)  # the pools of a process stay as long as any layer does
    x, ids, weights = torch.randn(8, 512).to(torch.bfloat16), torch.arange(16).view(8, 2), torch.rand(8, 2)
    for _ in range(6):
        given = ExpertWeights(
            torch.randn(16, 2048, 512).to(torch.bfloat16), torch.randn(16, 512, 1024).to(torch.bfloat16)
        )
        backend = kt_kernel.KTKernelBackend(given, shape, 4, plan, 64, share, False, "layer")
        _, saved = backend.forward(x, ids, weights, save=True)
        backend.backward(saved, x)
        del backend, saved, given
        return_freed_memory()
        resident.append(process.memory_info().rss)
    assert kept is Engine.get(plan)
    assert resident[-1] - resident[1] < 4 * 52 * 2**20, resident
