"""Checkpoints of 4 and 8 bits in every format: to the bit, kept as stored on the GPU, widened elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from kt_hf import KTAMXError, load_kt_model
from kt_hf.backends.packed import PackedMatrices
from kt_hf.checkpoint import ExpertCheckpoint
from kt_hf.checkpoint.complete import check_complete
from kt_hf.checkpoint.dense_rest import DenseRest
from kt_hf.checkpoint.nf4 import STATE
from kt_hf.checkpoint.quantization import known_quantization
from tests.support.cases import make_config
from tests.support.checkpoints import edit, tensors, write
from tests.support.low_bit_files import FAMILY, WAYS, Way, fp8_of_deepseek_v4, stored
from tests.support.patched import fill_lora, gradients_of, logits_of, lora_config, loss_of

E = FAMILY.num_experts
LAYER = "model.layers.2.mlp.experts"
TIERS = {"streamed": {"resident": 0, "streamed": E}, "resident": {"resident": E, "streamed": 0}, "cpu": None}
each_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def quick(*names: str) -> pytest.MarkDecorator:
    """Each way, all but these slow."""
    ways = [pytest.param(w, id=n, marks=() if n in names else pytest.mark.slow) for n, w in WAYS.items()]
    return pytest.mark.parametrize("way", ways)


# With the tiers in which they are tried quickly.
_QUICK = {("int4 group 32", "streamed"), ("mxfp4 gpt-oss", "streamed"), ("gptq v1", "resident"), ("nf4 nested", "cpu")}
in_all_tiers = pytest.mark.parametrize(
    ("way", "tiers"),
    [
        pytest.param(way, tiers, id=f"{name}, {tier}", marks=() if (name, tier) in _QUICK else pytest.mark.slow)
        for name, way in WAYS.items()
        for tier, tiers in TIERS.items()
    ],
)


def loaded(folder: Path, tiers: dict[str, int] | None = None) -> Any:
    more = {} if tiers is None else {"kt_expert_placement": tiers}
    return load_kt_model(folder, make_config("torch", kt_lora_rank=8, **more), dtype=torch.bfloat16)


def results(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits with an adapter, and all its gradients."""
    model = get_peft_model(model, lora_config(FAMILY))
    fill_lora(model, 3)
    return logits_of(model, FAMILY.inputs()), gradients_of(model, loss_of(model, FAMILY.inputs()))


def same(one: Any, other: Any) -> None:
    (logits, grads), (expected, expected_grads) = results(one), results(other)
    assert torch.equal(logits, expected)
    assert grads.keys() == expected_grads.keys()
    assert all(torch.equal(grad, expected_grads[name]) for name, grad in grads.items())
    assert all(grad.any() for grad in grads.values())


@each_way
def test_weights_to_the_bit(way: Way, tmp_path: Path) -> None:
    """Of each expert, widened as it is read, and kept as it is stored and widened after.

    The bits of a weight that the headers tell, and nearly those that the configuration alone tells, are those kept.
    """
    low, plain = stored(way, tmp_path)
    config = AutoConfig.from_pretrained(low)
    content, checkpoint, known = tensors(plain), ExpertCheckpoint(low, config), known_quantization(config)
    checkpoint.check_values()
    assert known
    for layer in checkpoint.layers:
        wide, kept = checkpoint.read(layer, torch.bfloat16), checkpoint.read(layer, torch.bfloat16, range(E))
        some = checkpoint.read(layer, torch.bfloat16, [1, 5]).low_bit
        assert kept.low_bit
        assert some
        assert len(kept.gate_up) == 0
        for weights in (kept.low_bit.gate_up.dequantized(torch.bfloat16), wide.gate_up):
            for e in range(E):
                gate, up = weights[e].chunk(2)
                assert torch.equal(gate, content[f"{layer}.{e}.gate_proj.weight"])
                assert torch.equal(up, content[f"{layer}.{e}.up_proj.weight"])
        for weights in (kept.low_bit.down.dequantized(torch.bfloat16), wide.down):
            assert all(torch.equal(weights[e], content[f"{layer}.{e}.down_proj.weight"]) for e in range(E))
        assert torch.equal(some.down.dequantized(torch.bfloat16), wide.down[[1, 5]])
        assert checkpoint.bits() == pytest.approx(kept.low_bit.bits)
        assert known.bits == pytest.approx(kept.low_bit.bits, rel=0.04)


