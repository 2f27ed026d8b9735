"""Gates, layouts and calls of other families, and experts of low bits, on ranks: as in one process."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig

from kt_hf import KTAMXConfigError, apply_kt_moe, kt_lora_config, load_kt_model
from kt_hf.backends import ExpertWeights
from kt_hf.backends.quantizer import quantized_experts
from kt_hf.checkpoint import ExpertCheckpoint, expert_reader, tensor_files
from kt_hf.checkpoint.fingerprint import combined, fingerprint, fingerprints_of_weights
from kt_hf.checkpoint.tensor_files import read_tensors
from kt_hf.experts import kt_layers
from kt_hf.patch import owned_shape
from kt_hf.ranks import Ranks, current_world
from tests.support.cases import TORCH_FP32, make_config
from tests.support.checkpoints import saved
from tests.support.families import VOCAB, tiny
from tests.support.helpers import MIXTRAL
from tests.support.low_bit_files import WAYS, stored
from tests.support.patched import adapted_model, lora_config, trainable
from tests.support.ranks import fill_whole, joined, on_ranks, relative, results

# By what they do otherwise than a stacked SiLU: biases, ids of no expert, a norm, batches, slices, no gate.
CALLS = ("gpt_oss", "longcat_flash", "muse_spark", "dbrx", "llama4", "nemotron_h")


def computed(model: Any, rank: int, ids: Tensor, ddp: bool) -> dict[str, Any]:
    """Logits of a rank's row, and the gradients of their weighted sum."""
    fill_whole(model, 1)
    model.train()
    caller = DistributedDataParallel(model, find_unused_parameters=True) if ddp else model
    logits = caller(input_ids=ids[rank : rank + 1]).logits
    torch.autograd.backward(logits.float().square().mean())
    gradients = {n: p.grad for n, p in trainable(model).items() if p.grad is not None}
    base = {layer.label: layer.base_fingerprint for layer in kt_layers(model)}
    return {"logits": logits.detach(), "gradients": gradients, "base": base}


def check(make: Any, ids: Tensor, tolerance: float) -> None:
    one = [computed(make(), rank, ids, ddp=False) for rank in range(2)]
    two = results(on_ranks(2, lambda rank: computed(make(), rank, ids, ddp=True)))
    for rank in range(2):
        assert relative(two[rank]["logits"], one[rank]["logits"]) <= tolerance
        assert two[rank]["base"].keys() == one[0]["base"].keys()
        assert all(torch.equal(value, one[0]["base"][label]) for label, value in two[rank]["base"].items())
    gradients = joined([rank["gradients"] for rank in two])
    for name, value in gradients.items():
        whole = sum(part["gradients"].get(name, torch.zeros_like(value)) for part in one) / 2
        assert relative(value, whole) <= tolerance or float(whole.norm()) < 1e-7, name


@pytest.mark.parametrize("family", [n if n == "gpt_oss" else pytest.param(n, marks=pytest.mark.slow) for n in CALLS])
def test_layouts_and_calls(family: str) -> None:
    ids = torch.randint(VOCAB, (2, 12), generator=torch.Generator().manual_seed(5))

    def make() -> Any:
        torch.manual_seed(0)
        model = apply_kt_moe(tiny(family), make_config("torch"))
        return get_peft_model(model, kt_lora_config(model, lora_rank=2, lora_alpha=4))

    check(make, ids, 2e-5)


@pytest.mark.parametrize("to", ["int8", pytest.param("fp8", marks=pytest.mark.slow)])
def test_experts_are_quantized_by_rank(to: str) -> None:
    """Each rank its own; the fingerprint is that of the whole layer all the same."""
    check(lambda: adapted_model(MIXTRAL, TORCH_FP32, kt_expert_dtype=to), MIXTRAL.inputs(2), 2e-6)


@pytest.mark.parametrize("way", ["int4 group 32", *(pytest.param(w, marks=pytest.mark.slow) for w in ("gptq v1",))])
def test_a_checkpoint_of_low_bits(way: str, tmp_path: Path) -> None:
    folder, _ = stored(WAYS[way], tmp_path)

    def make() -> Any:
        model = load_kt_model(folder, make_config("torch", kt_lora_rank=8), dtype=torch.float32)
        return get_peft_model(model, lora_config(MIXTRAL))

    check(make, MIXTRAL.inputs(2), 2e-6)


