"""Parts `low-bit`, `widening` and `drawn`: experts of four bits beside bf16 and stock, the kernels, and whole models.

`low-bit` trains the same layers, quantized while they are loaded, streamed and resident, in turn with bf16 and stock,
and with experts that do nothing: what is left of a step then is attention, loss and Trainer.
`widening` times each kernel alone, and as a share of what a copy within the card's memory reaches.
`drawn` trains a whole model whose codes are drawn on the GPU and left there (`--where resident`) or copied into host
memory that is page-locked already (`--where streamed`): there is no checkpoint, so that models larger than the disk can
be tried. With `--rest 4` its linear layers outside the experts are bitsandbytes'.
"""

from __future__ import annotations

import argparse
import statistics
import time
import unittest.mock
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from card import GB, Card, Rows
from checkpoints import make_checkpoint
from full import FAMILY, stock_model
from models import experts_of, make_config, make_model
from peft import get_peft_model
from routing import Spread
from sft import Tokens, lora, summary, trainer_for
from torch import nn
from transformers import TrainerCallback

from kt_hf import KTConfig, load_kt_model
from kt_hf.backends import ExpertWeights
from kt_hf.backends.gpu.pinned_weights import own_pages
from kt_hf.backends.gpu.streamed import StreamedBackend
from kt_hf.backends.packed import PackedExperts, PackedMatrices
from kt_hf.backends.quantizer import EXPERT_BITS
from kt_hf.bitsandbytes_rest import check_installed
from kt_hf.discovery import ExpertsSite, by_layer, find_experts
from kt_hf.experts.layer import KTExperts
from kt_hf.lora import linear_targets
from kt_hf.patch import owned_weights, replace_experts
from kt_hf.placement.assembly import make_packer, memory_budget

WARM, STEPS = 2, 4  # steps that are not timed, and those that are
INT4_SCALE = 0.0043  # uniform codes times it deviate by 0.02
AT_ONCE = 2**28  # codes drawn at a time


# ---- low-bit: 12 layers beside stock


def run(given: argparse.Namespace, card: Card, rows: Rows) -> None:
    config = make_config(FAMILY, given.shape, given.layers)
    folder = given.checkpoint / f"{FAMILY}-{given.shape}-{given.layers}"
    make_checkpoint(config, folder, card.device)
    batches, stock = given.batch or [1, 4], dict[int, float]()
    card.limit(card.total_gb)
    model, adapt = stock_model(given, card, given.layers), True
    for batch in batches:
        found, model = timed(card, model, batch, given, patched=False, adapt=adapt)
        stock[batch], adapt = found["step"], False
        rows.add(case="stock", layers=given.layers, batch=batch, **found)
    del model
    for dtype in given.dtypes:
        for where in ("streamed", "resident"):
            card.clear()
            card.limit((given.caps or [24.0])[0])
            try:
                _low_bit_case(given, card, rows, folder, dtype, where, batches, stock)
            except RuntimeError as error:  # no room for it, for one
                rows.add(case=where, dtype=dtype, cap_gb=card.cap, error=_first_line(error))


def _low_bit_case(
    given: argparse.Namespace, card: Card, rows: Rows, folder: Path, dtype: str, where: str, batches: list[int],
    stock: dict[int, float],
) -> None:  # fmt: skip
    E = experts_of(make_config(FAMILY, given.shape, given.layers))
    placement = {"streamed": E} if where == "streamed" else {"resident_layers": given.layers}
    settings = KTConfig(kt_lora_rank=16, kt_expert_placement=placement, kt_expert_dtype=dtype, kt_moe_lora_device="gpu")
    begin, before = time.perf_counter(), card.host_peak_gb()
    model = load_kt_model(folder, settings, tokens_per_step=max(batches) * given.sequence)
    loading = {"loading": time.perf_counter() - begin, "host_peak_gb": card.host_peak_gb() - before}
    spread, adapt = Spread(model), True
    model.config.use_cache = False
    row = {"case": where, "dtype": dtype, "layers": given.layers, "cap_gb": card.cap, "host_gb": host_gb(model)}
    for batch in batches:
        found, model = timed(card, model, batch, given, adapt=adapt)
        adapt = False
        ratio = found["step"] / stock[batch]
        rows.add(**row, batch=batch, **found, **loading, of_stock=ratio, touched=spread.describe())
    if where == "resident":  # what no experts could be faster than
        with unittest.mock.patch.object(KTExperts, "forward", lambda _, x, *__: x):
            for batch in batches:
                found, model = timed(card, model, batch, given, adapt=False)
                rows.add(case="experts that do nothing", layers=given.layers, batch=batch, **found)


