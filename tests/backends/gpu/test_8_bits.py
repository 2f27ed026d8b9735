"""Streamed experts of 8 bits on a real GPU: de-quantised there to the bit, through buffers that are free early."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from kt_hf import load_kt_model
from kt_hf.backends import packed
from kt_hf.backends.gpu import grouped_mm as grouped
from kt_hf.backends.gpu import weight_stream as streamer
from kt_hf.backends.gpu.pinned_weights import HostWeights
from kt_hf.backends.gpu.streamed import StreamedBackend
from kt_hf.backends.gpu.weight_stream import Streamer
from kt_hf.backends.packed import PackedExperts, PackedMatrices
from kt_hf.placement import packer as packing
from kt_hf.shapes import ExpertShape
from tests.support.cases import KERNEL_MARKS, make_config
from tests.support.checkpoints import EIGHT_BITS, both, to_8_bits
from tests.support.helpers import MIXTRAL
from tests.support.layers import make_inputs, on_gpu, random_lora
from tests.support.models import FAMILIES
from tests.support.patched import fill_lora, logits_of, lora_config, loss_of
from tests.support.tiered import E, layer_weights, streamed_parts

V3 = FAMILIES["deepseek_v3"]
ONE = 3 * MIXTRAL.hidden * MIXTRAL.intermediate * 2  # bytes of an expert in bf16
SLEEP = 2_000_000  # cycles: about a millisecond


def quantised(stack: Tensor, kind: str, block: tuple[int, int]) -> PackedMatrices:
    way = EIGHT_BITS[kind]
    found = [to_8_bits(matrix, way.block(block), way) for matrix in stack]
    values, scales, _ = (torch.stack(x) for x in zip(*found, strict=True))
    code = "int8" if values.dtype == torch.int8 else "e4m3"
    return PackedMatrices(code, values, scales.float()[:, None], way.block(block))


@pytest.mark.parametrize("block", [(128, 128), (32, 16), (20, 7)], ids=str)
@pytest.mark.parametrize("kind", EIGHT_BITS)
@pytest.mark.parametrize("kernel", [True, False], ids=["Triton", "PyTorch"])
def test_widened_as_on_the_cpu(
    kernel: bool, kind: str, block: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = quantised(layer_weights().gate_up, kind, block)
    there = given.to(torch.device("cuda", 0))
    known = there.code, there.scales.dtype, there.codes.device
    monkeypatch.setattr(packed, "_kernel_runs", {} if kernel else {known: False})
    assert torch.equal(there.dequantized(torch.bfloat16).cpu(), given.dequantized(torch.bfloat16))
    assert packed._kernel_runs == {known: kernel}


@pytest.mark.parametrize("parts", [1, 2])
def test_large_matrices_are_widened_to_the_bit(parts: int) -> None:
    """More columns than a program computes, and not a multiple; gate and up of their own blocks."""
    values = torch.randn(3, 2 * 700, 1300, device="cuda").mul_(20).to(torch.float8_e4m3fn)
    scales = torch.rand(3, parts, -(-2 * 700 // parts // 128), -(-1300 // 128), device="cuda")
    given = PackedMatrices("e4m3", values, scales, (128, 128))
    wanted = given.to(torch.device("cpu")).dequantized(torch.bfloat16)
    assert torch.equal(given.dequantized(torch.bfloat16).cpu(), wanted)


def storage(part: StreamedBackend) -> torch.dtype:
    down = part.weights.down
    return down.codes.dtype if isinstance(down, PackedMatrices) else down.dtype


def backends(chunk: int, buffers: int) -> tuple[StreamedBackend, StreamedBackend]:
    """Of the same weights: in FP8, and in bf16."""
    layer, shape = layer_weights(), ExpertShape(E, MIXTRAL.top_k, MIXTRAL.hidden, MIXTRAL.intermediate)
    gate_up, down = (quantised(t, "fp8", (20, 7)) for t in (layer.gate_up, layer.down))
    made = []
    for weights in (
        HostWeights.of_packed(PackedExperts(range(E), gate_up, down)),
        HostWeights(gate_up.dequantized(torch.bfloat16), down.dequantized(torch.bfloat16)),
    ):
        device = torch.device("cuda", torch.cuda.current_device())
        one = StreamedBackend(weights, shape, Streamer(device, chunk, buffers))
        one.set_lora(tuple(random_lora(MIXTRAL).values()))
        made.append(one)
    return made[0], made[1]


@pytest.mark.parametrize("slow", ["products", "copies", "neither"])
@pytest.mark.parametrize(("chunk", "buffers"), [(ONE, 1), (ONE, 2), (ONE, 3), (3 * ONE, 3)])
def test_buffers_are_used_again_only_when_they_may_be(
    slow: str, chunk: int, buffers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products and widening that lag behind the copies, and copies behind them; several rounds without a wait."""
    one, plain = backends(chunk, buffers)
    given = [
        on_gpu(make_inputs(MIXTRAL, 20 + seed, torch.bfloat16, seed, [0, 1, 3, 4, 7][seed % 2 :])) for seed in range(5)
    ]

    def results(backend: StreamedBackend) -> list[tuple[Tensor, ...]]:
        found = []
        for x in given:
            counts = backend.row_counts(x.ids).tolist()
            out, saved = backend.forward_counted(x.hidden, x.ids, x.weights.float(), True, counts)
            assert saved is not None
            grads = backend.backward(saved, x.grad_output)
            found.append((out, grads.hidden_states, grads.top_k_weights, *grads.lora))
        return found

    expected = results(plain)
    torch.cuda.synchronize()

    def slowed(owner: Any, name: str) -> None:
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args: (torch.cuda._sleep(SLEEP), original(*args))[1])

    if slow == "products":
        slowed(grouped, "outputs")
        slowed(grouped, "gradients")
        slowed(HostWeights, "products_of")
    if slow == "copies":
        slowed(Streamer, "_copy")
    for actual, wanted in zip(results(one), expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(actual, wanted, strict=True))


