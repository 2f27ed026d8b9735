"""The planner: the best split there is, that keeps to the rules, and moves the right way."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kt_hf import apply_kt_moe
from kt_hf.backends.gpu.weight_stream import BUFFERS, CHUNK_BYTES
from kt_hf.placement import Placement
from kt_hf.placement import packer as packing
from kt_hf.placement.calibration import fitted, measure_rates
from kt_hf.placement.planner import (
    ATTENTION_SECONDS,
    LinearCost,
    MachineRates,
    MemoryBudget,
    TierPlan,
    assumed_rates,
    plan_tiers,
)
from kt_hf.shapes import ExpertShape, expert_bytes
from kt_hf.system.cpu import plan_threads
from tests.support.cases import make_config
from tests.support.helpers import MIXTRAL

LITE = ExpertShape(64, 6, 2048, 1408)
SMALL = ExpertShape(12, 3, 256, 128)
RATES = assumed_rates(LITE)
GB = 10**9
QUIET = LinearCost(1e-3, 1e-7, 5e-6, 4e-6), LinearCost(1e-3, 2e-7, 9e-6, 7e-6)
BESIDE = LinearCost(2e-3, 1e-7, 6e-6, 5e-6), LinearCost(2e-3, 2e-7, 9e-6, 8e-6)
GENERAL = MachineRates(20e9, *QUIET, *BESIDE, 3e5, 1e5)


def brute_force(
    rates: MachineRates, shape: ExpertShape, layers: int, tokens: int, free: int, shares: list[float], width: int = 2
) -> dict[tuple[int, int], float]:
    """Seconds of every split that the rules allow, expert by expert; streamed weights have `width` bytes."""
    rows = [tokens * shape.top_k * share for share in shares]
    used = [1 - math.exp(-n) for n in rows]
    size = 3 * shape.hidden_size * shape.intermediate_size * 2
    found = {}
    for r, s in itertools.product(range(shape.num_experts + 1), repeat=2):
        cpu = list(range(r + s, shape.num_experts))
        stored = size * width // 2
        chunk = max(stored, min(CHUNK_BYTES, s * stored)) if s else 0
        buffers = BUFFERS * chunk
        wide = 2 * chunk if width == 1 else 0  # a chunk made bf16 for the products
        room = r * size * layers + buffers + wide <= free or r + s == 0
        if r + s > shape.num_experts or 0 < len(cpu) < shape.top_k or not room:
            continue
        stream = sum(used[e] for e in range(r, r + s)) * size * width / 2 / rates.pcie_bytes_per_s
        seconds = 0.0
        for line, gpu, attention in (
            (rates.beside_forward if s else rates.forward, rates.gpu_forward_rows_per_s, ATTENTION_SECONDS[0]),
            (rates.beside_backward if s else rates.backward, rates.gpu_backward_rows_per_s, ATTENTION_SECONDS[1]),
        ):
            operators = line.fixed + line.per_token * tokens if cpu else 0.0
            operators += sum(line.per_expert * used[e] + line.per_row * rows[e] for e in cpu)
            late = stream if cpu else max(0.0, stream - min(attention, buffers / rates.pcie_bytes_per_s))
            seconds += max(late, operators, sum(rows[: r + s]) / gpu)
        found[r, s] = seconds * layers
    return found


@pytest.mark.parametrize("seed", range(20))
def test_it_is_the_best_there_is(seed: int) -> None:
    rng = random.Random(seed)
    shares = sorted((rng.random() ** rng.choice([0, 1, 6]) for _ in range(12)), reverse=True)
    shares = [share / sum(shares) for share in shares]
    tokens, free = rng.choice([1, 30, 500, 20_000]), rng.choice([0, 10**6, 3 * 10**6, 10**9])
    width = 1 + seed % 2
    found = plan_tiers(GENERAL, SMALL, 2, tokens, free, shares, keep_8bit=width == 1)
    every = brute_force(GENERAL, SMALL, 2, tokens, free, shares, width)
    cost = {split: seconds * (0.9 if sum(split) == 12 else 1) for split, seconds in every.items()}
    assert cost[found.resident, found.streamed] == pytest.approx(min(cost.values()), rel=1e-9)
    assert every[found.resident, found.streamed] == pytest.approx(found.seconds, rel=1e-9)
    assert found.resident + found.streamed + found.cpu == 12


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 100_000), st.integers(10**9, 10**11), st.integers(0, 3 * 10**7), st.integers(10**4, 10**8),
    st.lists(st.integers(0, 1000), min_size=12, max_size=12),
)  # fmt: skip
def test_rules_and_directions(tokens: int, pcie: int, free: int, gpu: int, shares: list[int]) -> None:
    """Never against the number the operators need or the GPU's memory; never slower for a faster bus, more memory or
    fewer tokens."""
    rates = dataclasses.replace(
        GENERAL, pcie_bytes_per_s=pcie, gpu_forward_rows_per_s=gpu, gpu_backward_rows_per_s=gpu / 3
    )
    popularity = sorted(shares, reverse=True)

    def made(tokens: int = tokens, free: int = free, **more: Any) -> TierPlan:
        found = plan_tiers(dataclasses.replace(rates, **more), SMALL, 2, tokens, free, popularity)
        assert found.cpu == 0 or found.cpu >= SMALL.top_k
        assert found.resident * expert_bytes(SMALL) * 2 <= free
        return found

    least = made().seconds / 0.9 * (1 + 1e-9)  # one without experts on the CPU may be a tenth slower
    assert made(pcie_bytes_per_s=2 * pcie).seconds <= least
    assert made(free=2 * free).seconds <= least
    assert made(tokens=tokens // 2).seconds <= least


def test_the_operators_need_as_many_as_a_token_is_sent_to() -> None:
    """Memory for all experts but one: that one cannot be left to the CPU by itself."""
    fast = dataclasses.replace(GENERAL, gpu_forward_rows_per_s=1e9, gpu_backward_rows_per_s=1e9)
    for left, expected in ((0, 0), (1, 3), (2, 3), (3, 3), (4, 4)):
        free = (12 - left) * expert_bytes(SMALL) * 2
        assert plan_tiers(fast, SMALL, 2, 5000, free, streaming=False).cpu == expected


def test_what_it_chooses() -> None:
    """Experts of DeepSeek-V2-Lite's size on an H200 with PCIe 5 and 16 AMX cores."""
    assert plan_tiers(RATES, LITE, 26, 8192, 100 * GB).cpu == 0, "a GPU with room for all takes all"
    nothing = plan_tiers(RATES, LITE, 26, 8192, 0)
    assert (nothing.resident, nothing.streamed, nothing.cpu) == (0, 0, 64)
    little = plan_tiers(RATES, LITE, 26, 8192, 2 * GB)
    assert little.streamed > 32, "at 8,192 tokens the bus is faster than the CPU"
    assert plan_tiers(RATES, LITE, 26, 64, 2 * GB).streamed < little.streamed
    assert plan_tiers(RATES, LITE, 26, 8192, 2 * GB, streaming=False).streamed == 0
    slow = dataclasses.replace(RATES, pcie_bytes_per_s=2e9)
    assert plan_tiers(slow, LITE, 26, 512, 2 * GB).streamed < 8
    eight = plan_tiers(RATES, LITE, 26, 2048, 2 * GB, keep_8bit=True)
    assert eight.seconds < 0.7 * plan_tiers(RATES, LITE, 26, 2048, 2 * GB).seconds, "half the bytes cross the bus"
    skewed = [0.5, 0.3] + [0.2 / 62] * 62
    for tokens, streaming in ((16, True), (8192, False)):
        even = plan_tiers(RATES, LITE, 26, tokens, 2 * GB, streaming=streaming)
        assert plan_tiers(RATES, LITE, 26, tokens, 2 * GB, skewed, streaming).seconds < even.seconds


