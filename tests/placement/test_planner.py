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
from kt_hf.placement import Placement, choice
from kt_hf.placement.calibration import fitted, measure_rates
from kt_hf.placement.expert_memory import LEAST_CHUNK, chunk_bytes, resident_extra
from kt_hf.placement.machine_rates import LinearCost, MachineRates, assumed_rates
from kt_hf.placement.planner import ATTENTION_SECONDS, TierPlan, expected, plan_tiers
from kt_hf.placement.tiers import Tiers, spread
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
GENERAL = MachineRates(20e9, *QUIET, *BESIDE, 3e5, 1e5, gpu_bytes_per_s=2e9)


def brute_force(
    rates: MachineRates, shape: ExpertShape, layers: int, tokens: int, free: int, shares: list[float], width: int = 2
) -> dict[tuple[int, int, int], float]:
    """Seconds of every choice (resident, streamed, whole layers) that the rules allow; streamed weights of `width`."""
    rows = [tokens * shape.top_k * share for share in shares]
    used = [1 - math.exp(-n) for n in rows]
    size = 3 * shape.hidden_size * shape.intermediate_size * 2
    stored, E = size * width // 2, shape.num_experts
    found = {}
    for r, s, whole in itertools.product(range(E + 1), range(E + 1), range(layers)):
        cpu = list(range(r + s, E))
        if r + s > E or 0 < len(cpu) < shape.top_k or (whole and (r or s < E)):
            continue
        if not cpu and 0 < r < E and sum(used) >= 0.95 * E:  # whole layers are better
            continue
        chunks = (BUFFERS if width == 2 else BUFFERS / 2 + 1) if s else 0  # of bf16; a widened one among them
        left = free - r * stored * layers - whole * E * stored
        least = max(size, min(LEAST_CHUNK * 2 // width, s * size))
        if r or whole:
            left -= resident_extra(shape, tokens, 8 * width)
            if left < int(chunks * least):
                continue
        chunk = max(least, min(CHUNK_BYTES * 2 // width, s * size, int(left / chunks))) if s else 0
        stream = sum(used[e] for e in range(r, r + s)) * stored / rates.pcie_bytes_per_s
        ahead = BUFFERS * chunk * width / 2 / rates.pcie_bytes_per_s
        seconds = 0.0
        for line, gpu, attention in (
            (rates.beside_forward if s else rates.forward, rates.gpu_forward_rows_per_s, ATTENTION_SECONDS[0]),
            (rates.beside_backward if s else rates.backward, rates.gpu_backward_rows_per_s, ATTENTION_SECONDS[1]),
        ):
            low = 24 / 8 / (0.69 * rates.gpu_bytes_per_s) if width == 1 else 0  # of a weight that is widened
            compute = sum(rows[: r + s]) / gpu + sum(used[: r + s]) * size / 2 * low
            if cpu:
                operators = line.fixed + line.per_token * tokens
                operators += sum(line.per_expert * used[e] + line.per_row * rows[e] for e in cpu)
                seconds += layers * max(stream, operators, compute)
                continue
            busy = 0.0  # or held up, for the buffers are full
            resident = [layer in spread(whole, layers) for layer in range(layers)]
            for layer in range(layers if s else 0):
                if not resident[layer]:
                    before = whole / max(1, min(whole, layers - whole))
                    after_whole = whole and sum(not x for x in resident[:layer]) < min(whole, layers - whole)
                    gap = attention + (before * (attention + compute) if after_whole else 0)
                    busy += stream + max(0.0, gap - ahead)
            seconds += max(busy - layers * attention, layers * compute)
        found[r, s, whole] = seconds
    return found


@pytest.mark.parametrize("seed", range(20))
def test_it_is_the_best_there_is(seed: int) -> None:
    rng = random.Random(seed)
    shares = sorted((rng.random() ** rng.choice([0, 1, 6]) for _ in range(12)), reverse=True)
    shares = [share / sum(shares) for share in shares]
    tokens, free = rng.choice([1, 30, 500, 20_000]), rng.choice([0, 10**6, 10**7, 3 * 10**7, 10**9])
    width, layers = 1 + seed % 2, rng.choice([2, 5])
    found = plan_tiers(GENERAL, SMALL, layers, tokens, free, shares, bits=8 * width)
    every = brute_force(GENERAL, SMALL, layers, tokens, free, shares, width)
    chosen = found.resident, found.streamed, found.resident_layers
    cost = {split: seconds * (0.9 if sum(split[:2]) == 12 else 1) for split, seconds in every.items()}
    assert cost[chosen] == pytest.approx(min(cost.values()), rel=1e-9)
    assert every[chosen] == pytest.approx(found.seconds, rel=1e-9)
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
    for left, on_cpu in ((0, 0), (1, 3), (2, 3), (3, 3), (4, 4)):
        free = (12 - left) * expert_bytes(SMALL) * 2
        assert plan_tiers(fast, SMALL, 2, 5000, free, streaming=False).cpu == on_cpu


def test_what_it_chooses() -> None:
    """Experts of DeepSeek-V2-Lite's size on an H200 with PCIe 5 and 16 AMX cores."""
    assert plan_tiers(RATES, LITE, 26, 8192, 100 * GB).cpu == 0, "a GPU with room for all takes all"
    nothing = plan_tiers(RATES, LITE, 26, 8192, 0)
    assert nothing.tiers == Tiers(0, 64), "streaming needs little memory, and the CPU takes no less"
    assert nothing.chunk_bytes == expert_bytes(LITE)
    little = plan_tiers(RATES, LITE, 26, 8192, 2 * GB)
    assert little.streamed > 32, "at 8,192 tokens the bus is faster than the CPU"
    assert plan_tiers(RATES, LITE, 26, 64, 2 * GB).streamed < little.streamed
    assert plan_tiers(RATES, LITE, 26, 8192, 2 * GB, streaming=False).streamed == 0
    slow = dataclasses.replace(RATES, pcie_bytes_per_s=2e9)
    assert plan_tiers(slow, LITE, 26, 512, 2 * GB).streamed < 8
    eight = plan_tiers(RATES, LITE, 26, 2048, 2 * GB, bits=8)
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


@pytest.mark.parametrize("free", [0, 10**8, 10**9])
@pytest.mark.parametrize("tokens", [2048, 8192, 32_768])
def test_no_cpu_where_streaming_is_faster(tokens: int, free: int) -> None:
    """Qwen3-30B-A3B on PCIe 5 and 4, whatever memory is left: 16 AMX cores are slower."""
    shape = ExpertShape(128, 8, 2048, 768)
    for bus in (54e9, 27e9):
        rates = dataclasses.replace(assumed_rates(shape), pcie_bytes_per_s=bus)
        found = plan_tiers(rates, shape, 48, tokens, free)
        streamed = expected(rates, shape, 48, tokens, Tiers(0, 128))
        cpu = 48 * sum(line.seconds(tokens, 128, 8 * tokens) for line in (rates.forward, rates.backward))
        assert streamed.seconds < cpu, "or the test is of nothing"
        assert found.cpu == 0 or found.seconds < 0.9 * streamed.seconds
        assert found.streamed > 0


def test_whole_layers_come_with_memory() -> None:
    """The bus is busy for the others; where it is not what takes longest, no more layers are sent to the GPU."""
    shape = ExpertShape(128, 8, 2048, 768)
    rates = assumed_rates(shape)
    layer, found = 128 * expert_bytes(shape), []
    for whole in range(0, 49, 8):
        plan = plan_tiers(rates, shape, 48, 2048, (whole + 2) * layer)
        assert plan.resident_layers <= whole + 2
        assert (plan.resident, plan.cpu) == (0, 0) or plan.resident == 128
        found.append(plan)
    seconds = [plan.seconds for plan in found]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[-1] < 0.6 * seconds[0]
    assert f"{found[2].resident_layers} whole layers on the GPU; of each other layer 0 experts" in str(found[2])
    many = plan_tiers(rates, shape, 48, 65_536, 20 * layer)
    assert many.resident_layers == 0, "the GPU takes longer than the bus, with all layers streamed"


def test_buffers_are_as_large_as_there_is_room() -> None:
    for room, one, size in ((0, 9_437_184, 2**24), (2**27, 9_437_184, 2**27 // 3), (2**32, 9_437_184, CHUNK_BYTES)):
        assert chunk_bytes(room, ExpertShape(128, 8, 2048, 768), 128) == size
        assert size > one
    assert chunk_bytes(0, LITE, 64) == expert_bytes(LITE), "an expert is larger than 16 MiB"
    assert chunk_bytes(2**40, LITE, 2) == 2 * expert_bytes(LITE)
    assert chunk_bytes(2**27, ExpertShape(128, 8, 2048, 768), 128, bits=8) == int(2**27 / 2.5)


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

    monkeypatch.setattr(choice, "plan_tiers", plan_seen)
    monkeypatch.setattr(choice, "measure_rates", lambda *_: RATES)
    for name in ("cpu_may_be_faster", "is_worth_its_cpu"):
        monkeypatch.setattr(choice, name, lambda *_: True)
    return seen


@pytest.mark.parametrize(("tokens", "expected"), [(4096, 4096), (None, 2048)])
def test_auto(backend: str, tokens: int | None, expected: int, measured: list[Any], caplog: Any) -> None:
    """Planned with the step's tokens and the placement's popularity, and told."""
    caplog.set_level(logging.INFO, "kt_hf")
    counts = {i: torch.tensor([1, 9, 1, 5, 1, 1, 1, 1]) for i in (0, 1)}
    config = make_config(backend, kt_expert_placement="auto", kt_lora_rank=8)
    model = apply_kt_moe(MIXTRAL(torch.bfloat16), config, placement=counts, tokens_per_step=tokens)
    ((_, shape, layers, given_tokens, free, popularity, streaming, bits),) = measured
    assert (shape.num_experts, layers, given_tokens, streaming, bits) == (8, 2, expected, True, 16)
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


def test_widening_as_measured() -> None:
    """Weights a second on an H100, whose memory copies 3.0 TB/s; half as many where a card copies half as fast."""
    rates = assumed_rates(LITE)
    for bits, measured in ((4.5, 1.10e12), (8.002, 0.69e12)):
        seconds = rates.widening_seconds(measured, bits)
        assert seconds == pytest.approx(1, rel=0.02)
        slower = dataclasses.replace(rates, gpu_bytes_per_s=rates.gpu_bytes_per_s / 2)
        assert slower.widening_seconds(measured, bits) == pytest.approx(2 * seconds)
    assert rates.widening_seconds(1e12, 16) == 0
    resident = [expected(rates, LITE, 26, 2048, Tiers(LITE.num_experts), bits).gpu_seconds for bits in (16, 4.5)]
    weights = 26 * LITE.num_weights  # every expert has tokens, forward and backward
    assert resident[1] - resident[0] == pytest.approx(2 * rates.widening_seconds(weights, 4.5), rel=1e-3)


def test_layers_that_are_computed_again_take_another_forward() -> None:
    plain, some, every = (expected(RATES, LITE, 26, 8192, Tiers(0, 64), again=part) for part in (0.0, 0.5, 1.0))
    assert plain.stream_seconds < some.stream_seconds < every.stream_seconds
    assert every.stream_seconds == pytest.approx(1.5 * plain.stream_seconds), "three times over the bus, not two"
    assert some.seconds == pytest.approx((plain.seconds + every.seconds) / 2)
    assert plain.seconds < every.seconds
    assert some.gpu_seconds == pytest.approx((plain.gpu_seconds + every.gpu_seconds) / 2)