@pytest.mark.usefixtures("cpu_for_gpu")
@in_all_tiers
def test_model_is_that_of_the_widened_weights(way: Way, tiers: dict[str, int] | None, tmp_path: Path) -> None:
    """Logits and every gradient; the dense rest is widened, and the config is a plain model's."""
    low, plain = stored(way, tmp_path)
    model, expected = loaded(low, tiers), loaded(plain, tiers)
    assert getattr(model.config, "quantization_config", None) is None
    parameters = dict(expected.named_parameters())
    assert all(torch.equal(parameter, parameters[name]) for name, parameter in model.named_parameters())
    same(model, expected)


@pytest.mark.usefixtures("cpu_for_gpu")
@pytest.mark.parametrize("tiers", ["streamed", "resident"])
@quick("int4 group 32", "fp8 a matrix")
def test_kept_packed_without_a_detour(way: Way, tiers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No expert is widened while the model is loaded, and no stack of wide ones has any rows."""
    low, _ = stored(way, tmp_path, keep=lambda name: ".experts." not in name)
    read, widened, rows = ExpertCheckpoint.read, [], []

    def watched(*args: Any) -> Any:
        weights = read(*args)
        rows.append(len(weights.gate_up) + len(weights.down))
        return weights

    monkeypatch.setattr(ExpertCheckpoint, "read", watched)
    monkeypatch.setattr(PackedMatrices, "dequantized", lambda *_: widened.append(1))
    loaded(low, TIERS[tiers])
    assert rows == [0, 0]
    assert not widened


@pytest.mark.usefixtures("cpu_for_gpu")
def test_attention_of_deepseek_v4(tmp_path: Path) -> None:
    """FP8 with scales of powers of two, beside experts of MXFP4."""
    low, plain = stored(WAYS["mxfp4 deepseek"], tmp_path)
    exact = {}

    def change(content: dict[str, Tensor]) -> None:
        for name in [name for name in content if "self_attn" in name and name.endswith("_proj.weight")]:
            parts, exact[name] = fp8_of_deepseek_v4(content.pop(name))
            content |= {name.removesuffix("weight") + part: value for part, value in parts.items()}

    edit(low, change)
    edit(plain, lambda content: content.update(exact))
    same(loaded(low, TIERS["streamed"]), loaded(plain, TIERS["streamed"]))


@pytest.mark.usefixtures("cpu_for_gpu")
@quick("int4 zero-points")
def test_experts_in_bf16_among_the_others(way: Way, tmp_path: Path) -> None:
    """A layer that the quantization left out, and an expert of another layer."""
    if way.fused:
        pytest.skip("a stack is of one kind")
    low, plain = stored(way, tmp_path, keep=lambda name: "layers.0." in name or ".experts.3." in name)
    model = loaded(low, TIERS["streamed"])
    same(model, loaded(plain, TIERS["streamed"]))
    known = known_quantization(AutoConfig.from_pretrained(low))
    assert known
    bits = ExpertCheckpoint(low, AutoConfig.from_pretrained(low)).bits()
    assert bits == pytest.approx(16 / 2 + (16 + 7 * known.bits) / 16, rel=0.02)


@quick("int4 zero-points", "nf4")
def test_it_is_complete(way: Way, tmp_path: Path) -> None:
    """A dry run has nothing to say of the parts; of a weight that is missing it has."""
    low, _ = stored(way, tmp_path)
    assert check_complete(low, AutoConfig.from_pretrained(low)) == []
    edit(low, lambda content: (content.pop("model.layers.1.input_layernorm.weight"), None)[1])
    with pytest.raises(KTAMXError, match="input_layernorm"):
        check_complete(low, AutoConfig.from_pretrained(low))


def parts_of(content: dict[str, Tensor], way: Way) -> list[str]:
    """The tensors of one projection of an expert."""
    heads = (f"{LAYER}.down_proj_",) if way.fused else (f"{LAYER}.3.up_proj.",)
    return [name for name in content if name.startswith(heads)]


# Parts that may be missing, and those whose values must be finite.
SPARE = ("weight_shape", "g_idx", "input_scale", "input_global_scale")
SCALES = ("scale", "scales", "weight_scale", "weight_scale_2", "weight_global_scale", "weight.absmax",
          "weight.nested_absmax")  # fmt: skip


def not_a_number(values: Tensor) -> Tensor:
    if values.dtype in (torch.uint8, torch.float8_e8m0fnu):
        values.view(torch.uint8).view(-1)[-1] = 255
        return values
    return values.float().flatten().index_fill(0, torch.tensor([0]), torch.nan).view(values.shape).to(values.dtype)


BROKEN: dict[str, Callable[[dict[str, Tensor], str], object]] = {
    "missing": lambda content, name: content.pop(name),
    "a row less": lambda content, name: content.update({name: content[name][:-1].contiguous()}),
    "another dtype": lambda content, name: content.update({name: content[name].float().double()}),
    "not a number": lambda content, name: content.update({name: not_a_number(content[name])}),
}


def breakable(name: str, values: Tensor, how: str) -> bool:
    part = name.removeprefix(f"{LAYER}.3.up_proj.").removeprefix(f"{LAYER}.down_proj_")
    if how == "not a number":
        return part in SCALES and not (part == "weight.absmax" and values.dtype == torch.uint8)
    return part not in SPARE and (how != "a row less" or (values.dim() > 0 and "quant_state" not in part))


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What has been loaded."""
    steps: list[str] = []
    monkeypatch.setattr(DenseRest, "load", lambda *_: steps.append("rest"))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: steps.append("rest"))
    monkeypatch.setattr(ExpertCheckpoint, "read", lambda *_: steps.append("experts"))
    return steps