def timed(
    card: Card, model: Any, batch: int, given: argparse.Namespace, warm: int = WARM, steps: int = STEPS, **how: Any
) -> tuple[dict[str, Any], Any]:
    """The summary of timed steps, and the model with its adapter."""
    card.reset()
    tokens = Tokens(model.config.vocab_size, given.sequence)
    trainer = trainer_for(card, model, batch, tokens, warm + steps, max_length=given.sequence, **how)
    trainer.train()
    return summary(trainer.timer.steps[warm:], batch * given.sequence), trainer.model


def host_gb(model: Any) -> float:
    """Of experts' weights in host memory."""
    backends = [layer.backend for layer in model._kt_wrappers]
    streamed = [b.weights for b in backends if isinstance(b, StreamedBackend) and b.name == "streamed"]
    return sum(weights.nbytes for weights in streamed) / GB


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


# ---- widening: the kernels alone


def run_widening(given: argparse.Namespace, card: Card, rows: Rows) -> None:
    from kt_hf.backends.gpu import widen_kernels

    # Gate and up of a chunk of 1.3 GB in bf16, which is a layer of Qwen3-30B.
    n, height, width = (2, 64, 64) if card.tiny else (271, 1536, 2048)
    copied = torch.empty(1000 if card.tiny else 500_000_000, dtype=torch.bfloat16, device=card.device)
    target = torch.empty_like(copied)
    copy = 2 * copied.nbytes / _seconds(card, lambda: target.copy_(copied))
    rows.add(case="copy", gb_per_s=copy / GB)
    for kind in KINDS:
        matrices = matrices_of(kind, n, height, width, 2, card.device)
        if card.tiny:
            weights, seconds = matrices.dequantized(torch.bfloat16), 1.0
        else:
            weights = widen_kernels.widened(matrices)
            seconds = _seconds(card, lambda one=matrices: widen_kernels.widened(one))
            some = matrices.with_tensors([tensor[-8:] for tensor in matrices.tensors])
            assert torch.equal(weights[-8:].cpu().nan_to_num(), _cpu(some).nan_to_num()), kind
        moved = (matrices.nbytes + weights.nbytes) / seconds
        rows.add(case="widening", kind=kind, bits=matrices.bits, weights_per_s=weights.numel() / seconds,
                 gb_per_s=moved / GB, of_copy=moved / copy)  # fmt: skip


def _cpu(matrices: PackedMatrices) -> torch.Tensor:
    return matrices.to(torch.device("cpu")).dequantized(torch.bfloat16)


def _seconds(card: Card, call: Callable[[], Any], times: int = 20) -> float:
    """The median of a call in some rows of five; on a GPU, where the launch of one hides behind another, by events."""
    found, row = [], 5
    for _ in range(3 if card.tiny else times + 3):
        if card.tiny:
            begin = time.perf_counter()
            call()
            found.append(time.perf_counter() - begin)
            continue
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(row):
            call()
        last.record()
        torch.cuda.synchronize()
        found.append(first.elapsed_time(last) / 1e3 / row)
    return statistics.median(found[-times:])


KINDS = ("int4", "int4 zeros", "mxfp4", "nvfp4", "nf4", "fp8", "int8")


