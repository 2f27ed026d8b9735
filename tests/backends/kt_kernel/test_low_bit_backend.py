"""The operators for low-bit weights: weights as they are stored, and what is refused or dropped."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from kt_hf import KTAMXConfigError, KTAMXNotAvailableError, KTConfig
from kt_hf.backends import OPERATORS, ExpertShape, ExpertWeights, build_backend, choose_backend
from kt_hf.backends.kt_kernel import low_bit_weights
from kt_hf.backends.kt_kernel.low_bit_weights import to_mxfp4
from kt_hf.backends.packed import PackedExperts, PackedMatrices
from kt_hf.backends.quantizer import quantized
from kt_hf.system.cpu import ThreadPlan
from tests.support.cases import KERNEL_MISSING
from tests.support.low_bit_operator import kind_param, missing
from tests.support.reference import (
    LORA_NAMES,
    BaseWeights,
    assert_all_close,
    assert_close,
    experts_forward_backward,
    relative_error,
)

SHAPE = ExpertShape(num_experts=4, top_k=2, hidden_size=256, intermediate_size=128)
E, K, H, I = SHAPE.num_experts, SHAPE.top_k, SHAPE.hidden_size, SHAPE.intermediate_size  # noqa: E741
PLAN = ThreadPlan(((0, 1),))
FORWARD = {"MXFP4": 0.01, "AMXFP8": 0.01, "AMXInt4KGroup": 0.02}
every_kind = pytest.mark.parametrize("kind", [kind_param(kind) for kind in FORWARD])
needs_mxfp4 = pytest.mark.skipif(missing("MXFP4") is not None, reason=str(missing("MXFP4")))


def drawn(*size: int, seed: int = 0, scale: float = 0.1) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale


def packed(kind: str) -> PackedExperts:
    to: Any = {
        "MXFP4": to_mxfp4,
        "AMXFP8": lambda t: quantized(t, "fp8"),
        "AMXInt4KGroup": lambda t: quantized(t, "int4"),
    }
    return PackedExperts(list(range(E)), to[kind](drawn(E, 2 * I, H)), to[kind](drawn(E, H, I, seed=1)))


def stored(experts: PackedExperts) -> ExpertWeights:
    none = torch.empty(0, 2 * I, H, dtype=torch.bfloat16), torch.empty(0, H, I, dtype=torch.bfloat16)
    return ExpertWeights(*none, low_bit=experts)


def build(kind: str, weights: ExpertWeights, rank: int = 8, shape: ExpertShape = SHAPE, plan: ThreadPlan = PLAN) -> Any:
    return build_backend(kind, weights, shape, rank, plan, 512, False, True, "layer 3")


def batch(tokens: int = 50, seed: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ids = torch.rand(tokens, E, generator=torch.Generator().manual_seed(seed)).argsort(1)[:, :K].contiguous()
    weights = torch.rand(tokens, K, generator=torch.Generator().manual_seed(seed)) + 0.1
    return drawn(tokens, H, seed=seed, scale=1).bfloat16(), ids, weights, drawn(tokens, H, seed=9, scale=1).bfloat16()


def check(kind: str, one: Any, experts: PackedExperts, lora: list[Tensor], tokens: int = 50) -> None:
    x, ids, weights, grad = batch(tokens)
    out, saved = one.forward(x, ids, weights, True)
    found = one.backward(saved, grad)
    wide = experts.gate_up.dequantized(torch.float32)
    base = BaseWeights(wide[:, :I], wide[:, I:], experts.down.dequantized(torch.float32))
    expected = experts_forward_backward(x, ids, weights, grad, base, dict(zip(LORA_NAMES, lora, strict=True)))
    assert_close(out, expected.output, FORWARD[kind], "output")
    actual = {"hidden": found.hidden_states, "weights": found.top_k_weights}
    rank = lora[0].shape[1]
    for name, value, wanted in zip(LORA_NAMES, found.lora, lora, strict=True):
        actual[name] = value[tuple(slice(size) for size in wanted.shape)]
        assert value.shape[1 if name.endswith("a") else 2] >= rank
    alone = [actual.pop("weights")] if tokens == 1 else []
    assert_all_close(actual, {name: expected.grads[name] for name in actual}, 0.02)
    if alone:  # two sums that cancel: of 16 calls together
        found_of, wanted_of = alone, [expected.grads["weights"]]
        for i in range(1, 16):
            one_batch = [t[i : i + 1].contiguous() for t in batch(16)]
            _, saved = one.forward(*one_batch[:3], True)
            found_of.append(one.backward(saved, one_batch[3]).top_k_weights)
            wanted = experts_forward_backward(*one_batch, base, dict(zip(LORA_NAMES, lora, strict=True)))
            wanted_of.append(wanted.grads["weights"])
        assert_close(torch.cat(found_of), torch.cat(wanted_of), 0.02, "weights")


def lora_of(rank: int) -> list[Tensor]:
    return [drawn(*size, seed=20 + i).bfloat16() for i, size in enumerate(SHAPE.lora_shapes(rank))]


@every_kind
@pytest.mark.parametrize("tokens", [1, 50])
def test_stored_weights_are_computed_as_they_are(kind: str, tokens: int, caplog: pytest.LogCaptureFixture) -> None:
    """Against fp32 of the de-quantized weights; nothing is rounded, and nothing said of rounding."""
    experts, lora = packed(kind), lora_of(5)
    with caplog.at_level(logging.WARNING):
        one = build(kind, weights := stored(experts))
    assert "rounds" not in caplog.text
    assert weights.low_bit is None
    assert weights.packed_as is one
    one.set_lora(tuple(lora))
    check(kind, one, experts, lora, tokens)


@every_kind
def test_bf16_is_rounded_and_said_so(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    low_bit_weights._noted.clear()
    experts, lora = packed(kind), lora_of(8)
    wide = [part.dequantized(torch.float32) for part in (experts.gate_up, experts.down)]
    with caplog.at_level(logging.WARNING):
        one = build(kind, ExpertWeights(*wide))
    assert f"kt_backend={kind} rounds the experts" in caplog.text
    one.set_lora(tuple(lora))
    if kind != "AMXInt4KGroup":  # its scales are searched anew
        check(kind, one, experts, lora)
    x, ids, weights, _ = batch()
    same = build(kind, stored(experts)).forward(x, ids, weights, False)[0]
    one.set_lora(())
    assert relative_error(one.forward(x, ids, weights, False)[0], same) < 0.15


@needs_mxfp4
def test_saved_forwards_that_nobody_wants_are_dropped() -> None:
    """Any number, with LoRA that changes in between; the last is right."""
    experts, lora = packed("MXFP4"), lora_of(8)
    one = build("MXFP4", stored(experts))
    for seed in range(3):
        one.set_lora(tuple(drawn(*size, seed=seed) for size in SHAPE.lora_shapes(8)))
        _, saved = one.forward(*batch(17 + seed)[:3], True)
        one.forward(*batch(3)[:3], False)
        assert not one.can_backward(saved)
    one.forward(*batch(0)[:3], True)
    one.raw_operator()
    one.set_lora(tuple(lora))
    check("MXFP4", one, experts, lora)
    check("MXFP4", one, experts, lora, 3)


@needs_mxfp4
def test_rank_0_computes_and_gives_the_inputs_gradient() -> None:
    one = build("MXFP4", stored(packed("MXFP4")), rank=0)
    x, ids, weights, grad = batch()
    out, saved = one.forward(x, ids, weights, True)
    assert one.rank == 0
    assert torch.isfinite(out).all()
    assert one.backward(saved, grad).hidden_states.any()


@needs_mxfp4
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: p.gate_up.scales[2, 3, 1:2].fill_(255), "gate_up_proj has a scale that is not a finite number"),
        (lambda p: setattr(p, "down", to_mxfp4(drawn(E, H, 2 * I))), r"\(256, 256\); they must be 4 experts"),
        (lambda p: setattr(p, "experts", [0, 1]), "layer 3"),
    ],
)
def test_stored_weights_that_do_not_fit(change: Any, words: str) -> None:
    experts = packed("MXFP4")
    change(experts)
    with pytest.raises(KTAMXConfigError, match=words):
        build("MXFP4", stored(experts))


@needs_mxfp4
def test_other_stored_weights_are_widened_for_it() -> None:
    """int4 is none of MXFP4's: what is computed is within the rounding."""
    experts = packed("AMXInt4KGroup")
    x, ids, weights, _ = batch()
    wide = ExpertWeights(*(part.dequantized(torch.bfloat16) for part in (experts.gate_up, experts.down)))
    expected = build_backend("torch", wide, SHAPE, 8, PLAN, 512, False, False, "l").forward(x, ids, weights, False)[0]
    assert relative_error(build("MXFP4", stored(experts)).forward(x, ids, weights, False)[0], expected) < 0.3


