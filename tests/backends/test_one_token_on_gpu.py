"""One token without gradients on the GPU's tiers, the CPU in its place: what is read, copied and waited for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kt_hf.backends import ExpertWeights
from kt_hf.backends.gpu.pinned_weights import HostWeights
from kt_hf.backends.gpu.resident import GroupedBackend
from kt_hf.backends.gpu.streamed import StreamedBackend
from kt_hf.backends.gpu.weight_stream import Streamer
from kt_hf.backends.packed import PackedMatrices
from kt_hf.shapes import ExpertShape
from tests.support.gates import GATES
from tests.support.packed import KINDS, random_experts
from tests.support.reference import assert_close
from tests.support.tiered import Watched

E, K, H, I = 8, 3, 64, 32  # noqa: E741
SHAPE = ExpertShape(E, K, H, I)
ONE = 3 * H * I * 2  # bytes of an expert in bf16
CPU = torch.device("cpu")
CHOICES = [[5, 0, 3], [1, -1, 2], [4, 4, 0], [-1, -1, -1]]


def plain_weights() -> ExpertWeights:
    torch.manual_seed(0)
    return ExpertWeights((torch.randn(E, 2 * I, H) / 8).bfloat16(), (torch.randn(E, H, I) / 8).bfloat16())


def lora_of(rank: int) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(2)
    return tuple(torch.randn(size, generator=g) / 8 for size in SHAPE.lora_shapes(rank)) if rank else ()


def inputs(ids: list[int], seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(1, H, generator=g).bfloat16(), torch.tensor([ids]), torch.rand(1, K, generator=g) + 0.1


def reference(wide: ExpertWeights, lora: tuple[Tensor, ...], x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The formula in fp64."""
    total = torch.zeros(1, H, dtype=torch.float64)
    for e, weight in zip(ids[0].tolist(), weights[0].double(), strict=True):
        if e < 0:
            continue
        (gate, up), down = wide.gate_up[e].double().split(I), wide.down[e].double()
        if lora:
            ga, gb, ua, ub, da, db = (tensor[e].bfloat16().double() for tensor in lora)
            gate, up, down = gate + gb @ ga, up + ub @ ua, down + db @ da
        g, u = x.double() @ gate.t(), x.double() @ up.t()
        total += weight * ((g * torch.sigmoid(g) * u) @ down.t())
    return total


def streamers() -> Iterator[Streamer]:
    """In place, and by buffers that have no room for a token's experts, just enough, and for all."""
    yield Streamer(CPU, ONE)
    yield Streamer(CPU, 100 * ONE)
    for experts in (1, K, 100):
        yield Watched(experts * ONE, buffers=2)


@pytest.mark.parametrize("rank", [0, 12])
@pytest.mark.parametrize("ids", CHOICES, ids=str)
def test_streamed_is_right(ids: list[int], rank: int) -> None:
    weights, lora, x = plain_weights(), lora_of(rank), inputs(ids)
    expected = reference(weights, lora, *x)
    for streamer in streamers():
        one = StreamedBackend(HostWeights.taken_over(weights), SHAPE, streamer)
        one.set_lora(lora)
        for save in (False, True, False):
            out, saved = one.forward(*x, save=save)
            assert (saved is not None) == save
            assert_close(out, expected.float(), 1e-2, "output")


@pytest.mark.parametrize("kind", ["bf16", *KINDS])
@pytest.mark.parametrize("ids", CHOICES, ids=str)
def test_every_format_is_right(kind: str, ids: list[int]) -> None:
    x, lora = inputs(ids), lora_of(8)
    for place in ("resident", "streamed"):
        if kind == "bf16":
            wide = plain_weights()
            made: Any = GroupedBackend(wide, SHAPE)
            if place == "streamed":
                made = StreamedBackend(HostWeights.taken_over(wide), SHAPE, Watched(100 * ONE))
                made.weights.to_gpu(CPU)
        else:
            low = random_experts(kind, E, H, I)
            wide = ExpertWeights(*(part.dequantized(torch.bfloat16) for part in (low.gate_up, low.down)))  # type: ignore[arg-type]
            host = HostWeights.on_gpu(low, CPU) if place == "resident" else HostWeights.of_packed(low)
            made = StreamedBackend(host, SHAPE, Watched(4 * ONE))
        made.set_lora(lora)
        out, _ = made.forward(*x, save=False)
        assert_close(out, reference(wide, lora, *x).float(), 2e-2, f"{kind}, {place}")