@pytest.mark.parametrize("to", ["int4", "int8", "fp8"])
def test_the_fingerprint_is_that_of_the_quantized_layer(to: str) -> None:
    rng = torch.Generator().manual_seed(0)
    sizes = (8, 192, 160), (8, 160, 96)
    weights = ExpertWeights(*(torch.randn(size, generator=rng).bfloat16() for size in sizes))
    mark = fingerprint(weights, to).numpy().tobytes().hex()
    assert mark != fingerprint(weights).numpy().tobytes().hex()
    assert mark == combined(fingerprints_of_weights(quantized_experts(weights, to)))


def test_a_part_of_packed_experts() -> None:
    rng = torch.Generator().manual_seed(0)
    wide = ExpertWeights(
        *(torch.randn(8, 64, 32, generator=rng) for _ in range(2)),
        gate_up_bias=torch.randn(8, 64, generator=rng),
        down_bias=torch.randn(8, 32, generator=rng),
    )
    bias, gate_up = wide.down_bias, wide.gate_up
    packed = quantized_experts(wide, "int8")
    part = packed.part(slice(4, 8))
    assert part.num_experts == 4
    assert part.low_bit is not None
    assert list(part.low_bit.experts) == [0, 1, 2, 3]
    assert packed.low_bit is not None
    assert torch.equal(part.low_bit.gate_up.codes, packed.low_bit.gate_up.codes[4:])
    assert part.gate_up_bias is not None
    assert torch.equal(part.gate_up_bias, packed.gate_up_bias[4:])  # type: ignore[index]
    assert part.down_bias is bias  # of all: each token's own rank adds its biases
    assert part.wide(range(part.num_experts), torch.device("cpu"), torch.float32).gate_up.shape == gate_up[4:].shape


def test_lists_of_experts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    site: Any = SimpleNamespace(name="layer", form=SimpleNamespace(call="listed"), shape=None)
    with pytest.raises(KTAMXConfigError, match=r"layer: a list of experts.*WORLD_SIZE=2"):
        owned_shape(site, Ranks(current_world()))


class Reads:
    """Names of the tensors that are read from checkpoints, and how many bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bytes: dict[str, int] = {}
        for module in (expert_reader, tensor_files):
            monkeypatch.setattr(module, "read_tensors", lambda jobs: self._read(jobs))
        self._original = read_tensors

    def _read(self, jobs: Any) -> None:
        for tensor, _ in jobs:
            self.bytes[tensor.name] = self.bytes.get(tensor.name, 0) + tensor.size
        self._original(jobs)


@pytest.mark.parametrize("way", [None, "int4 group 32"])
def test_a_rank_reads_the_experts_that_it_owns(
    way: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the others no more than the fingerprint is of: 32 rows of a layer, or their matrices in low bits."""
    folder = saved(MIXTRAL, tmp_path) if way is None else stored(WAYS[way], tmp_path)[0]
    config = AutoConfig.from_pretrained(folder)
    whole = ExpertCheckpoint(folder, config)
    layer, kept = whole.layers[-1], range(8) if way else ()
    everything = whole.read(layer, torch.float32, kept)
    reads = Reads(monkeypatch)
    part = ExpertCheckpoint(folder, config).read(layer, torch.float32, [e for e in kept if e >= 4], slice(4, 8))
    assert sum(reads.bytes.values()) <= whole.source_bytes(layer) // 2
    expected = everything.part(slice(4, 8))
    ours, theirs = (some.wide(range(4), torch.device("cpu"), torch.float32) for some in (part, expected))
    assert torch.equal(ours.gate_up, theirs.gate_up)
    assert torch.equal(ours.down, theirs.down)
    for to in ("bf16",) if way else ("bf16", "int8"):  # what is of low bits is not quantized again
        reads.bytes.clear()
        assert torch.equal(whole.fingerprint(layer, torch.float32, to), fingerprint(everything, to))
        assert way or sum(reads.bytes.values()) <= 64 * 4 * 96
