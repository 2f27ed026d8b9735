"""Times of forward and backward of one layer of experts on this machine, over placements, threads and tokens.

Run as a program, this module measures one placement with one number of threads and prints JSON, because a process can
make the operators' worker threads only once. The program's argument is an `Asked` as JSON.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..backends import CALL_LOCK, ExpertsBackend, ExpertWeights
from ..backends.gpu.pinned_weights import own_pages
from ..backends.packed import PackedExperts, PackedMatrices
from ..config import KTConfig
from ..errors import KTAMXError
from ..placement.assembly import make_packer
from ..placement.calibration import timed_once
from ..placement.memory_model import MemoryBudget
from ..placement.packer import Packer
from ..placement.planner import TierPlan
from ..placement.tiers import Tiers
from ..shapes import ExpertShape
from ..system.child import answer_of
from ..system.threads import torch_threads
from ..train.model_sizes import ModelSizes


@dataclass(frozen=True)
class Asked:
    """What one process measures.

    Attributes:
        sizes: The model's sizes; `auto` plans for all of its layers, one layer is measured.
        rank: LoRA rank.
        backend: The backend of the experts on the CPU: `AMXBF16`, `AMXInt8`, `AMXInt4` or `torch`.
        threads: Number of worker threads, for the backend `torch` of PyTorch's threads.
        tokens: Number of tokens of each batch.
        runs: How often each batch is computed.
        placement: A value of `kt_expert_placement`.
    """

    sizes: ModelSizes
    rank: int
    backend: str
    threads: int
    tokens: Sequence[int]
    runs: int
    placement: str | Mapping[str, int] = "cpu"

    @property
    def shape(self) -> ExpertShape:
        """Sizes of a layer."""
        return ExpertShape(self.sizes.experts, self.sizes.top_k, self.sizes.hidden, self.sizes.intermediate)


@dataclass(frozen=True)
class Row:
    """The times of one batch.

    Attributes:
        backend: The backend of the experts on the CPU.
        threads: Number of its threads.
        tokens: Number of tokens of the batch.
        forward_ms: Milliseconds of a forward, the median over the runs.
        backward_ms: Milliseconds of a backward, likewise.
        resident: Number of the layer's experts in the GPU's memory.
        streamed: Number of its experts that are streamed to the GPU; all others are on the CPU.
        predicted_ms: Milliseconds of forward and backward on the slowest of bus, CPU and GPU that `auto` expected of
            the placement it chose; None if the placement was given.
    """

    backend: str
    threads: int
    tokens: int
    forward_ms: float
    backward_ms: float
    resident: int = 0
    streamed: int = 0
    predicted_ms: float | None = None

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second through one such layer, forward and backward."""
        return self.tokens / (self.forward_ms + self.backward_ms) * 1000

    def where(self, experts: int) -> str:
        """The placement of the layer's `experts`, in words."""
        cpu = experts - self.resident - self.streamed
        if cpu == experts:
            return "CPU"
        tiers = (self.resident, "resident"), (self.streamed, "streamed"), (cpu, "CPU")
        return " + ".join(f"{count} {name}" for count, name in tiers if count)


def measure(asked: Asked) -> list[Row]:
    """Measure in a new process, which makes as many worker threads as are asked for.

    Raises:
        KTAMXError: The process failed; the message is its last line.
    """
    try:
        return [Row(**row) for row in answer_of("kt_hf.tools.bench", json.dumps(asdict(asked)))]
    except KTAMXError as error:
        raise KTAMXError(f"The benchmark {error}") from None


def measure_here(asked: Asked) -> list[Row]:
    """Measure in this process, where the first call of the operators decides the number of worker threads."""
    kernel = asked.backend != "torch"
    rows: list[Row] = []
    layer: ExpertsBackend | None = None
    layer_tiers: Tiers | None = None
    with torch_threads(1 if kernel else asked.threads), CALL_LOCK, torch.no_grad():
        # All are planned before a layer takes memory that the plans go by.
        packers = [_placed(asked, tokens) for tokens in asked.tokens]
        for tokens in asked.tokens:
            packer = packers.pop(0)  # what it streams is released with it
            tiers, planned = packer.tiers, packer.planned
            assert tiers is not None
            if layer is None or tiers != layer_tiers:
                layer = None  # its memory is for the next
                layer, layer_tiers = _layer(asked, packer), tiers
            threads = packer.threads.workers if kernel else asked.threads
            times = _times(layer, tokens, asked.runs)
            expected = _predicted(planned, asked.sizes.expert_layers) if planned else None
            rows.append(Row(asked.backend, threads, tokens, *times, tiers.resident, tiers.streamed, expected))
    return rows


def _predicted(planned: TierPlan, layers: int) -> float:
    """Milliseconds of a layer by itself: there is no attention during which weights are on their way."""
    slowest = max(planned.stream_seconds, planned.cpu_seconds, planned.gpu_seconds)
    return round(slowest / layers * 1000, 2)


