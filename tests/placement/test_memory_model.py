"""The model of the GPU's memory: against measured peaks, against the tensors that live, and its directions."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.loss.loss_utils import ForCausalLMLoss

from kt_hf import KTConfig
from kt_hf.backends.gpu import grouped_mm as grouped
from kt_hf.backends.gpu.resident import resident_gradients
from kt_hf.backends.gpu.rows import Gating
from kt_hf.gates import PLAIN, Gate
from kt_hf.placement.assembly import linear_widths, memory_budget, training_as
from kt_hf.placement.expert_memory import lora_copy_bytes, lora_parameters, row_work
from kt_hf.placement.memory_model import (
    FRAGMENTS,
    MemoryBudget,
    fitting_chunk,
    gpu_memory,
    inner_bytes,
    most_resident_layers,
)
from kt_hf.placement.tiers import Tiers
from kt_hf.shapes import ExpertShape, expert_bytes
from tests.support.helpers import MIXTRAL

GB = 10**9
QWEN = ExpertShape(128, 8, 2048, 768)
STREAMED = Tiers(0, 128)
VOCABULARY = 151_936


class Peak(NamedTuple):
    """A peak of `torch.cuda.max_memory_allocated` on one H100, Qwen3-30B-A3B's layers, LoRA r=16 on all of them.

    In 10^9 bytes, torch 2.11, transformers 5.17, before kernels were fused (rows took up to twice as much): 12 layers
    from a checkpoint in TRL's SFTTrainer, routing as random weights have it; 48 layers in a loop that has the model
    compute its loss.
    """

    gigabytes: float
    layers: int
    tokens: int
    tiers: Tiers = STREAMED
    settings: Mapping[str, Any] = MappingProxyType({})
    lora_on_gpu: bool = True


PEAKS = [
    Peak(6.9, 12, 2048),
    Peak(8.6, 12, 4 * 2048),
    Peak(11.4, 12, 8 * 2048),
    Peak(16.7, 12, 16 * 2048),
    Peak(6.0, 12, 4 * 2048, lora_on_gpu=False),
    Peak(10.7, 12, 8 * 2048, settings={"offloading": True}),
    Peak(27, 12, 8 * 2048, Tiers(128)),
    Peak(27, 12, 8 * 2048, Tiers(0, 128, 12)),
    Peak(17.7, 12, 2048, Tiers(94, 34)),
    Peak(21.1, 48, 2048, settings={"loss": "full"}),
    Peak(11.1, 48, 2048, settings={"loss": "full"}, lora_on_gpu=False),
]


def qwen(layers: int, tokens: int, lora_on_gpu: bool = True, **settings: Any) -> MemoryBudget:
    linears = [(2048, 4096), (2048, 512), (2048, 512), (4096, 2048)] * layers
    rest = sum(a * b for a, b in linears) + layers * 2048 * 128 + 2 * VOCABULARY * 2048
    return MemoryBudget(
        tokens, 2 * rest, layers, VOCABULARY, lora_rank=16 * lora_on_gpu, computed_rank=16,
        other_lora=16 * sum(a + b for a, b in linears), inner_bytes=inner_bytes(2048, linears, layers),
        **({"loss": "chunked"} | settings),
    )  # fmt: skip


@pytest.mark.parametrize("peak", PEAKS, ids=lambda p: f"{p.layers}-{p.tokens}-{p.tiers.resident}-{p.gigabytes}")
def test_measured_peaks_are_within_a_tenth(peak: Peak) -> None:
    budget = qwen(peak.layers, peak.tokens, peak.lora_on_gpu, **peak.settings)
    made = gpu_memory(budget, QWEN, peak.layers, peak.tokens, peak.tiers)
    assert made.total / GB == pytest.approx(peak.gigabytes, rel=0.1)


def test_a_plain_trainer_runs_out_of_24_gigabytes() -> None:
    """As it did at 4 x 2,048 tokens, where SFTTrainer takes 8.6 GB."""
    made = gpu_memory(qwen(12, 8192, loss="full"), QWEN, 12, 8192, STREAMED)
    assert made.total > 0.95 * 24 * GB
    assert made.moment == "at the loss"


class Live(TorchDispatchMode):
    """Counts the bytes of tensors that are made while it is open, and still live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: Any) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, size)

    def _gone(self, size: int) -> None:
        self.now -= size


@pytest.mark.parametrize("gate", [PLAIN, Gate("relu2", gated=False)], ids=["gated", "gateless"])
@pytest.mark.parametrize(("hidden", "intermediate"), [(512, 128), (256, 256), (256, 512)])
def test_rows_in_backward_take_what_the_code_holds(hidden: int, intermediate: int, gate: Gate) -> None:
    shape, tokens = ExpertShape(4, 2, hidden, intermediate, gate), 256
    ids, weights = torch.rand(tokens, 4).topk(2).indices, torch.rand(tokens, 2)
    rows = grouped.Rows.by_expert(ids, weights, torch.arange(4))
    lora = grouped.Lora.of(tuple(torch.zeros(s) for s in shape.lora_shapes(8)), shape, torch.device("cpu"))
    assert sum(t.nbytes for t in lora.tensors) == lora_copy_bytes(shape, 8, 4)
    assert sum(t.numel() for t in lora.projections()) == lora_parameters(shape, 8)
    gate_up, down = torch.zeros(4, shape.up_rows, hidden).bfloat16(), torch.zeros(4, hidden, intermediate).bfloat16()
    x, grad = torch.zeros(tokens, hidden).bfloat16(), torch.zeros(tokens, hidden).bfloat16()
    with torch.no_grad(), Live() as live:
        resident_gradients(x, grad, gate_up, down, lora, rows, Gating(gate, None))
    assert live.peak == pytest.approx(row_work(shape, tokens, fused=False) + lora_copy_bytes(shape, 8, 4), rel=0.1)