def matrices_of(kind: str, n: int, rows: int, columns: int, parts: int, device: torch.device) -> PackedMatrices:
    """n matrices of any codes, as checkpoints of that kind have them; of gate and up `parts` is 2."""

    def scales(group: int) -> torch.Tensor:
        return torch.rand(n, rows, columns // group, device=device) * 0.01 + 0.001

    if kind in ("fp8", "int8"):
        blocks = torch.rand(n, parts, -(-rows // parts // 128), -(-columns // 128), device=device) * 0.01
        codes = torch.randn(n, rows, columns, device=device)
        if kind == "fp8":
            return PackedMatrices("e4m3", codes.to(torch.float8_e4m3fn), blocks, (128, 128))
        return PackedMatrices("int8", (codes * 30).to(torch.int8), blocks, (128, 128))
    codes = torch.randint(0, 256, (n, rows, columns // 2), dtype=torch.uint8, device=device)
    small = torch.randint(0, 16, (n, rows, columns // 32), dtype=torch.uint8, device=device)
    if kind == "mxfp4":
        return PackedMatrices("e2m1", codes, small + 112)
    if kind == "nvfp4":
        factor = torch.rand(n, parts, device=device)
        return PackedMatrices("e2m1", codes, (scales(16) * 1e3).to(torch.float8_e4m3fn), factor=factor)
    if kind == "nf4":
        return PackedMatrices("nf4", codes, scales(min(64, columns)))
    if kind == "int4 zeros":
        return PackedMatrices("int4", codes, scales(32).half(), zeros=small)
    return PackedMatrices("int4", codes, scales(32).bfloat16())


# ---- drawn: whole models without a checkpoint


def run_drawn(given: argparse.Namespace, card: Card, rows: Rows) -> None:
    family = given.family[0] if given.family else FAMILY
    config = make_config(family, given.shape, given.layers)
    cells = [Cell.of(text) for text in given.cells or []]
    cells = cells or [Cell((given.caps or [24.0])[0], batch, given.offload) for batch in given.batch or [1]]
    card.limit(cells[0].cap)
    begin = time.perf_counter()
    model = drawn_model(config, card, _settings(given, config), cells[0].batch * given.sequence, given.rest)
    row = {"case": given.where, "family": family, "layers": given.layers, "rank": given.rank,
           "host_gb": host_gb(model), "drawing": time.perf_counter() - begin, "rest_bits": given.rest}  # fmt: skip
    spread, adapt = Spread(model), given.rest == 16
    steps = given.steps or WARM + STEPS
    warm = min(WARM, steps // 2)
    if given.rest == 4:
        model.is_loaded_in_4bit = True  # PEFT asks for it; TRL, which would round LoRA to bf16, comes later
        adapted = get_peft_model(model, lora(model, True, given.rank))
        del model.is_loaded_in_4bit
        model = adapted
    for cell in cells:
        card.limit(cell.cap)
        row |= {"cap_gb": cell.cap, "batch": cell.batch, "offload": cell.offload}
        optimizer = OptimizerTimer(card)
        how = {"activation_offloading": True} if cell.offload else {}
        try:
            found, model = timed(
                card, model, cell.batch, given, adapt=adapt, rank=given.rank, callbacks=[optimizer], warm=warm,
                steps=steps - warm, **how,
            )  # fmt: skip
        except RuntimeError as error:
            rows.add(**row, error=_first_line(error), peak=card.peak()["allocated_gb"])
            continue
        adapt = False
        seconds = statistics.median(optimizer.seconds[warm:])
        rows.add(**row, **found, optimizer=seconds, host_peak_gb=card.host_peak_gb(), touched=spread.describe())


@dataclass(frozen=True)
class Cell:
    """GB that PyTorch may have, rows of a batch, and whether activations are offloaded."""

    cap: float
    batch: int
    offload: bool

    @classmethod
    def of(cls, text: str) -> Cell:
        cap, batch, *offload = text.split("/")
        return cls(float(cap), int(batch), offload == ["offload"])


class OptimizerTimer(TrainerCallback):
    """Seconds of each step of the optimizer, and of what comes with it: expert LoRA that the GPU gets anew."""

    def __init__(self, card: Card) -> None:
        self._card, self.seconds = card, list[float]()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._card.synchronize()
        self._begin = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:  # after kt_hf's own
        self._card.synchronize()
        self.seconds.append(time.perf_counter() - self._begin)
        print(f"step {len(self.seconds)} has ended, the optimizer's {self.seconds[-1]:.2f} s", flush=True)


def _settings(given: argparse.Namespace, config: Any) -> KTConfig:
    streamed = {"streamed": experts_of(config)}
    placement = streamed if given.where == "streamed" else {"resident_layers": config.num_hidden_layers}
    return KTConfig(kt_lora_rank=given.rank, kt_expert_placement=placement, kt_moe_lora_device=given.lora)


@torch.no_grad()
def drawn_model(
    config: Any, card: Card, settings: KTConfig, tokens: int, rest_bits: int = 16, kind: str = "int4",
    bits: float = EXPERT_BITS["int4"],
) -> Any:  # fmt: skip
    """A patched model with experts of low bits, drawn on the card; attention and the rest are bf16, or in 4 bits.

    Args:
        config: The model's.
        card: That draws.
        settings: Of kt_hf; experts streamed or resident.
        tokens: Of a step.
        rest_bits: Of linear layers, 4 or 16.
        kind: Of `KINDS`. Of "int4" streamed codes are drawn into host memory that is page-locked already.
        bits: Of a weight of experts, with its part of the scales.
    """
    model = make_model(config, card.device, stock=False, experts=False)
    if rest_bits == 4:
        _in_4_bits(model, card.device)
    sites = find_experts(model, weightless=True)
    shapes = {site.name: site.shape for site in sites}
    packer = make_packer(settings, shapes, torch.bfloat16, streamed=True, model_type=config.model_type)
    budget = replace(memory_budget(model, config, tokens, torch.bfloat16), bits=bits, loss="chunked")
    packer.place(by_layer(shapes), None, budget)
    packer.stored_as = kind
    assert packer.tiers is not None
    resident = packer.tiers.resident_layers > 0

    def weights_of(site: ExpertsSite) -> ExpertWeights:
        shape = site.shape
        E, H, I = shape.num_experts, shape.hidden_size, shape.intermediate_size  # noqa: E741
        sizes = ((2 * I, H), (H, I))
        if kind == "int4":
            parts = [_drawn(E, *size, card.device, resident) for size in sizes]
        else:
            parts = [matrices_of(kind, E, *size, 2 - i, card.device) for i, size in enumerate(sizes)]
            parts = parts if resident else [part.to(torch.device("cpu")) for part in parts]
        gate_up, down = (torch.empty((0, *size), dtype=torch.bfloat16) for size in sizes)
        return ExpertWeights(gate_up, down, low_bit=PackedExperts(list(range(E)), *parts))

    model.requires_grad_(False)
    replace_experts(model, sites, packer, lambda site: owned_weights(site, packer, weights_of(site)))
    for layer in model._kt_wrappers if kind == "int4" and not resident else ():
        for tensor in layer.backend.weights.tensors:
            for part in tensor.split(max(1, AT_ONCE // tensor[0].numel())):
                part.copy_(_values(part.shape, part.dtype, card.device))
    return model


def _in_4_bits(model: nn.Module, device: torch.device) -> None:
    """bitsandbytes' NF4 in the place of linear layers; routers and head stay."""
    check_installed()
    import bitsandbytes

    how = {"compress_statistics": True, "quant_type": "nf4"}
    for name in linear_targets(model):
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        low = bitsandbytes.nn.Linear4bit(
            linear.in_features, linear.out_features, False, torch.bfloat16, device=torch.device("meta"), **how
        )
        low.weight = bitsandbytes.nn.Params4bit(linear.weight.data.cpu(), requires_grad=False, **how).to(device)
        low.bias = linear.bias
        model.set_submodule(name, low)


def _drawn(n: int, rows: int, columns: int, device: torch.device, resident: bool) -> PackedMatrices:
    """On the GPU; or host memory, which is filled when it has been page-locked."""
    sizes = ((n, rows, columns // 2), torch.uint8), ((n, rows, columns // 32), torch.bfloat16)
    return PackedMatrices("int4", *(_values(*size, device) if resident else own_pages(*size) for size in sizes))


def _values(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Codes, or scales."""
    if dtype == torch.uint8:
        return torch.randint(0, 256, size, dtype=dtype, device=device)
    return torch.rand(size, device=device).mul_(INT4_SCALE).add_(INT4_SCALE / 2).to(dtype)