def _placed(asked: Asked, tokens: int) -> Packer:
    """A packer that has decided the placement as in a run of `tokens` tokens a step."""
    config = KTConfig(
        kt_backend=asked.backend,
        kt_num_threads=asked.threads if asked.backend != "torch" else None,
        kt_expert_placement=asked.placement,
        kt_share_backward_weights=False,
        kt_max_len=max(asked.tokens),
    )
    layers = dict.fromkeys(range(asked.sizes.expert_layers), asked.shape)
    packer = make_packer(config, {f"layer {i}": shape for i, shape in layers.items()}, torch.bfloat16)
    sizes = asked.sizes
    budget = MemoryBudget(
        tokens, sizes.other_parameters * 2, sizes.layers, sizes.vocabulary, bits=sizes.bits,
        inner_bytes=sizes.inner_bytes, loss="chunked",
    )  # fmt: skip
    packer.place(layers, None, budget)
    return packer


def _layer(asked: Asked, packer: Packer) -> ExpertsBackend:
    """A layer of random weights, of which the GPU's are in 8 bits if the checkpoint's are."""
    shape = asked.shape
    H, I, in_8_bits = shape.hidden_size, shape.intermediate_size, packer.low_bit_experts(shape, 0)  # noqa: E741
    E = shape.num_experts - len(in_8_bits)
    weights = ExpertWeights(_repeated(E, 2 * I, H), _repeated(E, H, I))
    if in_8_bits:
        n = len(in_8_bits)
        weights.low_bit = PackedExperts(
            sorted(in_8_bits), _random_8bit(n, 2 * I, H, parts=2), _random_8bit(n, H, I, parts=1)
        )
    layer = packer.build(weights, shape, asked.rank, "benchmark")
    layer.set_lora(tuple(torch.randn(size).mul_(0.02).to(layer.device) for size in shape.lora_shapes(asked.rank)))
    return layer


def _repeated(count: int, rows: int, columns: int) -> torch.Tensor:
    """[count, rows, columns] bf16: one random matrix `count` times, for to draw each would take longer than to time."""
    return torch.randn(rows, columns).mul_(0.02).bfloat16().expand(count, -1, -1).contiguous()


def _random_8bit(count: int, rows: int, columns: int, parts: int) -> PackedMatrices:
    values = own_pages((count, rows, columns), torch.float8_e4m3fn)
    values.view(torch.uint8).copy_(torch.randn(rows, columns).to(values.dtype).view(torch.uint8))
    scales = torch.full((count, parts, -(-rows // parts // 128), -(-columns // 128)), 0.02)
    return PackedMatrices("e4m3", values, scales, (128, 128))


def _times(layer: ExpertsBackend, tokens: int, runs: int) -> tuple[float, float]:
    """The median milliseconds of a forward and of a backward of tokens that are routed at random."""
    E, K, H = layer.shape.num_experts, layer.shape.top_k, layer.shape.hidden_size
    x, grad = (torch.randn(tokens, H).to(layer.device, layer.dtype) for _ in range(2))
    ids = torch.rand(tokens, E).topk(K).indices.to(layer.device)
    routing = torch.rand(tokens, K).to(layer.device)
    timed_once(layer, x, ids, routing, grad)  # warms up
    forward, backward = zip(*(timed_once(layer, x, ids, routing, grad) for _ in range(runs)), strict=True)
    return round(statistics.median(forward) * 1000, 2), round(statistics.median(backward) * 1000, 2)


def curves(rows: Sequence[Row], experts: int) -> dict[str, list[Row]]:
    """The curves of a plot: label -> its rows, a curve for each placement and number of threads.

    The placements that `auto` chose make one curve, for they go with the number of tokens.

    Args:
        rows: All that was measured.
        experts: Number of a layer's experts.
    """
    by_label: dict[str, list[Row]] = {}
    for row in rows:
        where = row.where(experts) if row.predicted_ms is None else "auto"
        label = f"{row.backend}, {row.threads} thread{'s' if row.threads > 1 else ''}, {where}"
        by_label.setdefault(label, []).append(row)
    return by_label


def plot(rows: Sequence[Row], path: Path, title: str, experts: int) -> Path:
    """Draw the `curves`, tokens per second over tokens, into a PNG file.

    Args:
        rows: All that was measured.
        path: The file; its folder is made if need be.
        title: The title of the plot.
        experts: Number of a layer's experts.

    Returns:
        `path`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for label, curve in curves(rows, experts).items():
        axes.plot([row.tokens for row in curve], [row.tokens_per_second for row in curve], marker="o", label=label)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens in a batch")
    axes.set_ylabel("tokens per second through a layer")
    axes.set_ylim(bottom=0)
    axes.set_title(title)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    print(json.dumps([asdict(row) for row in measure_here(Asked(**given | {"sizes": ModelSizes(**given["sizes"])}))]))
