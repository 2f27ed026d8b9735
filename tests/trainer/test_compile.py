"""torch.compile of a patched model: the graph breaks at the experts, the numbers are the uncompiled model's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from tests.support.cases import KERNEL_BF16, TORCH_FP32, Case
from tests.support.helpers import MIXTRAL
from tests.support.models import FAMILIES
from tests.support.patched import fill_lora, gradients_of, logits_of, loss_of
from tests.support.reference import assert_all_close, relative_error
from tests.support.stock import pair
from tests.support.trainers import model_to_train, result, trainer_for

pytestmark = pytest.mark.slow

# What fusing may change: the order of sums, in bf16 the roundings in between.
SAME = {torch.float32: 1e-5, torch.bfloat16: 0.02}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# A compilation of the smallest model takes seconds: two families here, the slower backends further down.
@pytest.mark.parametrize("name", ["mixtral", pytest.param("deepseek_v3", marks=pytest.mark.slow)])
def test_graphs_and_gradients(name: str, case: Case) -> None:
    """More than one graph, so the experts are between them; gradients of every LoRA tensor."""
    family = FAMILIES[name]
    model, _ = pair(family, case, std=0.05)
    ids = family.inputs()
    expected, logits = gradients_of(model, loss_of(model, ids)), logits_of(model, ids)
    counter = CompileCounter()
    compiled: Any = torch.compile(model, backend=counter)
    assert relative_error(logits_of(compiled, ids), logits) <= SAME[case.dtype]
    assert_all_close(gradients_of(model, loss_of(compiled, ids)), expected, SAME[case.dtype])
    assert counter.frame_count > len(family.moe_layers)


@pytest.mark.slow
def test_backward_graphs(case: Case) -> None:
    """aot_eager traces the backward as well."""
    model, _ = pair(MIXTRAL, case, std=0.05)
    ids = MIXTRAL.inputs()
    expected = gradients_of(model, loss_of(model, ids))
    compiled: Any = torch.compile(model, backend="aot_eager")
    assert_all_close(gradients_of(model, loss_of(compiled, ids)), expected, SAME[case.dtype])


def test_nothing_is_baked_in(case: Case) -> None:
    """New LoRA values, another adapter state, other lengths: seen by a model that was compiled before."""
    model, _ = pair(MIXTRAL, case, std=0.05)
    compiled: Any = torch.compile(model, backend="eager")
    logits_of(compiled, MIXTRAL.inputs())
    for seed, length in enumerate((12, 5)):
        fill_lora(model, seed)
        ids = MIXTRAL.inputs(2, length, seed=9)
        assert relative_error(logits_of(compiled, ids), logits_of(model, ids)) <= SAME[case.dtype]
        with model.disable_adapter():
            assert relative_error(logits_of(compiled, ids), logits_of(model, ids)) <= SAME[case.dtype]


@pytest.mark.slow
def test_trainers_own_switch(case: Case, tmp_path: Path) -> None:
    runs = []
    for overrides in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        trainer = trainer_for(model_to_train(case), tmp_path, max_steps=4, **overrides)
        trainer.train()
        runs.append(result(trainer))
    assert max(runs[0].losses) - min(runs[0].losses) > 0.05
    if case is TORCH_FP32:
        assert runs[1].losses == pytest.approx(runs[0].losses, abs=1e-4)
    else:
        assert runs[1].losses == pytest.approx(runs[0].losses, abs=0.1)
    assert set(runs[1].parameters) == set(runs[0].parameters)


def test_a_full_graph_is_refused(backend: str) -> None:
    """fullgraph=True forbids the break at the experts: an error of the compiler's, not a wrong graph."""
    model, _ = pair(MIXTRAL, TORCH_FP32 if backend == "torch" else KERNEL_BF16)
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        loss_of(compiled, MIXTRAL.inputs())


@pytest.mark.slow
def test_inductor(case: Case) -> None:
    """The default backend, which needs a C++ compiler. It rounds bf16 less often, which may send a token elsewhere: the
    gradients are those of inputs that go to the same experts."""
    model, _ = pair(MIXTRAL, case, std=0.05)
    compiled: Any = torch.compile(model)
    chosen: list[list[int]] = []
    for layer in model._kt_wrappers:
        layer.register_forward_pre_hook(lambda _, args: chosen.append(args[1].sort()[0].flatten().tolist()))
    compared = 0
    for seed in range(8):
        ids = MIXTRAL.inputs(seed=seed)
        chosen.clear()
        expected, actual = (gradients_of(model, loss_of(called, ids)) for called in (model, compiled))
        half = len(chosen) // 2
        assert half == len(model._kt_wrappers)
        if chosen[:half] == chosen[half:]:
            compared += 1
            assert_all_close(actual, expected, 3 * SAME[case.dtype])
    assert compared >= 2
