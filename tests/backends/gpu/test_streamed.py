"""Three tiers with a real GPU: streamed experts against the reference, and buffers that a slow GPU must not lose."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from kt_hf import KTAMXError
from kt_hf.backends.gpu import grouped_mm as grouped
from kt_hf.backends.gpu import weight_stream as streamer
from kt_hf.backends.gpu.pinned_weights import HostWeights, lock_pages
from kt_hf.backends.gpu.streamed import StreamedBackend
from kt_hf.backends.gpu.weight_stream import Streamer
from kt_hf.placement import packer as packing
from kt_hf.placement.calibration import measure_rates
from kt_hf.shapes import LORA_NAMES, ExpertShape
from kt_hf.system.cpu import plan_threads
from tests.support.cases import KERNEL_BF16, KERNEL_MARKS, TORCH_BF16, Case
from tests.support.helpers import MIXTRAL
from tests.support.layers import LayerInputs, forward_backward, gradients, make_inputs, on_gpu, random_lora, set_lora
from tests.support.models import base_weights
from tests.support.one_layer import expected_grads
from tests.support.patched import adapted_model, fill_lora, gradients_of, logits_of, loss_of
from tests.support.reference import LayerResult, assert_all_close, assert_close, experts_forward_backward
from tests.support.tiered import E, layer_weights, tiered_model

CASES = [pytest.param(KERNEL_BF16, marks=KERNEL_MARKS, id="AMXBF16"), pytest.param(TORCH_BF16, id="torch")]
ALL = list(range(E))
ONE = 3 * MIXTRAL.hidden * MIXTRAL.intermediate * 2  # bytes of an expert
THREE = ([1, 4], [0, 6, 7])
TIERS = [THREE, ([], [0, 5]), ([], ALL), ([2, 3], [0, 1, 4, 5, 6, 7])]
SLEEP = 2_000_000  # cycles: about a millisecond


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    original = streamer.Streamer
    monkeypatch.setattr(packing, "Streamer", lambda device, *_: original(device, 2 * ONE))


@pytest.fixture
def no_hidden_waits() -> Iterator[None]:
    """PyTorch raises where an operation waits for the GPU without being asked to."""
    before = torch.cuda.get_sync_debug_mode()
    yield
    torch.cuda.set_sync_debug_mode(before)


def tiered_layer(
    case: Case, tiers: tuple[list[int], list[int]], where: str = "cpu", **config: Any
) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    layer = tiered_model(case, *tiers, kt_moe_lora_device=where, **config).cuda()._kt_wrappers[0]
    base, lora = base_weights(MIXTRAL(case.dtype))[0], random_lora(MIXTRAL)
    set_lora(layer, {name: value.to("cuda" if where == "gpu" else "cpu") for name, value in lora.items()})
    return layer, base, lora


def check(case: Case, actual: LayerResult, x: LayerInputs, base: Any, lora: Any) -> None:
    expected = experts_forward_backward(*x, base, lora, 1.5)
    assert actual.output.is_cuda
    assert_close(actual.output, expected.output, case.forward, "output")
    assert_all_close({name: grad.cpu() for name, grad in actual.grads.items()}, expected.grads, case.grad)


def backend(layer: int = 0, chunk: int = 2 * ONE, buffers: int = 3) -> StreamedBackend:
    shape = ExpertShape(E, MIXTRAL.top_k, MIXTRAL.hidden, MIXTRAL.intermediate)
    weights = HostWeights.copied(layer_weights(layer), ALL)
    made = StreamedBackend(weights, shape, Streamer(torch.device("cuda", torch.cuda.current_device()), chunk, buffers))
    made.set_lora(tuple(random_lora(MIXTRAL).values()))
    return made


@pytest.mark.parametrize("where", ["cpu", "gpu"])
@pytest.mark.parametrize("tiers", TIERS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_any_placement(case: Case, tiers: tuple[list[int], list[int]], where: str) -> None:
    layer, base, lora = tiered_layer(case, tiers, where)
    for seed in range(4):
        x = make_inputs(MIXTRAL, 37, case.dtype, seed)
        check(case, forward_backward(layer, on_gpu(x)), x, base, lora)


@pytest.mark.parametrize("tiers", TIERS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_few_tokens_and_some_tiers(case: Case, tiers: tuple[list[int], list[int]]) -> None:
    layer, base, lora = tiered_layer(case, tiers)
    for tokens, used in ((0, None), (1, None), (21, [1, 4]), (21, [0, 6, 7]), (21, [2, 3, 5]), (21, [7, 2])):
        x = make_inputs(MIXTRAL, tokens, case.dtype, experts=used)
        check(case, forward_backward(layer, on_gpu(x)), x, base, lora)
    x = make_inputs(MIXTRAL, 21, case.dtype)
    x.ids[::3, 0], x.ids[5] = -1, E
    check(case, forward_backward(layer, on_gpu(x)), x, base, lora)


@pytest.mark.parametrize(
    ("activations", "reentrant"), [("retain", None), ("retain", False), ("retain", True), ("recompute", False)]
)
@pytest.mark.parametrize("tiers", [THREE, ([], ALL)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_whole_model(case: Case, tiers: tuple[list[int], list[int]], activations: str, reentrant: bool | None) -> None:
    ids = MIXTRAL.inputs()
    plain = adapted_model(MIXTRAL, case, seed=1)
    expected, grads = logits_of(plain, ids), gradients_of(plain, loss_of(plain, ids))
    model = tiered_model(case, *tiers, kt_expert_activations=activations).cuda()
    fill_lora(model, seed=1)
    assert_close(logits_of(model, ids.cuda()), expected, 0.06, "logits")
    if reentrant is not None:
        model.train()
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for _ in range(3):
        model.zero_grad()
        loss_of(model, ids.cuda()).backward()
        actual = {name: p.grad.cpu() for name, p in model.named_parameters() if p.requires_grad}
        assert_all_close(actual, grads, 0.12)


@pytest.mark.parametrize("where", ["cpu", "gpu"])
@pytest.mark.parametrize("tiers", TIERS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_nothing_waits_in_secret(
    case: Case, tiers: tuple[list[int], list[int]], where: str, no_hidden_waits: None
) -> None:
    """Forward and backward of a layer wait by events alone, once each way."""
    layer, _, _ = tiered_layer(case, tiers, where)
    x = on_gpu(make_inputs(MIXTRAL, 64, case.dtype))
    for _ in range(2):
        forward_backward(layer, x)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    leaves = {"hidden": x.hidden.detach().requires_grad_(), "weights": x.weights.detach().requires_grad_()}
    output = layer(leaves["hidden"], x.ids, leaves["weights"])
    found = gradients(output, leaves | layer.lora_params, x.grad_output)
    torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(value).all() for value in found.values())


def test_the_host_does_not_wait_for_the_products() -> None:
    """A forward with its counts, and its backward, are launched while the GPU has yet to begin."""
    one, x = backend(), on_gpu(make_inputs(MIXTRAL, 64, torch.bfloat16))
    counts = one.row_counts(x.ids).tolist()
    one.backward(one.forward_counted(x.hidden, x.ids, x.weights.float(), True, counts)[1], x.grad_output)
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second
    begun = torch.cuda.Event()
    begun.record()
    _, saved = one.forward_counted(x.hidden, x.ids, x.weights.float(), True, counts)
    assert saved is not None
    one.backward(saved, x.grad_output)
    assert not begun.query(), "something waited for the GPU"
    torch.cuda.synchronize()


@pytest.mark.parametrize("slow", ["products", "copies", "neither"])
@pytest.mark.parametrize(("chunk", "buffers"), [(ONE, 1), (ONE, 2), (ONE, 3), (3 * ONE, 3)])
def test_buffers_are_used_again_only_when_they_may_be(
    slow: str, chunk: int, buffers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products that lag behind the copies, and copies behind the products; several rounds without a wait."""
    one, base, lora = (
        backend(chunk=chunk, buffers=buffers),
        base_weights(MIXTRAL(torch.bfloat16))[0],
        random_lora(MIXTRAL),
    )

    def slowed(name: str) -> None:
        original = getattr(grouped, name)
        monkeypatch.setattr(grouped, name, lambda *args: (torch.cuda._sleep(SLEEP), original(*args))[1])

    if slow == "products":
        slowed("outputs")
        slowed("gradients")
    if slow == "copies":
        copy = Streamer._copy
        monkeypatch.setattr(Streamer, "_copy", lambda self, a, b: (torch.cuda._sleep(SLEEP), copy(self, a, b))[1])
    given = [make_inputs(MIXTRAL, 20 + seed, torch.bfloat16, seed, [0, 1, 3, 4, 7][seed % 2 :]) for seed in range(5)]
    there = [on_gpu(x) for x in given]
    found = []
    for x in there:
        counts = one.row_counts(x.ids).tolist()
        out, saved = one.forward_counted(x.hidden, x.ids, x.weights.float(), True, counts)
        assert saved is not None
        found.append((out, one.backward(saved, x.grad_output)))
    for x, (out, grads) in zip(given, found, strict=True):
        expected = experts_forward_backward(*x, base, lora)
        assert_close(out, expected.output, 1e-2, "output")
        named = {"hidden": grads.hidden_states, "weights": grads.top_k_weights}
        named |= dict(zip(LORA_NAMES, grads.lora, strict=True))
        assert_all_close({name: value.cpu() for name, value in named.items()}, expected.grads, 2e-2)