@pytest.mark.parametrize(("cpu_seconds", "left"), [(0.1, True), (0.85, True), (0.95, False)])
def test_experts_are_left_to_the_cpu_for_more_than_a_tenth(cpu_seconds: float, left: bool) -> None:
    """The bus takes a second for all of them, less for all but those that are left to the CPU."""
    size = 12 * expert_bytes(SMALL)
    quiet, beside = [LinearCost(10.0, 0, 0, 0)] * 2, [LinearCost(cpu_seconds, 0, 0, 0)] * 2
    found = plan_tiers(MachineRates(size, *quiet, *beside, 1e12, 1e12), SMALL, 100, 10_000, BUFFERS * size)
    assert found.resident == 0
    assert found.streamed > 0
    assert (found.cpu > 0) == left


def test_memory_for_experts() -> None:
    room = MemoryBudget(2048, rest_bytes=3 * GB, layers=27, vocabulary=102_400)
    left = room.free_for_experts(80 * GB, 2048, LITE)
    assert 60 * GB < left < 69 * GB
    assert room.free_for_experts(80 * GB, 16_384, LITE) < left
    assert room.free_for_experts(2 * GB, 2048, LITE) == 0
    lora = dataclasses.replace(room, lora_rank=8).free_for_experts(80 * GB, 2048, LITE)
    assert left - lora == 27 * 64 * 8 * 3 * (2048 + 1408) * 16