def test_full_logits_take_what_the_loss_holds() -> None:
    """The bf16 logits are kept by who holds the model's output."""
    tokens, vocabulary = 128, 4096
    hidden, head = torch.randn(tokens, 8).bfloat16().requires_grad_(), torch.randn(vocabulary, 8).bfloat16()
    with Live() as live:
        logits = (hidden @ head.t())[None]
        ForCausalLMLoss(logits, torch.randint(0, vocabulary, (1, tokens)), vocabulary).backward()
    budget = MemoryBudget(tokens, vocabulary=vocabulary)
    made = gpu_memory(budget, ExpertShape(8, 2, 64, 64), 0, tokens, Tiers())
    assert live.peak == pytest.approx(made.parts["logits and loss"], rel=0.05)


def test_what_saves_memory_does() -> None:
    def total(tiers: Tiers = STREAMED, tokens: int = 8192, on_gpu: bool = True, **settings: Any) -> int:
        return gpu_memory(qwen(12, tokens, on_gpu, **settings), QWEN, 12, tokens, tiers).total

    plain = total()
    assert total(tokens=2048) < plain
    assert total(on_gpu=False) < plain - 2 * GB
    assert total(checkpointing=False) > plain + GB
    assert total(offloading=True) < plain
    assert total(checkpointing=False, offloading=True) < total(checkpointing=False)
    assert total(retained=0) < plain
    assert total(accumulating=True) > plain
    assert total(loss="full") > plain + 14 * GB
    layer = 128 * 3 * 2048 * 768 * 2
    assert total(Tiers(0, 128, 3)) - total(Tiers(0, 128, 2)) == layer
    eight = total(Tiers(0, 128, 3), bits=8) - total(Tiers(0, 128, 2), bits=8)
    assert eight == layer // 2, "layers that are streamed in 8 bits stay so on the GPU"
    assert total(Tiers()) < plain


def test_what_fits() -> None:
    budget = qwen(48, 8192, lora_on_gpu=False)
    whole = [most_resident_layers(budget, QWEN, 48, 8192, gb * GB) for gb in (8, 12, 24, 40, 80)]
    assert whole == sorted(whole)
    assert (whole[0], whole[-1]) == (0, 48)
    free = budget.free_for_experts(24 * GB, 8192, QWEN)
    assert free == pytest.approx(0.9 * 24 * GB - gpu_memory(budget, QWEN, 48, 8192, STREAMED).total + 3 * 2**28, abs=1)
    some = gpu_memory(budget, QWEN, 48, 8192, STREAMED, 2**27, FRAGMENTS).total  # half of the widest
    chunks = [fitting_chunk(budget, QWEN, 48, 8192, STREAMED, size) for size in (6 * GB, some, 24 * GB)]
    assert (chunks[0], chunks[2]) == (2**24, 2**28)
    fits = [
        gpu_memory(budget, QWEN, 48, 8192, STREAMED, c, FRAGMENTS).total <= some for c in (chunks[1], chunks[1] / 0.8)
    ]
    assert fits == [True, False], "the largest of those that are tried, each 0.8 of the one before"
    assert fitting_chunk(dataclasses.replace(budget, loss="full"), QWEN, 48, 8192, STREAMED, 24 * GB) == 2**28


def test_resident_experts_of_low_bits_are_widened_a_layer_at_a_time() -> None:
    """Not an expert at a time: a layer of 128 would be 128 launches of each of its products."""
    budget = dataclasses.replace(qwen(12, 2048), bits=4.5)
    assert fitting_chunk(budget, QWEN, 12, 2048, Tiers(128), 24 * GB) == 128 * expert_bytes(QWEN)
    assert fitting_chunk(budget, QWEN, 12, 2048, Tiers(4, 8), 24 * GB) == 8 * expert_bytes(QWEN)
    assert fitting_chunk(budget, QWEN, 12, 2048, Tiers(8, 4), 24 * GB) == 8 * expert_bytes(QWEN)


def test_a_model_tells_its_sizes_and_the_run_its_steps() -> None:
    model = MIXTRAL(torch.bfloat16)
    budget = memory_budget(model, model.config, 64)
    assert (budget.loss, budget.checkpointing) == ("full", True), "nobody has said"
    assert budget.inner_bytes == inner_bytes(model.config.hidden_size, linear_widths(model), budget.layers)
    assert len(linear_widths(model)) == 4 * budget.layers, "attention alone: experts do not count"
    run = MemoryBudget(1, loss="chunked", checkpointing=False, other_lora=7)
    with training_as(run):
        told = memory_budget(model, model.config, 64)
    assert told == dataclasses.replace(budget, loss="chunked", checkpointing=False, other_lora=7)
    assert memory_budget(model, model.config, 64) == budget
    assert KTConfig().kt_expert_activations == "auto"
