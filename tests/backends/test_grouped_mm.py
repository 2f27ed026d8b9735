"""The GPU's backend, `GroupedBackend`, on the CPU: grouped products against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kt_hf import KTAMXConfigError
from kt_hf.backends import ExpertWeights
from kt_hf.backends.gpu import grouped_mm as grouped
from kt_hf.backends.gpu import row_room
from kt_hf.backends.gpu.pinned_weights import HostWeights
from kt_hf.backends.gpu.resident import GroupedBackend, gpu_backend
from kt_hf.backends.gpu.streamed import StreamedBackend
from kt_hf.backends.gpu.weight_stream import Streamer
from kt_hf.shapes import LORA_NAMES, ExpertShape
from tests.support.helpers import MIXTRAL
from tests.support.layers import LayerInputs, make_inputs, random_lora
from tests.support.models import base_weights
from tests.support.reference import assert_all_close, assert_close, experts_forward_backward

pytestmark = pytest.mark.usefixtures("cpu_for_gpu")

E, K, H, I = MIXTRAL.num_experts, MIXTRAL.top_k, MIXTRAL.hidden, MIXTRAL.intermediate  # noqa: E741
FORWARD, GRAD = 1e-2, 2e-2


def backend() -> GroupedBackend:
    experts = MIXTRAL(torch.bfloat16).model.layers[0].mlp.experts
    weights = ExpertWeights(experts.gate_up_proj.detach(), experts.down_proj.detach())
    return GroupedBackend(weights, ExpertShape(E, K, H, I))


def results(one: Any, x: LayerInputs) -> tuple[Tensor, dict[str, Tensor]]:
    out, saved = one.forward(x.hidden, x.ids, x.weights.float(), save=True)
    assert saved is not None
    assert one.can_backward(saved)
    found = one.backward(saved, x.grad_output)
    grads = {"hidden": found.hidden_states, "weights": found.top_k_weights}
    return out, grads | dict(zip(LORA_NAMES, found.lora, strict=bool(found.lora)))


@pytest.mark.parametrize("rank", [0, 1, 4, 8, 12, 40])
def test_against_the_reference(rank: int) -> None:
    """Ranks that are multiples of 8 and that are not; 0 is no LoRA."""
    one, base = backend(), base_weights(MIXTRAL(torch.bfloat16))[0]
    lora = random_lora(MIXTRAL, rank=rank) if rank else None
    one.set_lora(tuple(lora.values()) if lora else ())
    assert one.rank == rank
    x = make_inputs(MIXTRAL, 37, torch.bfloat16)
    out, grads = results(one, x)
    expected = experts_forward_backward(*x, base, lora)
    assert_close(out, expected.output, FORWARD, "output")
    assert_all_close(grads, expected.grads, GRAD)


def test_rows_of_no_expert_contribute_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where grouped products leave NaN in their rows, as they may."""
    one, base, lora = backend(), base_weights(MIXTRAL(torch.bfloat16))[0], random_lora(MIXTRAL)
    one.set_lora(tuple(lora.values()))
    original = grouped._product

    def poisoned(x: Tensor, w: Tensor, rows: grouped.Rows) -> Tensor:
        out = original(x, w, rows)
        out[int(rows.ends[-1]) :] = float("nan")
        return out

    monkeypatch.setattr(grouped, "_product", poisoned)
    x = make_inputs(MIXTRAL, 37, torch.bfloat16, experts=[0, 3, 4])
    x.ids[::2, 0], x.ids[5] = -1, -1
    out, grads = results(one, x)
    expected = experts_forward_backward(*x, base, lora)
    assert_close(out, expected.output, FORWARD, "output")
    assert_all_close(grads, expected.grads, GRAD)
    assert not out[5].any()
    for name in LORA_NAMES:
        assert not grads[name][[1, 2, 5, 6, 7]].any(), f"{name}: an expert without rows has a gradient"


def test_no_row_at_all() -> None:
    one = backend()
    one.set_lora(tuple(random_lora(MIXTRAL).values()))
    x = make_inputs(MIXTRAL, 5, torch.bfloat16)
    x.ids.fill_(-1)
    out, grads = results(one, x)
    assert not out.any()
    assert not any(grad.any() for grad in grads.values())


def test_a_saved_forward_keeps_its_lora() -> None:
    """New values between a forward and its backward are not seen by it."""
    one, base = backend(), base_weights(MIXTRAL(torch.bfloat16))[0]
    lora, x = random_lora(MIXTRAL), make_inputs(MIXTRAL, 37, torch.bfloat16)
    one.set_lora(tuple(lora.values()))
    _, saved = one.forward(x.hidden, x.ids, x.weights, save=True)
    one.set_lora(tuple(random_lora(MIXTRAL, seed=1, rank=16).values()))
    assert saved is not None
    found = one.backward(saved, x.grad_output)
    expected = experts_forward_backward(*x, base, lora)
    assert_all_close(dict(zip(LORA_NAMES, found.lora, strict=True)), {n: expected.grads[n] for n in LORA_NAMES}, GRAD)


def test_lora_copy_gives_back_what_was_set() -> None:
    one, lora = backend(), random_lora(MIXTRAL, rank=12)
    assert one.lora_copy() == ()
    one.set_lora(tuple(lora.values()))
    for given, back in zip(lora.values(), one.lora_copy(), strict=True):
        assert torch.equal(given.bfloat16(), back)


def test_inputs_are_not_written_to() -> None:
    one, x = backend(), make_inputs(MIXTRAL, 37, torch.bfloat16)
    one.set_lora(tuple(random_lora(MIXTRAL).values()))
    before = x.clones()
    results(one, x)
    assert all(torch.equal(a, b) for a, b in zip(x, before, strict=True))


def test_what_it_cannot_compute() -> None:
    weights = ExpertWeights(torch.zeros(2, 24, 16), torch.zeros(2, 16, 12))
    assert gpu_backend(weights, ExpertShape(2, 1, 16, 12)).__class__.__name__ == "TorchBackend"
    with pytest.raises(KTAMXConfigError, match="multiples of 8"):
        GroupedBackend(weights, ExpertShape(2, 1, 16, 12))


@pytest.mark.parametrize("valid", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("streamed", [False, True])
def test_of_several_ranks_tokens_the_rows_of_other_experts_are_left_out(
    streamed: bool, valid: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank gets all ranks' tokens: what it computes is as large as its own rows, and the same to the bit."""
    monkeypatch.setattr(row_room, "_FEW", 0)
    x = make_inputs(MIXTRAL, 48, torch.bfloat16)
    x.ids[torch.rand(x.ids.shape, generator=torch.Generator().manual_seed(0)) >= valid] = -1
    rows, original = list[int](), grouped._product
    monkeypatch.setattr(grouped, "_product", lambda x, w, of: (rows.append(len(x)), original(x, w, of))[1])
    found = []
    for ranks in (1, 4):
        weights = backend().weights
        shape = ExpertShape(E, K, H, I, ranks=ranks)
        one: Any = GroupedBackend(weights, shape)
        if streamed:
            one = StreamedBackend(HostWeights.taken_over(weights), shape, Streamer(torch.device("cpu"), 3 * 6 * H * I))
        one.set_lora(tuple(random_lora(MIXTRAL).values()))
        rows.clear()
        out, grads = results(one, x)
        found.append({"out": out, **grads})
    assert all(torch.equal(value, found[0][name]) for name, value in found[1].items())
    assert max(rows, default=0) <= max(1, int((x.ids >= 0).sum()))
