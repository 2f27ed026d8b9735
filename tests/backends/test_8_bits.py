"""Streamed experts of a checkpoint of 8 bits stay so in host memory, and give what their de-quantised weights give."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from kt_hf import KTAMXConfigError, apply_kt_moe, load_kt_model
from kt_hf.backends import ExpertWeights
from kt_hf.backends.build_tiered import build_tiered
from kt_hf.backends.gpu import weight_stream as streamer
from kt_hf.backends.gpu.pinned_weights import HostWeights
from kt_hf.backends.gpu.streamed import StreamedBackend
from kt_hf.backends.gpu.weight_stream import Streamer
from kt_hf.backends.packed import PackedExperts, PackedMatrices
from kt_hf.backends.torch_loop import TorchBackend
from kt_hf.placement import packer as packing
from kt_hf.shapes import ExpertShape
from tests.support.cases import KERNEL_MARKS, make_config
from tests.support.checkpoints import EIGHT_BITS, both, fuse, saved, set_config, tensors, to_8_bits, write
from tests.support.models import FAMILIES
from tests.support.patched import fill_lora, gradients_of, logits_of, lora_config, loss_of
from tests.support.reference import assert_close
from tests.support.tiered import Watched, streamed_parts

pytestmark = pytest.mark.usefixtures("cpu_for_gpu")
V3, QWEN3 = FAMILIES["deepseek_v3"], FAMILIES["qwen3_moe"]
BLOCK = (32, 16)
E = V3.num_experts
TIERS = [{"resident": 0, "streamed": E}, {"resident": 1, "streamed": 3}, {"resident": 2, "streamed": E - 2}]
BACKENDS = ["torch", pytest.param("AMXBF16", marks=KERNEL_MARKS)]


@pytest.fixture(params=[False, True], ids=["in place", "copied"])
def small_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of two experts, used where they are or copied through buffers as on a GPU."""
    size, original = 2 * 3 * V3.hidden * V3.intermediate * 2, streamer.Streamer
    monkeypatch.setattr(packing, "Streamer", lambda device, *_: original(device, size, copies=request.param))


def loaded(folder: Path, backend: str, tiers: dict[str, int], **more: Any) -> Any:
    counts = {i: torch.arange(E).roll(i) for i in V3.moe_layers}
    config = make_config(backend, kt_expert_placement=tiers, **({"kt_lora_rank": 8} | more))
    return load_kt_model(folder, config, placement=counts, dtype=torch.bfloat16)


