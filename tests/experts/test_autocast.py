"""Under autocast a layer's output has the dtype of its input: an fp32 one would widen all that follows it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kt_hf import apply_kt_moe
from kt_hf.experts import kt_layers
from kt_hf.experts.calls import BY_CALL
from tests.support.autocast import gpu_autocast
from tests.support.cases import TORCH_BF16, make_config
from tests.support.families import VOCAB, tiny
from tests.support.helpers import MIXTRAL
from tests.support.patched import adapted_model
from tests.support.ranks import on_ranks, results

FAMILIES = {
    "routed": "qwen3_moe", "identity": "longcat_flash", "normed": "muse_spark", "batched": "dbrx", "sliced": "llama4",
}  # fmt: skip


def in_and_out(model: Any, ids: torch.Tensor) -> list[tuple[torch.dtype, torch.dtype]]:
    """The dtypes of what goes into each layer of experts and comes out, in a forward and a backward."""
    seen: list[tuple[torch.dtype, torch.dtype]] = []
    for layer in kt_layers(model):
        layer.register_forward_hook(lambda _, given, out: seen.append((given[0].dtype, out.dtype)))
    with gpu_autocast():
        logits = model(input_ids=ids).logits
    logits.float().square().mean().backward()
    return seen


@pytest.mark.parametrize("call", [c if c == "normed" else pytest.param(c, marks=pytest.mark.slow) for c in FAMILIES])
def test_every_call(call: str) -> None:
    assert BY_CALL.keys() - FAMILIES.keys() == {"listed"}, "its forward is that of routed ones"
    torch.manual_seed(0)
    model = apply_kt_moe(tiny(FAMILIES[call]).bfloat16(), make_config("torch"))
    assert {type(layer) for layer in kt_layers(model)} == {BY_CALL[call]}
    model.enable_input_require_grads()
    seen = in_and_out(model, torch.randint(VOCAB, (2, 12)))
    assert seen
    assert all(given == out for given, out in seen)


def test_on_ranks() -> None:
    """What all ranks have for a token is summed outside of the backend, which switches autocast off."""
    ids = MIXTRAL.inputs(2)
    found = results(on_ranks(2, lambda rank: in_and_out(adapted_model(MIXTRAL, TORCH_BF16), ids[rank : rank + 1])))
    assert found[0]
    assert {pair for seen in found for pair in seen} == {(torch.bfloat16, torch.bfloat16)}
