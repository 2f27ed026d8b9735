"""Experts of low bits give what a bf16 model of their widened weights gives, to the bit, wherever they are computed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from kt_hf import KTAMXConfigError, KTConfig, apply_kt_moe, load_kt_model
from kt_hf.backends import ExpertsBackend, ExpertWeights, PackedLayerFiles, build_backend
from kt_hf.backends.build_tiered import build_tiered
from kt_hf.backends.gpu import weight_stream as streamer
from kt_hf.backends.gpu.pinned_weights import HostWeights
from kt_hf.backends.gpu.weight_stream import Streamer
from kt_hf.backends.packed import PackedMatrices
from kt_hf.backends.quantizer import EXPERT_BITS, quantized
from kt_hf.placement import packer as packing
from kt_hf.placement.assembly import make_packer
from kt_hf.shapes import ExpertShape
from kt_hf.system.cpu import ThreadPlan
from tests.support.cases import make_config
from tests.support.checkpoints import saved
from tests.support.helpers import MIXTRAL
from tests.support.models import expert_modules
from tests.support.packed import KINDS, random_experts
from tests.support.patched import fill_lora, gradients_of, logits_of, lora_config, loss_of
from tests.support.tiered import streamed_parts

pytestmark = pytest.mark.usefixtures("cpu_for_gpu")
E = MIXTRAL.num_experts
ONE = 3 * MIXTRAL.hidden * MIXTRAL.intermediate * 2  # bytes of an expert in bf16
PLACES: list[Any] = [{"streamed": E}, {"resident_layers": 2}, {"resident": 2, "streamed": 3}, "cpu"]
OWN = ["int4", "int8", "fp8"]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of three experts, copied through buffers as on a GPU."""
    original = streamer.Streamer
    monkeypatch.setattr(packing, "Streamer", lambda device, *_: original(device, 3 * ONE, copies=True))


def widened_model(to: str) -> Any:
    """The model with its experts quantized and widened again, in bf16."""
    model = MIXTRAL(torch.bfloat16)
    for experts in expert_modules(model).values():
        for parameter in (experts.gate_up_proj, experts.down_proj):
            parameter.data = quantized(parameter.data, to).dequantized(torch.bfloat16)
    return model


def patched(model: Any, place: Any, to: str = "bf16", **more: Any) -> Any:
    return apply_kt_moe(model, make_config("torch", kt_expert_placement=place, kt_expert_dtype=to, **more))


def trained(model: Any, seed: int = 3) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits with an adapter, and all its gradients."""
    model = get_peft_model(model, lora_config(MIXTRAL))
    fill_lora(model, seed)
    return logits_of(model, MIXTRAL.inputs()), gradients_of(model, loss_of(model, MIXTRAL.inputs()))


def same(model: Any, expected: Any) -> None:
    (logits, grads), (wanted, wanted_grads) = trained(model), trained(expected)
    assert torch.equal(logits, wanted)
    assert grads.keys() == wanted_grads.keys()
    assert all(torch.equal(grad, wanted_grads[name]) for name, grad in grads.items())
    assert all(grad.any() for grad in grads.values())


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("to", OWN)
def test_as_the_widened_weights_in_bf16(to: str, place: Any) -> None:
    model, expected = patched(MIXTRAL(torch.bfloat16), place, to), patched(widened_model(to), place)
    for one, other in zip(model._kt_wrappers, expected._kt_wrappers, strict=True):
        assert torch.equal(one.base_fingerprint, other.base_fingerprint)
    for part in streamed_parts(model):
        assert isinstance(part.weights.down, PackedMatrices)
    if place != "cpu":
        held = [t.nbytes for part in streamed_parts(model) for t in part.weights.tensors]
        wide = [t.nbytes for part in streamed_parts(expected) for t in part.weights.tensors]
        assert not wide or sum(held) / sum(wide) == pytest.approx(EXPERT_BITS[to] / 16, rel=0.1)
    same(model, expected)


@pytest.mark.parametrize("to", OWN)
def test_quantized_while_loading(to: str, tmp_path: Path) -> None:
    """As a checkpoint of the widened weights; no LoRA rank is needed where the operators compute nothing."""
    folder, place = saved(MIXTRAL, tmp_path / "model"), {"resident": 1, "streamed": 4}
    widened_model(to).save_pretrained(tmp_path / "wide")
    model = load_kt_model(folder, make_config("torch", kt_expert_placement=place, kt_expert_dtype=to))
    assert all(isinstance(part.weights.down, PackedMatrices) for part in streamed_parts(model))
    same(model, load_kt_model(tmp_path / "wide", make_config("torch", kt_expert_placement=place)))


def on_cpu(weights: ExpertWeights | PackedLayerFiles, shape: ExpertShape) -> ExpertsBackend:
    """Widened there, by PyTorch."""
    return build_backend("torch", weights, shape, 8, ThreadPlan(((0, 1),)), 64, False, False, "a layer")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("resident", "streamed"), [(range(8), ()), ((), range(8)), ((1, 4, 6), (0, 2, 7)), ((), ())])
def test_every_format_in_every_tier(kind: str, resident: Sequence[int], streamed: Sequence[int]) -> None:
    """Forward and backward of a layer, beside the same weights in bf16."""
    H, I = 64, 32  # noqa: E741
    shape, low = ExpertShape(8, 2, H, I), random_experts(kind, 8, H, I)
    empty = torch.empty(0, 2 * I, H).bfloat16(), torch.empty(0, H, I).bfloat16()
    wide = ExpertWeights(*(part.dequantized(torch.bfloat16) for part in (low.gate_up, low.down)))  # type: ignore[arg-type]
    results = []
    for weights in (ExpertWeights(*empty, low_bit=low), wide):  # type: ignore[misc]
        stream = Streamer(torch.device("cpu"), 2 * 6 * H * I, copies=True)
        args = (list(resident), list(streamed), stream, torch.bfloat16)
        backend = build_tiered(weights, shape, *args, on_cpu)
        backend.set_lora(tuple(torch.full(size, 0.01) for size in shape.lora_shapes(8)))
        g = torch.Generator().manual_seed(1)
        x, routing = torch.randn(20, H, generator=g).bfloat16(), torch.rand(20, 2, generator=g)
        ids = torch.rand(20, 8, generator=g).topk(2).indices
        out, kept = backend.forward(x, ids, routing, save=True)
        assert kept is not None
        gradients = backend.backward(kept, x)
        results.append((out, gradients.hidden_states, gradients.top_k_weights, *gradients.lora))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_resident_layers_have_nothing_in_host_memory() -> None:
    """Not locked and not copied; nor moved by `auto`."""
    low = random_experts("int4", 8, 64, 32)
    weights = HostWeights.on_gpu(low, torch.device("cpu"))
    assert weights.resident == weights.tensors
    model = patched(MIXTRAL(torch.bfloat16), {"resident_layers": 2}, "int4")
    assert [layer.backend.name for layer in model._kt_wrappers] == ["resident", "resident"]


def test_the_quantizer() -> None:
    """int4's error on normal weights with the searched scale; zeros; pieces as the whole; edges of blocks."""
    normal = torch.randn(4, 256, 512, generator=torch.Generator().manual_seed(0)) * 0.02
    errors = {}
    for to in OWN:
        wide = quantized(normal, to).dequantized(torch.float32)
        errors[to] = float((wide - normal).norm() / normal.norm())
        assert quantized(normal, to).bits == pytest.approx(EXPERT_BITS[to], rel=0.01)
    assert errors["int4"] == pytest.approx(0.088, abs=0.0015)
    assert errors["fp8"] == pytest.approx(0.027, abs=0.001)
    assert errors["int8"] < 0.01
    zeros = quantized(torch.zeros(1, 8, 64), "int4").dequantized(torch.float32)
    assert not zeros.any()
    uneven = torch.randn(3, 200, 130)
    assert float((quantized(uneven, "fp8").dequantized(torch.float32) - uneven).norm() / uneven.norm()) < 0.03


