"""Triton's kernels against the reference and against PyTorch: on a GPU, or on the CPU by Triton's interpreter.

Not collected by its name: `test_triton_kernels.py` runs it in a process with TRITON_INTERPRET=1, and
`gpu/test_kernels.py` on a GPU.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from kt_hf import KTAMXConfigError
from kt_hf.backends import ExpertWeights
from kt_hf.backends.gpu import grouped_mm as grouped
from kt_hf.backends.gpu import kernels, widen_kernels
from kt_hf.backends.gpu.grouped_mm import GroupedExperts
from kt_hf.backends.gpu.pinned_weights import HostWeights
from kt_hf.backends.gpu.resident import GroupedBackend
from kt_hf.backends.gpu.rows import Addends, Rows
from kt_hf.backends.gpu.streamed import StreamedBackend
from kt_hf.backends.gpu.weight_stream import Streamer
from kt_hf.gates import Gate
from kt_hf.shapes import LORA_NAMES, ExpertShape
from tests.support.gates import GATES, by_hand
from tests.support.packed import KINDS, random_matrices
from tests.support.reference import (
    BaseWeights,
    assert_all_close,
    assert_close,
    experts_forward_backward,
    relative_error,
)

GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (GPU or INTERPRETED):
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")
if not GPU:
    from kt_hf.backends.gpu import fused_kernels
    from tests.support.triton_interpreter import mend

    mend()
    fused_kernels._ROWS = 16

DEVICE = torch.device("cuda", torch.cuda.current_device()) if GPU else torch.device("cpu")
FORWARD, GRAD = 1e-2, 2e-2
# Multiples of 8, as they must be, and of nothing more.
SHAPE = ExpertShape(num_experts=4, top_k=2, hidden_size=72, intermediate_size=40)
E, K, H, I = SHAPE.num_experts, SHAPE.top_k, SHAPE.hidden_size, SHAPE.intermediate_size  # noqa: E741
TOKENS = 75 if GPU else 6  # a program of a kernel takes the interpreter milliseconds
WAYS = {"PyTorch": (False, True), "fused": (True, True), "own": (True, False)}  # Triton's kernels, PyTorch's product


def choose(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    triton, native = WAYS[way]
    monkeypatch.setattr(kernels, "triton_runs", lambda device: triton)
    monkeypatch.setattr(kernels, "has_native_grouped_mm", lambda device: native)


@pytest.fixture(params=["own", *(pytest.param(way, marks=pytest.mark.slow) for way in ("PyTorch", "fused"))])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    choose(monkeypatch, request.param)
    return request.param


def drawn(*size: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale


def base() -> BaseWeights:
    gate, up, down = (drawn(E, *size, seed=i, scale=0.2) for i, size in enumerate([(I, H), (I, H), (H, I)]))
    return BaseWeights(*(t.bfloat16().float() for t in (gate, up, down)))


def lora_of(rank: int) -> dict[str, Tensor]:
    sizes = SHAPE.lora_shapes(rank)
    return {name: drawn(*size, seed=10 + i, scale=0.2) for i, (name, size) in enumerate(zip(LORA_NAMES, sizes, strict=True))}  # fmt: skip # noqa: E501


def routed(case: str) -> Tensor:
    """Experts of tokens, [T, K]."""
    tokens = {"one token": 1, "none": 3}.get(case, TOKENS)
    ids = torch.rand(tokens, E, generator=torch.Generator().manual_seed(3)).argsort(dim=1)[:, :K]
    if case == "one expert":
        ids = torch.full_like(ids, 3)
        ids[:, 1:] = -1
    if case == "some without rows":
        ids = torch.where((ids == 0) | (ids == 2), torch.full_like(ids, -1), ids)
    if case == "none":
        ids.fill_(-1)
    return ids


def inputs(ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    T = len(ids)
    weights = torch.rand(T, K, generator=torch.Generator().manual_seed(4)) + 0.1
    return drawn(T, H, seed=5).bfloat16(), ids, weights, drawn(T, H, seed=6).bfloat16()


def backends() -> dict[str, GroupedExperts]:
    """The same experts resident, and streamed in chunks of one, of some, of all."""
    gate, up, down = (t.bfloat16() for t in base())
    gate_up, one = torch.cat([gate, up], 1), 6 * H * I
    made: dict[str, GroupedExperts] = {
        "resident": GroupedBackend(ExpertWeights(gate_up.to(DEVICE), down.to(DEVICE)), SHAPE)
    }
    for chunk in (1, 2, E) if GPU else (2,):
        host = HostWeights.copied(ExpertWeights(gate_up, down), list(range(E)))
        made[f"streamed by {chunk}"] = StreamedBackend(host, SHAPE, Streamer(DEVICE, chunk * one))
    return made


def results(one: Any, x: tuple[Tensor, ...]) -> dict[str, Tensor]:
    hidden, ids, weights, d = (t.to(DEVICE) for t in x)
    out, saved = one.forward(hidden, ids, weights, save=True)
    assert one.can_backward(saved)
    found = one.backward(saved, d)
    named = {"output": out, "hidden": found.hidden_states, "weights": found.top_k_weights}
    named |= dict(zip(LORA_NAMES, found.lora, strict=bool(found.lora)))
    return {name: value.cpu() for name, value in named.items()}


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


CASES = ["one token", "one expert", "some without rows", "none"]


@pytest.mark.parametrize(
    ("rank", "case"), [(12, "many"), slow(0, "many"), slow(8, "many"), *(slow(12, case) for case in CASES)]
)
def test_a_layer_against_the_reference(rank: int, case: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resident and streamed; rows of no expert are NaN wherever a product leaves them undefined."""
    original = grouped._product

    def poisoned(x: Tensor, w: Tensor, rows: Rows) -> Tensor:
        out = original(x, w, rows)
        out[int(rows.ends[-1]) :] = float("nan")
        return out

    monkeypatch.setattr(grouped, "_product", poisoned)
    x, lora = inputs(routed(case)), lora_of(rank) if rank else None
    expected = experts_forward_backward(*x, base(), lora)
    for name, one in backends().items():
        one.set_lora(tuple(lora.values()) if lora else ())
        grads = results(one, x)
        if case == "none":
            assert not any(t.any() for t in grads.values())
            continue
        assert_close(grads.pop("output"), expected.output, FORWARD, f"{name}: output")
        assert_all_close(grads, expected.grads, GRAD)
        for lora_name in LORA_NAMES if lora else ():
            for e in set(range(E)) - set(x[1].unique().tolist()):
                assert not grads[lora_name][e].any(), "an expert without rows has a gradient"


