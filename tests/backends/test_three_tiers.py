"""Experts resident on the GPU, streamed to it and on the CPU give what all of them on the CPU give."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from kt_hf import KTAMXConfigError, apply_kt_moe, load_kt_model, read_placement
from kt_hf.backends.gpu import weight_stream as streamer
from kt_hf.backends.gpu.streamed import StreamedBackend
from kt_hf.backends.tiered import TieredBackend
from kt_hf.placement import PLACEMENT
from kt_hf.placement import packer as packing
from tests.support.cases import KERNEL_BF16, KERNEL_MARKS, TORCH_BF16, TORCH_FP32, Case, make_config
from tests.support.helpers import MIXTRAL
from tests.support.layers import LayerInputs, forward, forward_backward, gradients, make_inputs, random_lora, set_lora
from tests.support.models import base_weights
from tests.support.one_layer import expected_grads, inputs
from tests.support.patched import adapted_model, gradients_of, logits_of, lora_config, loss_of, patched_model
from tests.support.reference import LayerResult, assert_all_close, assert_close, experts_forward_backward
from tests.support.tiered import E, split_model, tiered_layer, tiered_model

pytestmark = pytest.mark.usefixtures("cpu_for_gpu")

ALL = list(range(E))
PLACEMENTS = (
    ([], [3]), ([], [0, 5]), ([], [1, 2, 3, 4, 6, 7]), ([], ALL), ([2], [3, 6]), ([0, 7], [1, 2]),
    ([4, 5, 6], [0, 1, 7]), ([0, 2, 4, 6], [1, 3, 5, 7]),
)  # fmt: skip
THREE = ([1, 4], [0, 6, 7])
BF16 = [pytest.param(TORCH_BF16, id="torch"), pytest.param(KERNEL_BF16, marks=KERNEL_MARKS, id="AMXBF16")]


@pytest.fixture(autouse=True)
def small_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of two experts, copied through buffers as on a GPU, or used where they are."""
    size, original = 2 * 3 * MIXTRAL.hidden * MIXTRAL.intermediate * 2, streamer.Streamer
    copies = getattr(request, "param", True)
    monkeypatch.setattr(packing, "Streamer", lambda device, *_: original(device, size, copies=copies))


both_ways = pytest.mark.parametrize("small_chunks", [False, True], ids=["in place", "copied"], indirect=True)


@pytest.fixture(params=BF16)
def case(request: pytest.FixtureRequest) -> Case:
    """Only bf16 is streamed."""
    return request.param


def check(case: Case, actual: LayerResult, x: LayerInputs, base: Any, lora: Any) -> None:
    expected = experts_forward_backward(*x, base, lora, 1.5)
    assert_close(actual.output, expected.output, case.forward, "output")
    assert_all_close(actual.grads, expected.grads, case.grad)


@both_ways
@pytest.mark.parametrize(("resident", "streamed"), PLACEMENTS, ids=str)
def test_any_placement(case: Case, resident: list[int], streamed: list[int]) -> None:
    layer, base, lora = tiered_layer(case, resident, streamed)
    for seed in (0, 1):
        x = inputs(case, seed)
        check(case, forward_backward(layer, x), x, base, lora)


@both_ways
@pytest.mark.parametrize("seed", range(4))
def test_random_placements_and_tokens(case: Case, seed: int) -> None:
    rng = random.Random(seed)
    order, on_gpu = rng.sample(ALL, E), rng.choice([2, 3, 4, 5, 6, 8])
    resident = rng.randrange(on_gpu)
    layer, base, lora = tiered_layer(case, order[:resident], order[resident:on_gpu])
    for turn in range(3):
        x = make_inputs(MIXTRAL, rng.randint(2, 50), case.dtype, turn, rng.sample(ALL, rng.randint(2, E)))
        x.ids[:: rng.randint(1, 5), rng.randrange(2)] = rng.choice([-1, E, 2])
        check(case, forward_backward(layer, x), x, base, lora)


@pytest.mark.parametrize("used", [[1, 4], [0, 6, 7], [2, 3, 5], [1, 0], [4, 5], [7, 2]], ids=str)
def test_tokens_of_some_tiers_only(case: Case, used: list[int]) -> None:
    layer, base, lora = tiered_layer(case, *THREE)
    x = make_inputs(MIXTRAL, 21, case.dtype, experts=used)
    actual = forward_backward(layer, x)
    check(case, actual, x, base, lora)
    for name in lora:
        idle = [e for e in range(E) if e not in used]
        assert not actual.grads[name][idle].any(), f"{name}: an expert without tokens has a gradient"