@pytest.mark.parametrize("where", ["cpu", "gpu"])
@pytest.mark.parametrize("tiers", [THREE, ([], ALL)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_many_backwards_without_a_wait_between(case: Case, tiers: tuple[list[int], list[int]], where: str) -> None:
    layer, base, lora = tiered_layer(case, tiers, where)
    given = [make_inputs(MIXTRAL, 30 + seed, case.dtype, seed) for seed in range(6)]
    there = [on_gpu(x) for x in given]
    found = []
    for x in there:
        torch.cuda._sleep(SLEEP)
        found.append(forward_backward(layer, x).grads)
    for x, grads in zip(given, found, strict=True):
        assert_all_close({k: v.cpu() for k, v in grads.items()}, expected_grads(x, base, lora), case.grad)


def test_memory_is_page_locked_in_place_and_given_back() -> None:
    weights = HostWeights.copied(layer_weights(), [3, 1])
    gate_up, down = weights.gate_up, weights.down
    assert gate_up.is_pinned()
    assert down.is_pinned()
    del weights
    gc.collect()
    assert not gate_up.is_pinned()
    assert not down.is_pinned()


def test_memory_taken_over_is_locked_where_it_is() -> None:
    given = layer_weights()
    taken = HostWeights.taken_over(given)
    assert taken.gate_up.is_pinned()
    assert taken.down.is_pinned()
    assert torch.equal(taken.down, given.down)


def test_a_refusal_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: object) -> None:
        raise RuntimeError("CUDA error: out of memory")

    torch.zeros(1, device="cuda")
    tensor = torch.zeros(1 << 22, dtype=torch.bfloat16)
    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "check_error", refused)
        with pytest.raises(KTAMXError, match=r"cannot be page-locked.*out of memory.*ulimit -l"):
            lock_pages(tensor)
    torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())


