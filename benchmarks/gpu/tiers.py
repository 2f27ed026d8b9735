"""The planner against a sweep: training steps with a layer's experts split over GPU, bus and CPU in all ways.

    python benchmarks/gpu tiers --csv gpu_tiers.csv                              # 512 to 32,768 tokens a step
    python benchmarks/gpu tiers --slower-bus 2 4 --tokens 2048 --csv gpu_tiers.csv   # PCIe 4 and 3
    python benchmarks/gpu tiers --device cpu --shape tiny --tokens 64            # try the script without a GPU

For each number of tokens the planner chooses for a GPU whose memory has room for `--resident` experts a layer; then the
splits around its choice train in turn, a step each, so that a slow moment of the machine hits all of them. A row has
the split's seconds, those the planner predicted for its experts, and the bound: of each layer and direction the slowest
of bytes over the bus's rate, operators' time and GPU's time, and the rest of the step, which is that of the model with
every expert on the GPU less what these take there.
"""

from __future__ import annotations

import argparse
import gc
import logging
import statistics
from typing import Any

import torch
from common import free_memory, machine, write
from models import adapted, make_config, make_model, set_checkpointing, start_again
from parts import PARTS, Parts, Steps, slower_bus, watch, watch_transfers

from kt_hf import KTConfig, apply_kt_moe
from kt_hf.placement import choice as choosing
from kt_hf.placement import memory_model, planner
from kt_hf.placement.machine_rates import MachineRates
from kt_hf.placement.planner import predicted
from kt_hf.placement.tiers import Tiers
from kt_hf.shapes import expert_bytes

TierPlan = tuple[int, int]  # resident, streamed


class Planned:
    """What the planner measured and chose last; it is asked where streaming everything would clearly win too."""

    rates: MachineRates
    shape: Any
    room: int
    choice: Any

    def __enter__(self) -> Planned:
        self._kept = choosing.plan_tiers
        self._asked = choosing.cpu_may_be_faster, choosing.is_worth_its_cpu
        choosing.cpu_may_be_faster = choosing.is_worth_its_cpu = lambda *_: True

        def watched(rates: MachineRates, shape: Any, layers: int, tokens: int, room: int, *rest: Any) -> Any:
            self.rates, self.shape, self.room = rates, shape, room
            self.choice = self._kept(rates, shape, layers, tokens, room, *rest)
            return self.choice

        choosing.plan_tiers = watched
        return self

    def __exit__(self, *_: object) -> None:
        choosing.plan_tiers = self._kept
        choosing.cpu_may_be_faster, choosing.is_worth_its_cpu = self._asked


def build(given: argparse.Namespace, where: Any, tokens: int, device: torch.device) -> Any:
    settings = KTConfig(kt_lora_rank=given.rank, kt_expert_placement=where, kt_moe_lora_device=given.lora_device)
    config = make_config("deepseek_v2", given.shape, given.layers)
    model = apply_kt_moe(make_model(config, device, stock=False), settings, tokens_per_step=tokens)
    model = adapted(model, given.rank, device)
    set_checkpointing(model, True)
    start_again(model, given.lora_device, device)
    return model


def planned(given: argparse.Namespace, tokens: int, device: torch.device) -> Planned:
    """The choice for a GPU with room for so many resident experts, and no more."""
    found = Planned()
    kept = memory_model.MemoryBudget.free_for_experts

    def little(room: Any, free: int, tokens: int, shape: Any) -> int:
        layers = given.layers - 1  # the first has no experts
        some = given.resident * expert_bytes(shape) * layers + planner.BUFFERS * planner.CHUNK_BYTES
        return min(some, kept(room, free, tokens, shape))

    memory_model.MemoryBudget.free_for_experts = little
    try:
        with found:
            build(given, "auto", tokens, device)
    finally:
        memory_model.MemoryBudget.free_for_experts = kept
    gc.collect()
    return found


def splits(choice: TierPlan, E: int, K: int, step: int) -> list[TierPlan]:
    """Around a choice: as many resident, from none streamed to all; and all on the CPU, and all on the GPU."""
    resident, streamed = choice
    tried = {(resident, s) for s in (*range(0, E - resident + 1, step), streamed, E - resident)}
    tried |= {(0, 0), (E, 0)}
    return sorted(s for s in tried if sum(s) == E or E - sum(s) >= K)