def test_pieces_are_quantized_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = torch.randn(5, 16, 64)
    whole = [quantized(stack, to).dequantized(torch.float32) for to in OWN]
    monkeypatch.setattr("kt_hf.backends.quantizer._PIECE", 2 * 16 * 64)
    assert all(
        torch.equal(quantized(stack, to).dequantized(torch.float32), w) for to, w in zip(OWN, whole, strict=True)
    )


def test_what_is_refused(tmp_path: Path) -> None:
    for more, words in (
        ({"kt_backend": "AMXInt4"}, "both quantize"),
        ({"kt_weight_path": str(tmp_path)}, "quantized already"),
        ({"kt_expert_dtype": "nf4"}, "not one of"),
    ):
        with pytest.raises(KTAMXConfigError, match=words):
            KTConfig(**{"kt_expert_dtype": "int4", **more})
    uneven = {"layer": ExpertShape(8, 2, 64, 40)}
    with pytest.raises(KTAMXConfigError, match="layer: an intermediate size of 40, which is no multiple of the 32"):
        make_packer(KTConfig(kt_expert_dtype="int4"), uneven, torch.bfloat16)
    make_packer(KTConfig(kt_expert_dtype="fp8"), uneven, torch.bfloat16)


def test_an_adapter_says_what_it_was_trained_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """On another base of the same model it loads, and both are named."""
    model = get_peft_model(patched(MIXTRAL(torch.bfloat16), {"streamed": E}, "int4"), lora_config(MIXTRAL))
    fill_lora(model, 5)
    model.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        PeftModel.from_pretrained(patched(MIXTRAL(torch.bfloat16), {"streamed": E}, "int4"), tmp_path)
    assert "experts of" not in caplog.text
    with caplog.at_level(logging.WARNING):
        other = PeftModel.from_pretrained(patched(MIXTRAL(torch.bfloat16), {"streamed": E}), tmp_path)
    assert "with experts of int4" in caplog.text
    assert "are of bf16" in caplog.text
    assert logits_of(other, MIXTRAL.inputs()).isfinite().all()


def test_checkpointing_and_two_adapters() -> None:
    """Recomputed layers give the same gradients; each adapter its own results."""
    model = get_peft_model(patched(MIXTRAL(torch.bfloat16), {"streamed": E}, "int4"), lora_config(MIXTRAL)).train()
    model.add_adapter("other", lora_config(MIXTRAL))
    expected = get_peft_model(patched(widened_model("int4"), {"streamed": E}), lora_config(MIXTRAL)).train()
    expected.add_adapter("other", lora_config(MIXTRAL))
    for one in (model, expected):
        fill_lora(one, 7)
        one.enable_input_require_grads()
        one.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for adapter in ("default", "other"):
        found = []
        for one in (model, expected):
            one.set_adapter(adapter)
            found.append(gradients_of(one, loss_of(one, MIXTRAL.inputs())))
        assert found[0].keys() == found[1].keys()
        assert all(torch.equal(grad, found[1][name]) for name, grad in found[0].items())