@pytest.mark.parametrize(
    "how", [pytest.param(how, marks=() if how == "missing" else pytest.mark.slow) for how in BROKEN]
)
@each_way
def test_broken_twins_are_refused_before_loading(way: Way, how: str, loads: list[str], tmp_path: Path) -> None:
    """Every part of a weight, broken in turn; the message names the file and the expert's projection."""
    low, _ = stored(way, tmp_path, keep=lambda name: ".experts." not in name)
    whole = tensors(low)
    names = [name for name in parts_of(whole, way) if breakable(name, whole[name], how)]
    for name in names:
        content = {key: value.clone() for key, value in whole.items()}
        BROKEN[how](content, name)
        write(low, content)
        with pytest.raises(KTAMXError, match=r"model\.safetensors") as refused:
            loaded(low)
        assert (f"{LAYER}.down_proj" if way.fused else f"{LAYER}.3.") in str(refused.value)
    assert names
    assert not loads


UP = f"{LAYER}.3.up_proj."
ODD: dict[str, tuple[str, Callable[[dict[str, Tensor]], object], str]] = {
    "act-order": ("gptq v2", lambda c: c[UP + "g_idx"].copy_(c[UP + "g_idx"].flip(0)), "g_idx.* act-order"),
    "act-order of compressed-tensors": (
        "int4 group 32",
        lambda c: c.update({UP + "weight_g_idx": torch.zeros(128).int()}),
        "weight_g_idx.* act-order",
    ),
    "zero-points of symmetric weights": (
        "int4 group 32",
        lambda c: c.update({UP + "weight_zero_point": torch.zeros(16, 4).int()}),
        "symmetric",
    ),
    "groups of another size": (
        "int4 group 32",
        lambda c: c.update({UP + "weight_scale": torch.ones(128, 2).bfloat16()}),
        "2 scales for 128",
    ),
    "another shape": ("int4 rows", lambda c: c[UP + "weight_shape"].fill_(7), r"weight_shape .* is \[7, 7\]"),
    "a factor of 0": (
        "nvfp4 compressed",
        lambda c: c[UP + "weight_global_scale"].zero_(),
        "weight_global_scale .* is 0",
    ),
    "another table": ("nf4", lambda c: c[UP + "weight.quant_map"].mul_(2), "quant_map .* other values"),
    "bitsandbytes' FP4": (
        "nf4",
        lambda c: c.update({UP + "weight.quant_state.bitsandbytes__fp4": c.pop(UP + STATE)}),
        "not fp4",
    ),
    "a state that is no JSON": ("nf4", lambda c: c[UP + STATE].fill_(0), "is no JSON"),
    "a bias": ("awq", lambda c: c.update({UP + "bias": torch.zeros(128)}), "up_proj.bias: biases of experts"),
    "the rest's scales": (
        "int4 group 32",
        lambda c: c.pop("model.layers.1.self_attn.q_proj.weight_scale"),
        "q_proj.weight_scale is missing",
    ),
    "the rest's values": (
        "gptq v1",
        lambda c: c["model.layers.1.self_attn.q_proj.scales"].fill_(torch.inf),
        "q_proj.scales .* finite",
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_what_cannot_be_computed_is_refused_before_loading(name: str, loads: list[str], tmp_path: Path) -> None:
    way, change, words = ODD[name]
    low, _ = stored(WAYS[way], tmp_path)
    edit(low, lambda content: (change(content), None)[1])
    with pytest.raises(KTAMXError, match=words):
        loaded(low)
    assert not loads