@both_ways
@pytest.mark.parametrize("tokens", [0, 1])
@pytest.mark.parametrize("tiers", [THREE, ([], ALL), ([0, 1], ALL[2:])], ids=str)
def test_few_tokens(case: Case, tiers: tuple[list[int], list[int]], tokens: int) -> None:
    layer, base, lora = tiered_layer(case, *tiers)
    x = make_inputs(MIXTRAL, tokens, case.dtype)
    check(case, forward_backward(layer, x), x, base, lora)


def test_ids_of_no_expert(case: Case) -> None:
    layer, base, lora = tiered_layer(case, *THREE)
    x = inputs(case)
    x.ids[::3, 0], x.ids[::5, 1], x.ids[7] = -1, E, -1
    check(case, forward_backward(layer, x), x, base, lora)


@both_ways
def test_forwards_and_lora_changes_before_the_backwards(case: Case) -> None:
    layer, base, lora = tiered_layer(case, *THREE)
    seen = []
    for seed in range(3):
        lora = random_lora(MIXTRAL, seed)
        set_lora(layer, lora)
        x = make_inputs(MIXTRAL, 11 + 7 * seed, case.dtype, seed)
        seen.append((x, lora, *forward(layer, x)))
        with torch.no_grad():
            layer(*make_inputs(MIXTRAL, 2, case.dtype, seed=9)[:3])
    for x, lora, output, leaves in (seen[1], seen[2], seen[0]):
        assert_all_close(gradients(output, leaves, x.grad_output), expected_grads(x, base, lora), case.grad)


@pytest.mark.parametrize("max_len", [10, 37])
def test_longer_than_a_call(case: Case, max_len: int) -> None:
    layer, base, lora = tiered_layer(case, *THREE, kt_max_len=max_len)
    x = inputs(case)
    check(case, forward_backward(layer, x), x, base, lora)


@pytest.mark.parametrize("activations", ["retain", "recompute"])
@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("tiers", [THREE, ([], ALL)], ids=str)
def test_whole_model(case: Case, tiers: tuple[list[int], list[int]], activations: str, reentrant: bool | None) -> None:
    """Logits and all gradients as with every expert on the CPU; three rounds, so that guesses hold and fail."""
    ids = MIXTRAL.inputs()
    plain = adapted_model(MIXTRAL, case, seed=1)
    expected, grads = logits_of(plain, ids), gradients_of(plain, loss_of(plain, ids))
    model = tiered_model(case, *tiers, seed=1, kt_expert_activations=activations)
    assert_close(logits_of(model, ids), expected, 0.06, "logits")
    if reentrant is not None:
        model.train()
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for _ in range(3):
        model.zero_grad()
        loss_of(model, ids).backward()
        actual = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert_all_close(actual, grads, 0.12)


def test_adapter_switched_off(case: Case) -> None:
    model = tiered_model(case, *THREE, seed=1)
    ids = MIXTRAL.inputs()
    with model.disable_adapter():
        off = logits_of(model, ids)
    assert_close(off, logits_of(MIXTRAL(case.dtype), ids), 0.06, "base")
    assert not torch.equal(off, logits_of(model, ids))


@pytest.mark.parametrize("case", [pytest.param(KERNEL_BF16, marks=KERNEL_MARKS)], ids=str)
def test_gate_overflow_in_the_cpu_tier(case: Case) -> None:
    layer, base, lora = tiered_layer(case, *THREE)
    x = inputs(case)
    x.hidden[5].mul_(60)
    actual = forward_backward(layer, x)
    expected = experts_forward_backward(*x, base, lora, 1.5)
    for name in ("hidden", "weights", *lora):
        assert_close(actual.grads[name], expected.grads[name], 3 * case.grad, name)


def test_gradient_that_is_not_finite_goes_through(case: Case) -> None:
    layer, base, lora = tiered_layer(case, *THREE)
    x = inputs(case)
    grads = forward_backward(layer, x._replace(grad_output=torch.full_like(x.grad_output, float("inf")))).grads
    assert not any(torch.isfinite(grads[name]).all() for name in ("hidden", "weights", *lora))
    check(case, forward_backward(layer, x), x, base, lora)