def rounds(models: dict[Any, Any], given: argparse.Namespace, tokens: int, parts: Parts | None) -> dict[Any, list[Any]]:
    """(seconds, seconds by part) of each round after the first, of every model in turn."""
    sequence = min(given.sequence, tokens)
    steps = {split: Steps(model, sequence, tokens // sequence, 1e-4) for split, model in models.items()}
    taken: dict[Any, list[Any]] = {split: [] for split in models}
    for number in range(given.rounds + 1):
        for split, one in steps.items():
            seconds, _, found = one.one(parts)
            if number:
                taken[split].append((seconds, found))
    return taken


def rows(given: argparse.Namespace, tokens: int, bus: int, device: torch.device, parts: Parts) -> list[dict[str, Any]]:
    plan = planned(given, tokens, device)
    rates, shape, layers = plan.rates, plan.shape, given.layers - 1
    E, K, choice = shape.num_experts, shape.top_k, (plan.choice.resident, plan.choice.streamed)
    tried = splits(choice, E, K, given.step or max(1, E // 8))
    models = {s: build(given, {"resident": s[0], "streamed": s[1]}, tokens, device) for s in tried}
    for model in models.values():
        watch(model, parts)
    taken = rounds(models, given, tokens, parts)
    median = {s: statistics.median(seconds for seconds, _ in runs) for s, runs in taken.items()}
    part = {
        s: {p: statistics.median(found.get(p, 0.0) for _, found in runs) for p in PARTS} for s, runs in taken.items()
    }
    load = planner._Load.of(shape, tokens, ())
    everything = predicted(rates, shape, layers, load, Tiers(E))
    rest = max(0.0, median[E, 0] - everything.seconds)
    made = []
    for (resident, streamed), seconds in median.items():
        split, times = (resident, streamed), predicted(rates, shape, layers, load, Tiers(resident, streamed))
        on_gpu = load.rows[resident + streamed]
        stream = times.stream_seconds / 2
        bound = rest
        for direction, rate in (("forward", rates.gpu_forward_rows_per_s), ("backward", rates.gpu_backward_rows_per_s)):
            bound += max(stream, part[split][f"operator {direction}"], layers * on_gpu / rate)
        made.append(
            {
                "bus": f"1/{bus}", "layers": given.layers, "tokens": tokens, "lora_device": given.lora_device,
                "resident": resident, "streamed": streamed, "chosen": int(split == choice), "step": seconds,
                "fastest_step": min(s for s, _ in taken[split]), "predicted_experts": times.seconds,
                "stream": times.stream_seconds, "predicted_gpu": times.gpu_seconds,
                "predicted_cpu": times.cpu_seconds, "rest": rest,
                "bound": bound, "gb_per_s": rates.pcie_bytes_per_s / 1e9,
            }
            | part[split]
        )  # fmt: skip
        told = (
            f"{resident} resident, {streamed} streamed, {E - resident - streamed} CPU{' (chosen)' * (split == choice)}"
        )
        print(
            f"{tokens} tokens, bus 1/{bus}: {told}: {seconds:.3f} s (at best {made[-1]['fastest_step']:.3f}), "
            f"predicted {rest + times.seconds:.3f}, bound {bound:.3f}; "
            + "  ".join(f"{name} {value:.3f}" for name, value in part[split].items()),
            flush=True,
        )
    best = min((s for s in median if s[0] <= choice[0]), key=lambda s: median[s])
    ratio = median[choice] / median[best]
    print(f"{tokens} tokens, bus 1/{bus}: chosen {choice}, {ratio:.3f} of the best, {best}; {rates}", flush=True)
    return made


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192, 32768])
    parser.add_argument("--slower-bus", type=int, nargs="+", default=[1])
    parser.add_argument("--resident", type=int, default=8)
    parser.add_argument("--step", type=int, help="between numbers of streamed experts; default: an eighth of all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--lora-device", choices=("cpu", "gpu"), default="gpu")


def run(given: argparse.Namespace, device: torch.device) -> None:
    logging.basicConfig(level=logging.WARNING)
    parts = Parts(device.type == "cuda")
    watch_transfers(parts)
    for bus in given.slower_bus:
        for tokens in given.tokens:
            with slower_bus(bus):
                found = rows(given, tokens, bus, device, parts)
            for row in found:
                if given.csv:
                    write(given.csv, machine(device) | row)
            free_memory(device)