@pytest.mark.parametrize("where", ["cpu", "gpu"])
@pytest.mark.parametrize("tiers", [{"streamed": E}, {"resident": 1, "streamed": 3}], ids=str)
@pytest.mark.parametrize("backend", ["torch", pytest.param("AMXBF16", marks=KERNEL_MARKS)])
def test_load_kt_model(
    backend: str, tiers: dict[str, int], where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An FP8 checkpoint trains as one of the same weights in bf16, checkpointing on, several steps."""
    original = streamer.Streamer
    monkeypatch.setattr(packing, "Streamer", lambda device, *_: original(device, 2 * ONE))
    found = {}
    for folder in both(tmp_path, (32, 16), "fp8"):
        config = make_config(backend, kt_expert_placement=tiers, kt_lora_rank=8, kt_moe_lora_device=where)
        model = load_kt_model(folder, config, dtype=torch.bfloat16)
        (dtype,) = {storage(part) for part in streamed_parts(model)}
        assert all(t.is_pinned() for part in streamed_parts(model) for t in part.weights.tensors)
        model = get_peft_model(model, lora_config(V3)).cuda().train()
        fill_lora(model, 3)
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        ids = V3.inputs().cuda()
        for _ in range(3):
            model.zero_grad()
            loss_of(model, ids).backward()
        grads = {name: p.grad.cpu() for name, p in model.named_parameters() if p.requires_grad}
        found[dtype] = logits_of(model.eval(), ids).cpu(), grads
    (logits, grads), (same, expected) = found[torch.float8_e4m3fn], found[torch.bfloat16]
    assert torch.allclose(logits, same, rtol=0, atol=1e-6 * float(same.abs().max()))
    assert all(
        torch.allclose(g, expected[n], rtol=0, atol=1e-5 * float(expected[n].abs().max())) for n, g in grads.items()
    )