@pytest.mark.parametrize("kind", FORWARD)
def test_what_they_take(kind: str) -> None:
    operators, good = OPERATORS[kind], packed(kind)
    assert operators.takes(good.gate_up)
    assert not any(operators.takes(packed(other).gate_up) for other in FORWARD if other != kind)
    codes, scales = good.gate_up.codes, good.gate_up.scales
    if kind == "AMXFP8":
        assert not operators.takes(PackedMatrices("e4m3", codes, scales, (64, 64)))
        assert not operators.takes(PackedMatrices("e4m3", codes[:, :192], scales[:, :, :2], (128, 128)).with_tensors(
            [codes[:, :192].contiguous(), torch.ones(E, 2, 1, 2)]))  # fmt: skip
        return
    half = PackedMatrices(good.gate_up.code, codes, scales[..., ::2].contiguous())
    assert not operators.takes(half)  # groups of 64
    factor = PackedMatrices(good.gate_up.code, codes, scales, factor=torch.ones(E, 1))
    assert not operators.takes(factor)
    if kind == "AMXInt4KGroup":
        zeros = PackedMatrices("int4", codes, scales, zeros=torch.full(scales.shape, 8, dtype=torch.uint8))
        assert not operators.takes(zeros)
        assert not operators.takes(PackedMatrices("int4", codes, scales.half()))