def trained(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits with an adapter, and all its gradients."""
    model = get_peft_model(model, lora_config(V3))
    fill_lora(model, 3)
    return logits_of(model, V3.inputs()), gradients_of(model, loss_of(model, V3.inputs()))


def check(eight: Path, plain: Path, backend: str, tiers: dict[str, int], dtype: torch.dtype) -> None:
    model, expected = loaded(eight, backend, tiers), loaded(plain, backend, tiers)
    for one, other in zip(streamed_parts(model), streamed_parts(expected), strict=True):
        assert one.weights.gate_up.codes.dtype == one.weights.down.codes.dtype == dtype
        assert one.weights.gate_up.shape == other.weights.gate_up.shape
        assert other.weights.down.dtype == torch.bfloat16
    for layer, other in zip(model._kt_wrappers, expected._kt_wrappers, strict=True):
        assert torch.equal(layer.base_fingerprint, other.base_fingerprint)
    (logits, grads), (same_logits, same_grads) = trained(model), trained(expected)
    assert torch.equal(logits, same_logits)
    assert grads.keys() == same_grads.keys()
    assert all(torch.equal(grad, same_grads[name]) for name, grad in grads.items())
    assert all(grad.any() for grad in grads.values())


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("tiers", TIERS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_fp8_to_the_bit(backend: str, tiers: dict[str, int], tmp_path: Path) -> None:
    check(*both(tmp_path, BLOCK, "fp8"), backend, tiers, torch.float8_e4m3fn)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("block", [(128, 128), (20, 7)], ids=str)
@pytest.mark.parametrize("kind", EIGHT_BITS)
def test_every_kind_to_the_bit(kind: str, block: tuple[int, int], tmp_path: Path) -> None:
    """Blocks larger than a matrix, and such as leave some over at the edges of gate, up and down."""
    check(*both(tmp_path, block, kind), "torch", TIERS[1], EIGHT_BITS[kind].dtype)


@pytest.mark.usefixtures("small_chunks")
def test_fused_to_the_bit(tmp_path: Path) -> None:
    """Blocks of a fused matrix go on from gate to up."""
    plain = saved(QWEN3, tmp_path / "plain")
    fuse(plain, QWEN3(torch.bfloat16))
    eight = saved(QWEN3, tmp_path / "eight")
    way, content, exact = EIGHT_BITS["fp8"], dict[str, Tensor](), dict[str, Tensor]()
    for name, tensor in tensors(plain).items():
        content[name] = exact[name] = tensor
        if ".experts." in name:
            values, scales, wide = (
                torch.stack(x) for x in zip(*(to_8_bits(t, (20, 7), way) for t in tensor), strict=True)
            )
            content[name], content[f"{name}_scale_inv"], exact[name] = values, scales, wide.bfloat16()
    write(eight, content)
    write(plain, exact)
    set_config(eight, quantization_config=way.config((20, 7)))
    config = make_config("torch", kt_expert_placement={"resident": 1, "streamed": 4}, kt_lora_rank=8)
    model, expected = load_kt_model(eight, config), load_kt_model(plain, config)
    assert {part.weights.down.codes.dtype for part in streamed_parts(model)} == {torch.float8_e4m3fn}
    assert torch.equal(logits_of(model, QWEN3.inputs()), logits_of(expected, QWEN3.inputs()))


def test_experts_of_other_dtypes_among_them(tmp_path: Path) -> None:
    """One expert has a projection in bf16: it is streamed in bf16, and the others of its layer in 8 bits."""
    eight, plain = both(tmp_path, BLOCK, "fp8")
    content, name = tensors(eight), f"model.layers.{V3.moe_layers[0]}.mlp.experts.2.up_proj.weight"
    content[name] = tensors(plain)[name]
    del content[f"{name}_scale_inv"]
    write(eight, content)
    model, expected = (loaded(folder, "torch", TIERS[0]) for folder in (eight, plain))
    held = [(isinstance(part.weights.down, PackedMatrices), part.shape.num_experts) for part in streamed_parts(model)]
    assert sorted(held) == [(False, 1), *[(True, E - 1)], *[(True, E)] * (len(V3.moe_layers) - 1)]
    (logits, _), (same, _) = trained(model), trained(expected)
    assert_close(logits, same, 0.01, "logits")  # two parts' outputs are added in bf16


def scaled_layer(experts: Sequence[int] = range(8)) -> tuple[PackedExperts, Tensor, Tensor]:
    """Some of 8 experts of 64 x 32 in FP8, and all of them in bf16."""
    generator = torch.Generator().manual_seed(0)

    def stack(rows: int, columns: int, parts: int) -> tuple[PackedMatrices, Tensor]:
        values = torch.randn(8, rows, columns, generator=generator).to(torch.float8_e4m3fn)
        scales = torch.rand(8, parts, rows // parts // 16, columns // 16, generator=generator)
        wide = PackedMatrices("e4m3", values, scales, (16, 16)).dequantized(torch.bfloat16)
        some = values.view(torch.uint8)[list(experts)].view(values.dtype)
        return PackedMatrices("e4m3", some, scales[list(experts)], (16, 16)), wide

    (gate_up, wide_gate_up), (down, wide_down) = stack(64, 64, 2), stack(64, 32, 1)
    return PackedExperts(experts, gate_up, down), wide_gate_up, wide_down


def test_half_the_bytes_are_copied_and_held() -> None:
    scaled, gate_up, down = scaled_layer()
    one = 2 * (gate_up[0].numel() + down[0].numel())
    weights, wide = HostWeights.of_packed(scaled), HostWeights(gate_up, down)
    sizes = {}
    for name, held in (("eight", weights), ("wide", wide)):
        watched = Watched(2 * one)
        copied = []
        watched._copy = lambda source, target, copied=copied: (copied.append(source.nbytes), target.copy_(source))
        seen = 0
        for chunk in watched.chunks(held, [1, 1, 0, 1, 1, 1, 1, 1], False):
            for e in range(chunk.experts.start, chunk.experts.stop):
                if e != 2:
                    assert torch.equal(chunk.gate_up[e - chunk.experts.start], gate_up[e])
                    assert torch.equal(chunk.down[e - chunk.experts.start], down[e])
            seen += chunk.experts.stop - chunk.experts.start
        assert seen == 8
        sizes[name] = sum(copied), sum(buffer.memory.numel() for buffer in watched._buffers)
    scales = sum(t[0].nbytes for t in weights.tensors[1::2])
    assert sizes["wide"] == (7 * one, 6 * one)
    assert sizes["eight"] == (7 * (one // 2 + scales), 6 * (one // 2 + scales))


def test_a_row_is_that_of_the_whole() -> None:
    """Blocks that go up with a part's end or not, one a row, and larger than the matrix."""
    for block in ((16, 16), (20, 7), (1, 1 << 40), (128, 128)):
        for parts in (1, 2):
            values = torch.randint(-127, 128, (3, 64, 50), dtype=torch.int8)
            scales = torch.rand(3, parts, -(-64 // parts // block[0]), -(-50 // block[1]))
            given = PackedMatrices("int8", values, scales, block)
            whole = given.dequantized(torch.bfloat16)
            assert all(torch.equal(given.row(m, r, torch.bfloat16), whole[m, r]) for m in (0, 2) for r in range(64))


def test_one_chunk_at_a_time_is_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the next is made the one before has been let go, forward and backward: the GPU has room for one."""
    scaled, gate_up, _ = scaled_layer()
    made, seen = HostWeights.products_of, [0, 0]
    alive: list[weakref.ref[Tensor]] = []

    def watched(weights: HostWeights, copied: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        seen[0] += 1
        seen[1] += sum(one() is not None for one in alive)
        found = made(weights, copied)
        alive[:] = [weakref.ref(tensor.untyped_storage()) for tensor in found]
        return found

    monkeypatch.setattr(HostWeights, "products_of", watched)
    streamer = Watched(4 * (gate_up[0].numel() + 64 * 32))
    one = StreamedBackend(HostWeights.of_packed(scaled), ExpertShape(8, 2, 64, 32), streamer)
    one.set_lora(tuple(torch.randn(size) for size in one.shape.lora_shapes(8)))
    x, ids = torch.randn(40, 64).bfloat16(), torch.rand(40, 8).topk(2).indices
    _, kept = one.forward(x, ids, torch.rand(40, 2), save=True)
    assert kept is not None
    one.backward(kept, x)
    assert seen == [8, 0]


def test_a_buffer_is_free_before_the_products() -> None:
    """So that copies are as many chunks ahead as there are buffers, and not one less."""
    scaled, gate_up, down = scaled_layer()
    one = 2 * (gate_up[0].numel() + down[0].numel())
    watched = Watched(one, buffers=2)
    chunks = watched.chunks(HostWeights.of_packed(scaled), [1] * 8, False)
    next(chunks)
    assert len(watched.copied) == 3 * 4
    chunks.close()
    assert len(watched._idle) == 2


@pytest.mark.parametrize("interrupted", [False, True])
def test_three_tiers_and_an_interruption_while_the_rest_is_packed(interrupted: bool) -> None:
    """Everything is as it was then, and packs."""
    apart, rest = [1, 4, 6], [0, 2, 3, 5, 7]
    scaled, gate_up, down = scaled_layer(apart)
    weights, shape = ExpertWeights(gate_up[rest], down[rest], low_bit=scaled), ExpertShape(8, 2, 64, 32)

    def build_backend(on_cpu: Callable[[ExpertWeights, ExpertShape], Any]) -> Any:
        return build_tiered(weights, shape, [3, 5], apart, Streamer(torch.device("cpu")), torch.bfloat16, on_cpu)

    def stopped(*_: Any) -> Any:
        raise KeyboardInterrupt

    if interrupted:
        with pytest.raises(KeyboardInterrupt):
            build_backend(stopped)
        assert torch.equal(weights.gate_up, gate_up[rest])
        assert torch.equal(weights.down, down[rest])
    split, whole = build_backend(TorchBackend), TorchBackend(ExpertWeights(gate_up, down), shape)
    x, ids, routing = torch.randn(40, 64).bfloat16(), torch.rand(40, 8).topk(2).indices, torch.rand(40, 2)
    actual, expected = (one.forward(x, ids, routing, save=False)[0] for one in (split, whole))
    assert_close(actual, expected, 0.01, "output")


def test_another_models_placement_is_refused_before_the_files_are_looked_for(tmp_path: Path) -> None:
    V3(torch.bfloat16).config.save_pretrained(tmp_path)
    config = make_config("torch", kt_expert_placement=TIERS[1], kt_lora_rank=8)
    with pytest.raises(KTAMXConfigError, match="placement: it has"):
        load_kt_model(tmp_path, config, placement={0: torch.arange(3)})


def test_apply_kt_moe_has_none_of_8_bits() -> None:
    config = make_config("torch", kt_expert_placement=TIERS[1], kt_lora_rank=8)
    model = apply_kt_moe(V3(torch.bfloat16), config)
    assert {part.weights.down.dtype for part in streamed_parts(model)} == {torch.bfloat16}


def test_eight_bits_on_the_gpu_need_no_copies() -> None:
    """A layer moved there stays in 8 bits."""
    experts, _, _ = scaled_layer()
    streamer_ = Watched(2 * 3 * 64 * 32)
    one = StreamedBackend(HostWeights.of_packed(experts), ExpertShape(8, 2, 64, 32), streamer_)
    x, ids = torch.randn(37, 64).bfloat16(), torch.randint(-1, 8, (37, 2))

    def computed() -> list[Tensor]:
        out, saved = one.forward(x, ids, torch.full((37, 2), 0.5), save=True)
        assert saved is not None
        gradients = one.backward(saved, x)
        return [out, gradients.hidden_states, gradients.top_k_weights]

    expected = computed()
    one.weights.to_gpu(torch.device("cpu"))
    streamer_.copied.clear()
    assert all(torch.equal(a, b) for a, b in zip(computed(), expected, strict=True))
    assert not streamer_.copied


def test_rounded_to_four_bits_while_loading(tmp_path: Path) -> None:
    """As a checkpoint in bf16 of the same weights; to as many bits it is refused."""
    folders = both(tmp_path, BLOCK, "fp8")
    model, expected = (loaded(folder, "torch", TIERS[0], kt_expert_dtype="int4") for folder in folders)
    assert {part.weights.gate_up.codes.dtype for part in streamed_parts(model)} == {torch.uint8}
    assert torch.equal(trained(model)[0], trained(expected)[0])
    with pytest.raises(KTAMXConfigError, match=r"quantized already \(fp8, 8"):
        loaded(folders[0], "torch", TIERS[0], kt_expert_dtype="fp8")