@pytest.mark.slow
def test_triton_is_as_near_to_the_reference_as_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    x, lora, errors = inputs(routed("many")), lora_of(8), {}
    expected = experts_forward_backward(*x, base(), lora)
    for way in WAYS:
        choose(monkeypatch, way)
        one = backends()["resident"]
        one.set_lora(tuple(lora.values()))
        found = results(one, x)
        wanted = expected.grads | {"output": expected.output}
        errors[way] = {name: relative_error(found[name], wanted[name]) for name in wanted}
    for way in WAYS:
        for name, error in errors[way].items():
            assert error < 1.15 * errors["PyTorch"][name], (way, name, errors)


def cut(counts: list[int], spare: int) -> tuple[Tensor, Tensor]:
    """The row ends of experts with so many rows, and the number of all rows with `spare` ones of no expert."""
    ends = torch.tensor(counts).cumsum(0).int().to(DEVICE)
    return ends, torch.tensor(sum(counts) + spare)


# On average below 16 rows an expert, below 256, above: tiles of all three heights
COUNTS = [
    [0, 3, 0, 17, 1, 0],
    *(pytest.param(c, marks=pytest.mark.slow) for c in ([40, 0, 129, 0], [300, 0, 513], [5])),
]


@pytest.mark.parametrize("spare", [0, 13])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_every_row_is_in_one_tile(counts: list[int], spare: int) -> None:
    from kt_hf.backends.gpu import grouped_product

    ends, total = cut(counts, spare)
    experts, first, height = (
        t.tolist() if isinstance(t, Tensor) else t
        for t in grouped_product.tiles(ends, int(total), int(total) / len(ends))
    )
    covered: list[int] = []
    for expert, row in zip(experts, first, strict=True):
        if expert >= 0:
            start, end = int(ends[expert - 1]) if expert else 0, int(ends[expert])
            assert start <= row < end
            assert (row - start) % height == 0
            covered.extend(range(row, min(row + height, end)))
    assert covered == list(range(sum(counts)))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("into", "out"), [(72, 8), slow(8, 136), slow(16, 24), slow(64, 128), slow(200, 264)])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_the_product(counts: list[int], into: int, out: int, transposed: bool) -> None:
    from kt_hf.backends.gpu import grouped_product

    ends, total = cut(counts, 9)
    x, n = drawn(int(total), into).bfloat16().to(DEVICE), len(counts)
    w = drawn(n, out, into, seed=1).bfloat16().to(DEVICE).transpose(1, 2)
    w = w if transposed else w.contiguous()
    x[sum(counts) :] = float("nan")
    y = grouped_product.product(x, w, ends, grouped_product.tiles(ends, int(total), int(total) / len(ends)))
    assert y.shape == (int(total), out)
    for e in range(n):
        rows = slice(int(ends[e - 1]) if e else 0, int(ends[e]))
        torch.testing.assert_close(y[rows].float(), x[rows].float() @ w[e].float(), rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize(("m", "n"), [(8, 72), slow(136, 16), slow(40, 8), slow(64, 256)])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_the_outer_product(counts: list[int], m: int, n: int) -> None:
    from kt_hf.backends.gpu import grouped_product

    ends, total = cut(counts, 9)
    left, right = (drawn(int(total), size, seed=size).bfloat16().to(DEVICE) for size in (m, n))
    left[sum(counts) :] = right[sum(counts) :] = float("nan")
    found = grouped_product.outer(left, right, ends)
    for e in range(len(counts)):
        rows = slice(int(ends[e - 1]) if e else 0, int(ends[e]))
        torch.testing.assert_close(found[e].float(), left[rows].float().T @ right[rows].float(), rtol=1e-2, atol=5e-2)
        assert counts[e] or not found[e].any()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", GATES)
def test_the_gates_derivatives(name: str, biased: bool) -> None:
    """Against autograd in fp32, with gates far out; rows of no expert are not written to."""
    from kt_hf.backends.gpu import fused_kernels, torch_rows

    gate = GATES[name]
    gu, q = (drawn(21, size, seed=size, scale=6).bfloat16() for size in (gate.halves * I, I))
    weights, ends = torch.rand(21) + 0.1, torch.tensor([4, 17], dtype=torch.int32)
    bias, experts = drawn(3, gate.halves * I, seed=7).bfloat16(), torch.tensor([0] * 4 + [2] * 13 + [3] * 4)
    of_rows = bias.float()[experts.clamp(max=2)] if biased else torch.zeros_like(gu, dtype=torch.float32)
    wide = (gu.float() + of_rows).requires_grad_()
    h = by_hand(gate, wide)
    (h * (q.float() * weights[:, None])).sum().backward()
    wanted = wide.grad, h.detach() * weights[:, None], (h.detach() * q.float()).sum(1)
    for module in (fused_kernels, torch_rows):
        given, product, none = gu.clone().to(DEVICE), q.clone().to(DEVICE), torch.zeros_like
        on = weights.to(DEVICE), ends.to(DEVICE)
        more = (bias.to(DEVICE), experts.short().to(DEVICE)) if biased else (None, None)
        product_only = module.gated(gu.clone().to(DEVICE), none(given), ends.to(DEVICE), gate, *more)
        assert_close(product_only[:17].cpu(), h.detach()[:17], 8e-3, module.__name__)
        by_row = module.gate_gradients_(given, none(given), product, none(product), *on, gate, *more)
        for found, value in zip((given, product, by_row), wanted, strict=True):
            assert value is not None
            assert_close(found[:17].cpu(), value[:17], 1.2e-2 if biased else 8e-3, module.__name__)
        assert module is torch_rows or torch.equal(given[17:].cpu(), gu[17:])


def test_an_unknown_gate_is_refused() -> None:
    with pytest.raises(KTAMXConfigError, match=r"activation='no_such' .*silu"):
        Gate("no_such")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 12])