@pytest.mark.parametrize("failing", ["before", "after"])
@pytest.mark.parametrize("tiers", [THREE, ([], [2, 3])], ids=str)
def test_interrupted_packing(
    case: Case, tiers: tuple[list[int], list[int]], failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while a layer is packed: the next call packs it, and the experts are what they were."""
    original, calls = packing.build_backend, []

    def pack(*args: Any, **kwargs: Any) -> Any:
        calls.append(0)
        built = original(*args, **kwargs) if failing == "after" or len(calls) > 1 else None
        if len(calls) == 1:
            raise KeyboardInterrupt
        return built

    monkeypatch.setattr(packing, "build_backend", pack)
    resident, streamed = tiers
    config = make_config(case.backend, kt_expert_placement={"resident": len(resident), "streamed": len(streamed)})
    counts = {i: torch.tensor([2 * int(e in resident) + int(e in streamed) for e in ALL]) for i in (0, 1)}
    model = apply_kt_moe(MIXTRAL(case.dtype), config, placement=counts)
    with pytest.raises(KeyboardInterrupt):
        get_peft_model(model, lora_config(MIXTRAL))
    layer = model._kt_wrappers[0]
    base, lora = base_weights(MIXTRAL(case.dtype))[0], random_lora(MIXTRAL)
    set_lora(layer, lora)
    x = inputs(case)
    check(case, forward_backward(layer, x), x, base, lora)
    assert isinstance(layer._runner.backend, TieredBackend)


@both_ways
def test_all_streamed_weights_are_taken_over() -> None:
    model = MIXTRAL(torch.bfloat16)
    before = [layer.mlp.experts.down_proj.data_ptr() for layer in model.model.layers]
    config = make_config("torch", kt_expert_placement={"streamed": E}, kt_lora_rank=8)
    backends = [layer._runner.backend for layer in apply_kt_moe(model, config)._kt_wrappers]
    assert all(isinstance(one, StreamedBackend) for one in backends)
    assert [one.weights.down.data_ptr() for one in backends] == before


def test_an_expert_is_held_once(case: Case) -> None:
    """Each part's weights are of its experts alone, and the module's are gone."""
    layer, _, _ = tiered_layer(case, *THREE)
    sizes = [part.backend.weights.down.shape[0] for part in layer._runner.backend.parts[:2]]
    assert sizes == [2, 3]
    assert layer._runner.backend.parts[2].backend.shape.num_experts == 3
    assert not any("gate_up" in name for name, _ in layer.named_parameters())


@pytest.mark.parametrize("placement", ["cpu", "gpu", "auto", {"resident": 0}, {"resident": 3}], ids=str)
def test_other_ways_to_say_it(case: Case, placement: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kt_hf.system.gpu.experts_device", lambda: None if placement == "auto" else torch.device("cpu"))
    config = make_config(case.backend, kt_expert_placement=placement, kt_lora_rank=8)
    layer = apply_kt_moe(MIXTRAL(case.dtype), config)._kt_wrappers[0]
    expected = {"cpu": (0, 0), "gpu": (E, 0), "auto": (0, 0)}.get(str(placement)) or (placement["resident"], 0)
    tiers = layer.factory.tiers
    assert (tiers.resident, tiers.streamed) == expected
    assert isinstance(layer._runner.backend, TieredBackend) == (expected[0] == 3)


@pytest.mark.parametrize(
    ("placement", "words"),
    [
        ({"resident": 5, "streamed": 4}, "has 8 experts. Set resident and streamed together to 8 or less"),
        ({"resident": 9}, "has 8 experts. Set it to 8 or less"),
        ({"resident": 3, "streamed": 4}, "Set resident and streamed together to 8, or to 6 or less"),
    ],
)
def test_too_many(backend: str, placement: dict[str, int], words: str) -> None:
    if backend == "torch" and sum(placement.values()) == 7:
        pytest.skip("PyTorch needs no number of experts")
    with pytest.raises(KTAMXConfigError, match=f"kt_expert_placement=.*{words}"):
        apply_kt_moe(MIXTRAL(torch.bfloat16), make_config(backend, kt_expert_placement=placement))


def test_only_bf16_is_streamed() -> None:
    model = MIXTRAL(TORCH_FP32.dtype)
    config = make_config("torch", kt_expert_placement={"streamed": 2}, kt_lora_rank=8)
    with pytest.raises(KTAMXConfigError, match=r"streamed in bfloat16, this model's are torch.float32"):
        apply_kt_moe(model, config)


@pytest.mark.parametrize("placement", ["gpu", {"resident": 1}, {"streamed": 1}], ids=str)
def test_without_a_gpu_it_is_refused(placement: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kt_hf.system.gpu.experts_device", lambda: None)
    with pytest.raises(KTAMXConfigError, match=r"kt_expert_placement=.* needs a CUDA GPU, and there is none here"):
        apply_kt_moe(MIXTRAL(torch.bfloat16), make_config("torch", kt_expert_placement=placement))


def test_the_adapter_does_not_know(tmp_path: Path) -> None:
    """Files of any placement with the same values are equal; one resumes under another's."""
    tiered, plain = tiered_model(TORCH_BF16, *THREE, seed=1), adapted_model(MIXTRAL, TORCH_BF16, seed=1)
    tiered.save_pretrained(tmp_path / "tiered")
    plain.save_pretrained(tmp_path / "plain")
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("tiered", "plain"))
    assert list(a) == list(b)
    assert all(torch.equal(a[key], b[key]) for key in a)
    ids = MIXTRAL.inputs()
    other = PeftModel.from_pretrained(patched_model(MIXTRAL, TORCH_BF16), tmp_path / "tiered")
    assert torch.equal(logits_of(other, ids), logits_of(plain, ids))
    back = tiered_model(TORCH_BF16, [0], [5, 6])
    back.load_adapter(tmp_path / "plain", "other")
    back.set_adapter("other")
    assert_close(logits_of(back, ids), logits_of(plain, ids), 0.06, "logits")