def test_a_model_that_goes_while_copies_are_under_way() -> None:
    """What is sent ahead of a layer that never comes writes to nobody's memory."""
    one, x = backend(), on_gpu(make_inputs(MIXTRAL, 64, torch.bfloat16))
    for _ in range(3):
        one.forward(x.hidden, x.ids, x.weights.float(), save=False)
    with torch.cuda.stream(one._streamer._stream):
        torch.cuda._sleep(50 * SLEEP)
    one.forward(x.hidden, x.ids, x.weights.float(), save=False)
    del one
    gc.collect()
    fresh = [torch.zeros(2 * ONE // 2, dtype=torch.bfloat16, device="cuda") for _ in range(6)]
    torch.cuda.synchronize()
    assert not any(t.any() for t in fresh)


def test_copies_are_timed() -> None:
    """The copies themselves, wherever they are in the queue; none after."""
    one = streamer.Streamer(torch.device("cuda", torch.cuda.current_device()), 2 * ONE)
    weights = HostWeights.taken_over(layer_weights())
    one.watch()
    for _ in one.chunks(weights, [1] * E, backward=False):
        torch.cuda._sleep(SLEEP)
    assert 0 < one.watched() < 1e-3
    for _ in one.chunks(weights, [1] * E, backward=False):
        pass
    assert one.watched() == 0


@pytest.mark.parametrize("name", [pytest.param("AMXBF16", marks=KERNEL_MARKS), "torch"])
def test_measured_rates(name: str) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    rates = measure_rates(ExpertShape(16, 4, 512, 256), device, plan_threads(None, False), name)
    assert 1e9 < rates.pcie_bytes_per_s < 1e12
    for rows in (rates.gpu_forward_rows_per_s, rates.gpu_backward_rows_per_s):
        assert 1e4 < rows < 1e9
