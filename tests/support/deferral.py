"""A model of two ranks whose headers are looked at later, as where experts are on GPUs: the CPU stands for them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kt_hf.experts import tickets
from kt_hf.ranks import Ranks
from tests.support.cases import TORCH_BF16
from tests.support.helpers import MIXTRAL
from tests.support.patched import adapted_model
from tests.support.ranks import fill_whole

STREAMED = {"resident": 0, "streamed": MIXTRAL.num_experts}


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
