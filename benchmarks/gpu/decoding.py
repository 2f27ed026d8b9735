r"""Tokens a second of one stream, greedy, behind a short prompt: kt_hf's placements beside stock transformers.

    python -m benchmarks.gpu decoding --out results
    python -m benchmarks.gpu decoding --out results --only "bf16 streamed" "int4 resident" --turns 7
    python -m benchmarks.gpu decoding --out results --tiny                       # try the script without a GPU

12 layers of Qwen3-30B-A3B's sizes, random weights, an adapter on attention and every expert. Each token's experts are
drawn anew, as if they had nothing to do with the last token's: a trained model's have a little. All models are on the
card at once, and take turns. `copied_mb` crossed the bus for a token, `chosen_mb` are the weights of the experts that
it chose, and `bound` is how many tokens a second the bus could bring them for. `stock, merged` is stock without an
adapter, as it is when LoRA is merged into the weights. `launches` and `waits` of the host are a token's.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from card import GB, Card, Rows
from full import FAMILY
from low_bit import drawn_model
from models import make_config, make_model
from peft import get_peft_model
from routing import Spread
from sft import lora, promotion_of

from kt_hf import KTConfig, apply_kt_moe
from kt_hf.backends.gpu.weight_stream import Streamer
from kt_hf.placement import calibration, packer_of

CASES = ("stock", "bf16 resident", "bf16 streamed", "bf16 auto", "int4 resident", "int4 streamed")
DRAWS, PROMPT, PROFILED = 256, 32, 8  # experts of a token before they come again; tokens of the prompt; profiled tokens
WAITS = ("StreamSynchronize", "DeviceSynchronize", "EventSynchronize")


class EachToken(Spread):
    """Draws the experts of each single token anew, from a table on the device: nothing is copied or waited for."""

    def _hook(self, layer: int) -> Any:
        several, count, table = super()._hook(layer), 0, list[torch.Tensor]()

        def replaced(router: Any, given: Any, out: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            nonlocal count
            logits, weights, ids = out
            if len(ids) > 1:
                replacement: tuple[torch.Tensor, ...] = several(router, given, out)
                return replacement
            if not table:
                table.extend(self._draw(layer, DRAWS, logits.shape[1], ids))
            count = (count + 1) % DRAWS
            row = slice(count, count + 1)
            return logits, table[0][row].to(weights.dtype), table[1][row]

        return replaced


class Copied:
    """Bytes that all streamers copy to the device."""

    def __init__(self) -> None:
        self.bytes, copy = 0, Streamer._copy

        def counted(streamer: Streamer, source: torch.Tensor, target: torch.Tensor) -> None:
            self.bytes += source.nbytes
            copy(streamer, source, target)

        Streamer._copy = counted  # type: ignore[method-assign, assignment]


class Clock:
    """A streamer of `generate` that notes when each token came; the first is the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to do."""


class Contestant:
    """A model that takes turns with others.

    Args:
        name: Of the case.
        model: With an adapter.
        card: It is on.
        base: Whether the adapter is switched off.
    """

    def __init__(self, name: str, model: Any, card: Card, base: bool = False) -> None:
        self.name, self._model, self._card, self._base = name, model, card, base
        self._promotion = promotion_of(model)
        self.rates: list[float] = []
        self.row: dict[str, Any] = {}

    def generate(self, tokens: int) -> float:
        """Seconds that so many tokens took, behind the prompt and a first token."""
        torch.manual_seed(0)
        ids = torch.randint(3, self._model.config.vocab_size, (1, PROMPT), device=self._card.device)
        clock = Clock()
        with self._model.disable_adapter() if self._base else contextlib.nullcontext(), torch.no_grad():
            self._model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens + 1,
                min_new_tokens=tokens + 1, do_sample=False, use_cache=True, pad_token_id=0, streamer=clock,
            )  # fmt: skip
        self._card.synchronize()
        assert len(clock.times) == tokens + 2
        return clock.times[-1] - clock.times[1]

    def turn(self, tokens: int) -> None:
        self.rates.append(tokens / self.generate(tokens))

    def look_inside(self, copied: Copied) -> None:
        """Note what a token copies, launches and waits for."""
        self.generate(PROFILED)
        before = copied.bytes
        self.generate(1)
        one = copied.bytes - before
        self.generate(1 + PROFILED)  # the prompt's share is the same
        row = {"copied_mb": (copied.bytes - before - 2 * one) / PROFILED / 1e6}
        few, many = self._calls(1), self._calls(1 + PROFILED)
        self.row = row | {name: (many[name] - few[name]) / PROFILED for name in many}

    def _calls(self, tokens: int) -> dict[str, int]:
        """How often the host launched a kernel and waited while so many tokens came; zeros without a GPU."""
        from torch.profiler import ProfilerActivity, profile

        if self._card.tiny:
            return {"launches": 0, "waits": 0}
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            self.generate(tokens)
        names = [event.name for event in seen.events()]
        launches = sum("LaunchKernel" in name for name in names)
        return {"launches": launches, "waits": sum(any(wait in name for wait in WAITS) for name in names)}

    def held(self) -> int | None:
        """Layers that `auto` has brought to the card; None where nothing moves."""
        return len(self._promotion.held) if self._promotion else None


def contestants(given: argparse.Namespace, card: Card) -> Iterator[Contestant]:
    """Every case asked for, its model on the card."""
    for case in given.only or CASES:
        config = make_config(FAMILY, given.shape, given.layers)
        E, where = config.num_experts, case.rpartition(" ")[2]
        placement = {"resident": {"resident_layers": given.layers}, "streamed": {"streamed": E}}.get(where, "auto")
        settings = KTConfig(kt_lora_rank=given.rank, kt_expert_placement=placement, kt_moe_lora_device="gpu")
        if case == "stock":
            model = make_model(config, card.device, stock=True)
        elif case.startswith("int4"):
            model = drawn_model(config, card, settings, PROMPT)
        else:
            made = make_model(config, card.device, stock=False, own_memory=True)
            model = apply_kt_moe(made, settings, tokens_per_step=PROMPT)
            del made
        EachToken(model)
        packer = packer_of(model)
        if card.tiny and packer is not None:
            packer.streamer._copies = True  # as on a GPU
        torch.manual_seed(0)
        model = get_peft_model(model, lora(model, case != "stock", given.rank)).to(card.device).eval()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zeros might be left out
                parameter.data.normal_(std=0.01)
        if case == "stock":
            yield Contestant("stock, merged", model, card, base=True)
        yield Contestant(case, model, card)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="folder of the results, decoding.jsonl")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes on the CPU, to try the script")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of a turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=CASES)


def run(given: argparse.Namespace, device: torch.device) -> None:
    card, copied = Card(device), Copied()
    card.limit(card.total_gb)
    rows, rate = Rows(given.out, "decoding", card), calibration.copy_rate(device)
    config = make_config(FAMILY, given.shape, given.layers)
    weights = 3 * config.hidden_size * config.moe_intermediate_size * config.num_experts_per_tok * given.layers
    every = list(contestants(given, card))
    for one in every:
        one.look_inside(copied)
    for _ in range(given.turns):
        for one in every:
            one.turn(given.tokens)
    for one in every:
        chosen = weights * (4.5 if "int4" in one.name else 16) / 8
        bound = rate / chosen if one.name.endswith("streamed") else None
        median = statistics.median(one.rates)
        rows.add(case=one.name, layers=given.layers, tokens_per_s=median, turns=[round(r, 2) for r in one.rates],
                 chosen_mb=chosen / 1e6, **one.row, held=one.held(), bus_gb_per_s=rate / GB, bound=bound,
                 of_bound=bound and median / bound)  # fmt: skip