@pytest.mark.parametrize("name", GATES)
def test_gates_and_biases_are_the_experts(name: str) -> None:
    """As one of many tokens has them, for which nothing is picked."""
    gate, bias = GATES[name], torch.randn(E, 2 * I).bfloat16() if GATES[name].halves == 2 else None
    shape = ExpertShape(E, K, H, I, gate, bias is not None)
    torch.manual_seed(0)
    weights = HostWeights((torch.randn(E, shape.up_rows, H) / 8).bfloat16(), (torch.randn(E, H, I) / 8).bfloat16())
    one = StreamedBackend(weights, shape, Watched(100 * ONE), bias)
    one.set_lora(tuple(torch.randn(size) / 8 for size in shape.lora_shapes(8)))
    x, ids, routing = inputs([5, 0, 3])
    out, _ = one.forward(x, ids, routing, save=False)
    many, _ = one.forward(*(t.expand(2, -1).contiguous() for t in (x, ids, routing)), save=False)
    assert_close(out, many[:1].float(), 1e-2, "output")


def test_a_layer_of_low_bits_widens_the_experts_of_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    widened: list[int] = []
    inner = PackedMatrices.dequantized

    def noted(matrices: PackedMatrices, dtype: torch.dtype) -> Tensor:
        widened.append(len(matrices.codes))
        return inner(matrices, dtype)

    monkeypatch.setattr(PackedMatrices, "dequantized", noted)
    for host in (HostWeights.on_gpu(random_experts("int4", E, H, I), CPU), HostWeights.of_packed(random_experts("int4", E, H, I))):  # fmt: skip # noqa: E501
        StreamedBackend(host, SHAPE, Watched(4 * ONE)).forward(*inputs([5, 0, 3]), save=False)
        assert widened == [K, K]
        widened.clear()


class Operations(TorchDispatchMode):
    """Counts what PyTorch would launch on a GPU, and what would wait for it."""

    WAITS = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.unique", "aten.bincount")
    VIEWS = ("view", "slice", "select.int", "expand", "unsqueeze", "squeeze", "transpose", "detach", "split", "alias", "empty", "aten.t.")  # fmt: skip # noqa: E501

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[str] = []
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith(self.WAITS):
            self.waits.append(name)
        elif not any(view in name for view in self.VIEWS):
            self.launches.append(name)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(("kind", "most"), [("bf16", 26), ("int4", 30)])
def test_a_resident_layer_waits_for_nothing(kind: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for how many rows an expert has, nor which experts they are. Triton has fewer launches: 15 and 22."""
    made: Any = GroupedBackend(plain_weights(), SHAPE)
    if kind == "int4":
        made = StreamedBackend(HostWeights.on_gpu(random_experts("int4", E, H, I), CPU), SHAPE, Watched(4 * ONE))
    made.set_lora(lora_of(8))
    x = inputs([5, 0, 3])
    made.forward(*x, save=False)
    # Widening is a kernel on a GPU.
    stacks = {size: torch.randn(K, *size).bfloat16() for size in ((2 * I, H), (H, I))}
    monkeypatch.setattr(PackedMatrices, "dequantized", lambda packed, _: stacks[packed.shape[1:]].clone())
    with torch.no_grad(), Operations() as seen:
        made.forward(*x, save=False)
    assert not seen.waits
    assert 10 < len(seen.launches) <= most, seen.launches


def test_what_was_sent_ahead_is_given_back() -> None:
    """A prompt's passes send ahead; its answer's tokens take the buffers; the next prompt finds all in order."""
    streamer = Watched(4 * ONE)
    layers = [StreamedBackend(HostWeights.taken_over(plain_weights()), SHAPE, streamer) for _ in range(2)]
    g = torch.Generator().manual_seed(1)
    prompt = torch.randn(40, H, generator=g).bfloat16(), torch.rand(40, E, generator=g).topk(K).indices, torch.ones(40, K)  # fmt: skip # noqa: E501
    expected = [one.forward(*prompt, save=False)[0] for one in layers]
    for _ in range(3):
        for one, out in zip(layers, expected, strict=True):
            assert torch.equal(one.forward(*prompt, save=False)[0], out)
        assert streamer._ahead
        for token in range(4):
            for one in layers:
                streamer.copied.clear()
                x = inputs([token, 5, 7], token)
                assert_close(
                    one.forward(*x, save=False)[0], reference(plain_weights(), (), *x).float(), 1e-2, "a token"
                )
                assert streamer.experts(one.weights) == [token, 5, 7]
                assert not streamer._ahead
                assert len(streamer._idle) == 3


def test_an_error_gives_the_buffer_back(monkeypatch: pytest.MonkeyPatch) -> None:
    streamer = Watched(4 * ONE, buffers=1)
    one, x = StreamedBackend(HostWeights.taken_over(plain_weights()), SHAPE, streamer), inputs([5, 0, 3])
    with monkeypatch.context() as patched:
        interrupted = "kt_hf.backends.gpu.grouped_mm.outputs_of_rows"
        patched.setattr(interrupted, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            one.forward(*x, save=False)
    assert len(streamer._idle) == 1
    assert_close(one.forward(*x, save=False)[0], reference(plain_weights(), (), *x).float(), 1e-2, "output")