def test_warming_up_computes_tiles_of_all_heights(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from kt_hf.backends.gpu import grouped_product
    from kt_hf.backends.gpu.warm_up import warm_up

    choose(monkeypatch, "own")
    heights, original = set(), grouped_product.product
    monkeypatch.setattr(grouped_product, "product", lambda x, w, ends, cut: (heights.add(cut[2]), original(x, w, ends, cut))[1])  # fmt: skip # noqa: E501
    warm_up(ExpertShape(64, K, 16, 8), DEVICE, rank)
    assert heights == {height for large, height in grouped_product.PRODUCT}


def test_rows_that_come_in_pieces_are_summed_as_at_once(way: str) -> None:
    """To the bit, with NaN in the rows of no expert."""
    ids, weights = routed("many").to(DEVICE), torch.rand(TOKENS, K).to(DEVICE)
    ids[::3, 1] = -1
    rows = Rows.by_expert(ids, weights, torch.arange(E, dtype=torch.int16, device=DEVICE))
    end = int(rows.ends[-1])
    parts = [drawn(TOKENS * K, H, seed=i).bfloat16().to(DEVICE) for i in (7, 8)]
    for part in parts:
        part[end:] = float("nan")
    everything, starts = torch.full_like(parts[0], float("nan")), [0, *rows.ends.tolist()]
    for experts in (slice(0, 2), slice(2, 3), slice(3, 4)):
        span = slice(starts[experts.start], starts[experts.stop])
        rows.part(experts, span).keep(Addends(*(p[span].clone() for p in parts)), True, everything)
    pieces = rows.sum_by_token(Addends(everything, None), weighted=False)
    assert torch.equal(rows.sum_by_token(Addends(*(p.clone() for p in parts)), weighted=True), pieces)
    y = sum(p.float() for p in parts)[rows.place.long()].view(TOKENS, K, H) * weights[..., None]  # type: ignore[index]
    assert_close(pieces.cpu(), y.masked_fill((ids < 0)[..., None], 0).sum(1).cpu(), FORWARD, "sum")


@pytest.mark.parametrize("kind", KINDS)
def test_widened_to_the_bit(kind: str) -> None:
    """Low bits of every format, matrices that fill no program, special values among scales and codes."""
    matrices = random_matrices(kind, 3, 24, 64)
    if matrices.scales.dtype == torch.uint8:
        matrices.scales.view(-1)[:4] = torch.tensor([0, 1, 254, 255], dtype=torch.uint8)
    if matrices.code == "e4m3":  # every code, both NaN among them
        matrices.codes.view(torch.uint8).view(-1)[:256] = torch.arange(256, dtype=torch.int64).to(torch.uint8)
    if matrices.code in ("e4m3", "int8"):
        matrices.scales.view(-1)[:2] = torch.tensor([2.0**100, 2.0**-100])
    found, expected = widen_kernels.widened(matrices.to(DEVICE)).cpu(), matrices.dequantized(torch.bfloat16)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())