def test_fitting() -> None:
    """Exact lines are found, and noise makes no negative terms."""
    line = LinearCost(2e-3, 5e-7, 3e-5, 4e-6)
    points = [(1.0, float(t), float(e), float(n)) for t, e, n in itertools.product((64, 2048), (8, 16), (256, 4096))]
    found = fitted(points, [line.seconds(t, e, n) for _, t, e, n in points])
    assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(line), rel=1e-6)
    steep = fitted(points, [1e-6 * n for _, _, _, n in points])
    assert min(dataclasses.astuple(steep)) >= 0
    assert steep.per_row == pytest.approx(1e-6, rel=1e-3)
    falling = fitted(points, [1.0 - 1e-2 * e for _, _, e, _ in points])
    assert min(dataclasses.astuple(falling)) >= 0


@pytest.mark.parametrize(("E", "K"), [(8, 2), (8, 6), (4, 1)])
def test_measured(backend: str, E: int, K: int) -> None:
    """On a small shape, the CPU for the GPU: positive, and the state of random numbers is as it was."""
    shape, state = ExpertShape(E, K, 64, 64), torch.get_rng_state()
    threads = torch.get_num_threads()
    rates = measure_rates(
        shape, torch.device("cpu"), plan_threads(1, False), backend, tokens=64, copy_bytes=1 << 20, gpu_tokens=64
    )
    for line in (rates.forward, rates.backward, rates.beside_forward, rates.beside_backward):
        assert line.seconds(64, 8, 128) > 0
    assert min(rates.pcie_bytes_per_s, rates.gpu_forward_rows_per_s, rates.gpu_backward_rows_per_s) > 0
    assert not rates.assumed
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_no_longer_calls_than_memory_holds_are_measured(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators refuse them, naming a setting that nobody has set."""
    for module in ("kt_hf.placement.calibration", "kt_hf.backends.kt_kernel.backend"):
        monkeypatch.setattr(f"{module}.most_tokens", lambda _: 40)
    rates = measure_rates(
        ExpertShape(8, 2, 64, 64), torch.device("cpu"), plan_threads(1, False), backend, 4096, 1 << 20, gpu_tokens=64
    )
    assert rates.forward.seconds(40, 8, 80) > 0


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    monkeypatch.setattr("kt_hf.system.gpu.experts_device", lambda: torch.device("cpu"))
    seen: list[Any] = []

    def plan_seen(*args: Any) -> TierPlan:
        seen.append(args)
        return TierPlan(2, 3, 3, 1.0, 0.1, 0.2, 0.3)

    monkeypatch.setattr(packing, "plan_tiers", plan_seen)
    monkeypatch.setattr(packing, "measure_rates", lambda *_: RATES)
    return seen


@pytest.mark.parametrize(("tokens", "expected"), [(4096, 4096), (None, 2048)])
def test_auto(backend: str, tokens: int | None, expected: int, measured: list[Any], caplog: Any) -> None:
    """Planned with the step's tokens and the placement's popularity, and told."""
    caplog.set_level(logging.INFO, "kt_hf")
    counts = {i: torch.tensor([1, 9, 1, 5, 1, 1, 1, 1]) for i in (0, 1)}
    config = make_config(backend, kt_expert_placement="auto", kt_lora_rank=8)
    model = apply_kt_moe(MIXTRAL(torch.bfloat16), config, placement=counts, tokens_per_step=tokens)
    ((_, shape, layers, given_tokens, free, popularity, streaming, keep_8bit),) = measured
    assert (shape.num_experts, layers, given_tokens, streaming, keep_8bit) == (8, 2, expected, True, False)
    assert popularity == pytest.approx([0.45, 0.25, *[0.05] * 6])
    assert free > 0
    parts = model._kt_wrappers[0]._runner.backend.parts
    assert [part.experts.tolist() for part in parts] == [[1, 3], [0, 2, 4], [5, 6, 7]]
    assert "2 experts of each layer on the GPU, 3 streamed, 3 on the CPU" in caplog.text


def test_auto_takes_what_kt_max_len_says(measured: list[Any]) -> None:
    config = make_config("torch", kt_expert_placement="auto", kt_max_len=77)
    apply_kt_moe(MIXTRAL(torch.bfloat16), config)
    assert measured[0][3] == 77
    assert measured[0][5] == ()


def test_auto_does_not_stream_fp32(measured: list[Any]) -> None:
    apply_kt_moe(MIXTRAL(torch.float32), make_config("torch", kt_expert_placement="auto"))
    assert measured[0][6] is False


def test_popularity_of_a_profile() -> None:
    found = Placement.by_use({0: torch.tensor([1, 3]), 1: torch.tensor([2, 0]), 2: torch.tensor([0, 0])})
    assert found.share == pytest.approx([0.875, 0.125])
    assert Placement.by_use({0: torch.tensor([1, 3]), 1: torch.tensor([2, 0, 1])}).share == ()
