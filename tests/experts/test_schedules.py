"""A thousand random schedules on one layer: forwards, forwards without gradients, backwards, LoRA updates, switches.

Whatever lies between a forward and its backward, outputs and gradients are those of that forward's inputs and LoRA.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from torch import Tensor
from transformers import MixtralConfig

from tests.support.cases import KERNEL_BF16, KERNEL_MARKS, TORCH_FP32, Case
from tests.support.helpers import MIXTRAL
from tests.support.layers import SCALING, LayerInputs, make_inputs, random_lora, set_lora
from tests.support.models import base_weights
from tests.support.patched import adapted_model, lora_config
from tests.support.reference import experts_forward_backward, relative_error

# Many experts: with few, all are active in every forward, and the operators' stale lists of them do no harm.
MANY = replace(
    MIXTRAL,
    make_config=lambda: MixtralConfig(
        vocab_size=32, hidden_size=256, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=64, num_experts_per_tok=6,
    ),
    hidden=256, intermediate=128, num_experts=64, top_k=6, moe_layers=(0,),
)  # fmt: skip
SEEDS = st.integers(0, 2**16)
TOKENS = st.one_of(st.integers(1, 3), st.integers(4, 64))
EXPERTS = st.one_of(
    st.just(range(MANY.num_experts)),
    st.sets(st.integers(0, MANY.num_experts - 1), min_size=MANY.top_k).map(sorted),
)
ADAPTERS = ("default", "other")


@dataclass(eq=False)
class Outstanding:
    """A forward that waits for its backward."""

    x: LayerInputs
    lora: dict[str, Tensor] | None
    output: Tensor
    leaves: dict[str, Tensor]


def limit(case: Case, name: str, tokens: int) -> float:
    """Twice the layer's, for LoRA and inputs are drawn anew each time; sums of few numbers round to worse in bf16."""
    few = name in ("weights", "output") and tokens < 8
    return 2 * (case.forward if name == "output" else case.grad) * (4 if few else 1)


def machine(case: Case, layers: dict[str, Any]) -> type[RuleBasedStateMachine]:
    """A machine on one layer for all its runs: what one leaves behind must not matter to the next."""

    class Schedule(RuleBasedStateMachine):
        @initialize(activations=st.sampled_from(sorted(layers)), seed=SEEDS)
        def begin(self, activations: str, seed: int) -> None:
            self.model, self.base = layers[activations]
            self.layer = self.model._kt_wrappers[0]
            self.waiting: list[Outstanding] = []
            self.values: dict[str, dict[str, Tensor]] = {}
            self.enabled = True
            self.model.base_model.enable_adapter_layers()
            for adapter in reversed(ADAPTERS):
                self.switch(adapter)
                self.update(seed)

        def lora(self) -> dict[str, Tensor] | None:
            return self.values[self.adapter] if self.enabled else None

        def inputs(self, tokens: int, experts: Sequence[int], seed: int) -> LayerInputs:
            x = make_inputs(MANY, tokens, case.dtype, seed, experts)
            if seed % 7 == 0:
                x.ids[seed % tokens, seed % MANY.top_k] = MANY.num_experts  # the sentinel
            return x

        @rule(tokens=TOKENS, experts=EXPERTS, seed=SEEDS)
        def forward(self, tokens: int, experts: Sequence[int], seed: int) -> None:
            x = self.inputs(tokens, experts, seed)
            leaves = {"hidden": x.hidden.detach().requires_grad_(), "weights": x.weights.detach().requires_grad_()}
            output = self.layer(leaves["hidden"], x.ids, leaves["weights"])
            self.waiting.append(Outstanding(x, copy.copy(self.lora()), output, {**leaves, **self.layer.lora_params}))

        @rule(tokens=TOKENS, experts=EXPERTS, seed=SEEDS)
        def forward_without_gradients(self, tokens: int, experts: Sequence[int], seed: int) -> None:
            x = self.inputs(tokens, experts, seed)
            with torch.no_grad():
                output = self.layer(*x[:3])
            self.compare({"output": output}, Outstanding(x, self.lora(), output, {}))

        @rule(which=st.integers(0, 5), keep=st.booleans())
        def backward(self, which: int, keep: bool) -> None:
            if not self.waiting:
                return
            run = self.waiting[which % len(self.waiting)]
            # PEFT stops the gradients of an adapter that it switches off. This graph was built when it was on.
            stopped = [leaf for leaf in run.leaves.values() if not leaf.requires_grad]
            for leaf in stopped:
                leaf.requires_grad_(True)
            grads = torch.autograd.grad(run.output, list(run.leaves.values()), run.x.grad_output, retain_graph=keep)
            for leaf in stopped:
                leaf.requires_grad_(False)
            if not keep:
                self.waiting.remove(run)
            self.compare({"output": run.output, **dict(zip(run.leaves, grads, strict=True))}, run)

        @rule(seed=SEEDS)
        def update(self, seed: int) -> None:
            """In place, as optimizers do."""
            if self.enabled:
                self.values[self.adapter] = random_lora(MANY, seed)
                set_lora(self.layer, self.values[self.adapter])

        @rule(adapter=st.sampled_from(ADAPTERS))
        def switch(self, adapter: str) -> None:
            self.adapter = adapter
            self.model.set_adapter(adapter)

        @rule(on=st.booleans())
        def enable(self, on: bool) -> None:
            self.enabled = on
            (self.model.base_model.enable_adapter_layers if on else self.model.base_model.disable_adapter_layers)()

        def compare(self, actual: dict[str, Tensor], run: Outstanding) -> None:
            wanted = experts_forward_backward(*run.x, self.base, run.lora, SCALING)
            expected = {"output": wanted.output, **wanted.grads}
            errors = {name: relative_error(value, expected[name]) for name, value in actual.items()}
            tokens = len(run.x.hidden)
            wrong = {name: error for name, error in errors.items() if not error < limit(case, name, tokens)}
            assert not wrong, f"{tokens} tokens: {wrong}"
            schedules[case.backend] = schedules.get(case.backend, 0) + 1

    return Schedule


schedules: dict[str, int] = {}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("case", "examples"),
    [
        (TORCH_FP32, 50),
        pytest.param(KERNEL_BF16, 60, marks=KERNEL_MARKS),
        pytest.param(KERNEL_BF16, 1000, marks=[*KERNEL_MARKS, pytest.mark.slow, pytest.mark.timeout(3600)]),
    ],
    ids=str,
)
def test_any_schedule_is_right(case: Case, examples: int) -> None:
    layers = {}
    for activations in ("retain", "recompute"):
        model = adapted_model(MANY, case, kt_expert_activations=activations)
        model.add_adapter("other", lora_config(MANY))
        layers[activations] = model, base_weights(MANY(case.dtype))[0]
    schedules[case.backend] = 0
    run_state_machine_as_test(
        machine(case, layers),
        settings=settings(
            max_examples=examples, stateful_step_count=16, deadline=None, database=None, derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip
    assert schedules[case.backend] > examples / 2  # results were compared