def test_rounding_to_mxfp4() -> None:
    """Exact values stay; normal weights have the format's error, less than with the largest value's exponent alone."""
    experts = packed("MXFP4")
    again = to_mxfp4(experts.gate_up.dequantized(torch.float32))
    assert torch.equal(again.dequantized(torch.float32), experts.gate_up.dequantized(torch.float32))
    weights = drawn(2, 64, 256)
    found = to_mxfp4(weights).dequantized(torch.float32)
    assert 0.1 < float((found - weights).norm() / weights.norm()) < 0.114
    assert not to_mxfp4(torch.zeros(1, 2, 32)).dequantized(torch.float32).any()


@needs_mxfp4
@pytest.mark.parametrize(
    ("shape", "pools", "rank", "words"),
    [
        (ExpertShape(4, 2, 48, 64), 1, 8, "hidden size 48 is not a multiple of 32"),
        (ExpertShape(4, 2, 64, 96), 2, 8, "96 does not split into 2 pools"),
        (ExpertShape(4, 2, 64, 96), 3, 8, "over 2 pools of threads, not 3"),
    ],
)
def test_shapes_are_refused_before_anything_is_built(shape: ExpertShape, pools: int, rank: int, words: str) -> None:
    with pytest.raises(KTAMXConfigError, match=f"kt_backend=MXFP4: .*{words}"):
        choose_backend("MXFP4", shape, pools, rank=rank)


def test_kgroup_refuses_larger_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    from kt_hf.backends import Availability, registry

    monkeypatch.setattr(registry.installation, "check_available", lambda name: Availability(True, "as if"))
    assert choose_backend("AMXInt4KGroup", SHAPE, rank=8)[0] == "AMXInt4KGroup"
    with pytest.raises(KTAMXConfigError, match="rank 8 and less, not of 16"):
        choose_backend("AMXInt4KGroup", SHAPE, rank=16)


@pytest.mark.skipif(missing("MXFP4") is not None or KERNEL_MISSING is None, reason="needs AVX2 without AVX512-BF16")
def test_on_avx2_alone() -> None:
    """MXFP4 runs; others are refused as before; `auto` takes it for a checkpoint that is in MXFP4 and for no other."""
    with pytest.raises(KTAMXNotAvailableError, match=r"kt_backend=AMXBF16 cannot run: .* avx2 variant has no SFT"):
        choose_backend("AMXBF16", SHAPE)
    with pytest.raises(KTAMXNotAvailableError, match="has no operators for AMXFP8"):
        choose_backend("AMXFP8", SHAPE)
    assert choose_backend("MXFP4", SHAPE)[0] == "MXFP4"
    assert choose_backend("auto", SHAPE)[0] == "torch"
    few, many = 128 * E // K, 129 * E // K
    assert choose_backend("auto", SHAPE, stored=[packed("MXFP4").down], tokens=few)[0] == "MXFP4"
    name, why = choose_backend("auto", SHAPE, stored=[packed("MXFP4").down], tokens=many)
    assert (name, "129 tokens an expert" in why, "kt_backend=MXFP4" in why) == ("torch", True, True)
    assert choose_backend("auto", ExpertShape(256, 8, 256, 128), stored=[packed("MXFP4").down])[0] == "MXFP4"
    assert choose_backend("auto", SHAPE, stored=[packed("AMXInt4KGroup").down], tokens=1)[0] == "torch"
    assert choose_backend("auto", ExpertShape(4, 2, 40, 64), stored=[packed("MXFP4").down], tokens=1)[0] == "torch"


@pytest.mark.parametrize("dtype", ["int4", "int8", "fp8"])
def test_experts_are_rounded_in_one_way(dtype: str) -> None:
    with pytest.raises(KTAMXConfigError, match="both quantize"):
        KTConfig(kt_backend="MXFP4", kt_expert_dtype=dtype)
    KTConfig(kt_backend={"int4": "AMXInt4KGroup", "fp8": "AMXFP8"}.get(dtype, "torch"), kt_expert_dtype=dtype)