def test_saved_placement(tmp_path: Path) -> None:
    """The order with how many of each; those of earlier versions are read."""
    tiered_model(TORCH_BF16, *THREE, seed=1).save_pretrained(tmp_path)
    content = json.loads((tmp_path / PLACEMENT).read_text())
    assert (content["resident"], content["streamed"]) == (2, 3)
    found = read_placement(tmp_path)
    assert found is not None
    assert found.order[0][:5] == (1, 4, 0, 6, 7)
    assert found.share == pytest.approx([2 / 7] * 2 + [1 / 7] * 3 + [0] * 3, abs=1e-5)
    for key in ("resident", "streamed", "share"):
        del content[key]
    content["kt_num_gpu_experts"] = 2
    (tmp_path / PLACEMENT).write_text(json.dumps(content))
    older = read_placement(tmp_path)
    assert older is not None
    assert (older.order, older.share) == (found.order, ())
    config = make_config("torch", kt_expert_placement={"resident": 1, "streamed": 2})
    model = get_peft_model(apply_kt_moe(MIXTRAL(torch.bfloat16), config, placement=tmp_path), lora_config(MIXTRAL))
    parts = model._kt_wrappers[0]._runner.backend.parts
    assert [part.experts.tolist() for part in parts] == [[1], [0, 4], [2, 3, 5, 6, 7]]


@both_ways
def test_load_kt_model(tmp_path: Path) -> None:
    MIXTRAL(torch.bfloat16).save_pretrained(tmp_path)
    config = make_config("torch", kt_expert_placement={"resident": 2, "streamed": 3}, kt_lora_rank=8)
    ids = MIXTRAL.inputs()
    expected = logits_of(patched_model(MIXTRAL, TORCH_BF16), ids)
    assert_close(logits_of(load_kt_model(tmp_path, config), ids), expected, 0.06, "logits")
    config = make_config("torch", kt_expert_placement={"streamed": E}, kt_lora_rank=8)
    assert_close(logits_of(load_kt_model(tmp_path, config), ids), expected, 0.06, "logits")


def test_num_gpu_experts_is_the_same_as_resident(case: Case) -> None:
    ids = MIXTRAL.inputs()
    assert torch.equal(
        logits_of(split_model(case, [1, 4, 6], seed=1), ids), logits_of(tiered_model(case, [1, 4, 6], [], seed=1), ids)
    )
