"""Each gate and layout beside the model's own module: forward, and the gradient of everything that has one.

The reference is stock's code in fp32 with W + B A put into its parameters, differentiated by autograd.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.func import functional_call

from kt_hf import KTConfig, apply_kt_moe, kt_lora_config
from kt_hf.discovery import find_experts
from kt_hf.experts import KTExperts
from kt_hf.gates import Gate
from kt_hf.lora import expert_targets
from tests.support.families import CLASSES, REFUSED, tiny
from tests.support.patched import fill_lora
from tests.support.reference import assert_close, relative_error

RANK, ALPHA, TOKENS = 4, 6, 24
EDGE = 0.006  # from a limit of 0.5: three roundings to bf16
EVERY = {"1 gate inside", "2 gate above", "3 up inside", "4 up above", "5 up below"}
Deltas = dict[str, Tensor]  # projection -> B A of each expert, [E, out, in]


def _concatenated(d: Deltas) -> Deltas:
    return {"gate_up_proj": torch.cat([d["gate_proj"], d["up_proj"]], 1), "down_proj": d["down_proj"]}


def _transposed(d: Deltas) -> Deltas:
    return {name: delta.transpose(1, 2) for name, delta in _concatenated(d).items()}


def _interleaved(d: Deltas) -> Deltas:
    in_turn = torch.stack([d["gate_proj"], d["up_proj"]], 2).flatten(1, 2)
    return {"gate_up_proj": in_turn.transpose(1, 2), "down_proj": d["down_proj"].transpose(1, 2)}


def _flat(d: Deltas) -> Deltas:
    down = d["down_proj"].transpose(1, 2)
    return {"mlp.w1": d["gate_proj"].flatten(0, 1), "mlp.v1": d["up_proj"].flatten(0, 1), "mlp.w2": down.flatten(0, 1)}


def _with_identities(d: Deltas) -> Deltas:
    both = _concatenated(d)
    rows = nn.functional.pad(both["gate_up_proj"], (0, 0, 0, 0, 0, 4))
    return both | {"gate_up_proj": rows}


# Family -> (how B A lies in its parameters, its gate). Limits are 0.5, by tests/support/families.py.
FAMILIES: dict[str, tuple[Callable[[Deltas], Deltas], Gate]] = {
    "gemma4": (_concatenated, Gate("gelu_tanh")),
    "diffusion_gemma": (_concatenated, Gate("gelu_tanh")),
    "gpt_oss": (_interleaved, Gate(alpha=1.702, limit=0.5, up_offset=1.0)),
    "deepseek_v4": (_concatenated, Gate(limit=0.5)),
    "glm5_next": (_concatenated, Gate(limit=0.5)),
    "hy_v4": (_concatenated, Gate(limit=0.5)),
    "hy_v4_vl": (_concatenated, Gate(limit=0.5)),
    "minimax_m3_vl": (_concatenated, Gate(alpha=1.702, limit=0.5, up_offset=1.0)),
    "inkling2": (_concatenated, Gate(gate_cap=4.0, up_cap=25.0)),
    "inkling2_loop": (_concatenated, Gate(gate_cap=4.0, up_cap=25.0)),
    "step3p7": (_concatenated, Gate(limit=0.5, clamps_after=True)),
    "beam": (_concatenated, Gate()),
    "aria": (_transposed, Gate()),
    "llama4": (_transposed, Gate()),
    "nemotron_h": (lambda d: d, Gate("relu2", gated=False)),
    "dbrx": (_flat, Gate()),
    "longcat_flash": (_with_identities, Gate()),
    "muse_spark": (_concatenated, Gate()),
}
PLAIN = set(CLASSES) - set(REFUSED) - set(FAMILIES)
SLOW = {"diffusion_gemma", "glm5_next", "hy_v4", "hy_v4_vl", "inkling2_loop"}  # like others; too many for every run
CLAMPED = [name for name, (_, gate) in FAMILIES.items() if gate.limit is not None]
QUICK = {"gpt_oss", "nemotron_h", "gemma4"}  # layouts and gates are each in fp32 in every run; beyond it these


def but_slow(names: Iterable[str], slow: Callable[[str], bool]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) if slow(name) else name for name in names]


class Layer:
    """A family's first layer of experts, patched and stock, with inputs that reach every branch of its gate.

    The patched model is on `device`; all else, and every result, is on the CPU.
    """

    def __init__(self, family: str, dtype: torch.dtype, device: str = "cpu", **settings: Any) -> None:
        model, stock = (tiny(family, dtype) for _ in range(2))
        for module in (*model.modules(), *stock.modules()):
            if type(module).__name__ == "GptOssExperts":
                module.limit = 0.5  # transformers 5.17 has 7.0 there, whatever the config says
        site = find_experts(stock)[0]
        self.stock, self.shape, self.call, self.dtype = site.experts.float(), site.shape, site.form.call, dtype
        self.merge, gate = FAMILIES.get(family, (_concatenated, Gate()))
        assert site.shape.gate == gate
        with torch.no_grad():
            for name, parameter in self.stock.named_parameters():
                if name.endswith("_bias"):
                    parameter.copy_(torch.randn(parameter.shape).bfloat16())
                    site_name = f"{site.name}.{name}"
                    model.get_parameter(site_name).copy_(parameter)
        if hasattr(self.stock, "config"):
            self.stock.config._experts_implementation = "eager"
        self.weights = site.form.taken(self.stock)
        patched = apply_kt_moe(model, KTConfig(kt_backend="torch", **settings))
        config = kt_lora_config(patched, lora_rank=RANK, lora_alpha=ALPHA, lora_target=expert_targets(patched))
        self.model = get_peft_model(patched, config)
        fill_lora(self.model, 0)
        self.model.to(device)
        self.device = device
        self.layer: KTExperts = patched._kt_wrappers[0]

    def inputs(self, tokens: int = TOKENS, anywhere: bool = False) -> tuple[Tensor, ...]:
        """(hidden, ids, weights), or what the family's call has instead, exact in bf16.

        Without `anywhere` no token is where the gate's derivative jumps (`clear`).
        """
        E, K, H = self.shape.num_experts, self.shape.top_k, self.shape.hidden_size
        x = torch.randn(50 * tokens, H).bfloat16().float()
        choices = E + 4 if self.call == "identity" else E
        ids = torch.rand(len(x), choices).argsort(1)[:, :K]
        kept = torch.arange(tokens) if anywhere else self.clear(x, ids)[:tokens]
        x, ids = x[kept], ids[kept]
        assert len(x) == tokens
        assert self.branches(x, ids) == EVERY
        weights = torch.rand(tokens, K).add(0.2).bfloat16().float()
        if self.call == "sliced":
            share = torch.zeros(tokens, E).scatter(1, ids, weights)
            return ((x[None] * share.t()[:, :, None]).flatten(0, 1).bfloat16().float(),)
        return x.view(2, -1, H) if self.call == "batched" else x, ids, weights

    def lora(self) -> dict[str, nn.Parameter]:
        return {
            f"{name}.{holder}": getattr(getattr(self.layer, name), holder)["default"].weight
            for name in self.shape.projections
            for holder in ("lora_A", "lora_B")
        }

    def ours(self, inputs: tuple[Tensor, ...], grad: Tensor) -> dict[str, Tensor]:
        """Output, and gradients of floating inputs and LoRA for this gradient of the output."""
        there = [x.to(self.device) for x in inputs]
        values = [x.to(self.dtype).requires_grad_() if x.is_floating_point() else x for x in there]
        return self._results(self.layer(*values), values, self.lora(), grad.to(self.device))

    def stocks(self, inputs: tuple[Tensor, ...], grad: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """The same of the model's own module in `dtype`, W + B A in its parameters."""
        leaves = {name: value.detach().to("cpu", dtype).requires_grad_() for name, value in self.lora().items()}
        values = [x.to(dtype, copy=True).requires_grad_() if x.is_floating_point() else x for x in inputs]
        deltas = {
            name: leaves[f"{name}.lora_B"] @ leaves[f"{name}.lora_A"] * (ALPHA / RANK)
            for name in self.shape.projections
        }
        stock = self.stock if dtype == torch.float32 else copy.deepcopy(self.stock).to(dtype)
        base = dict(stock.named_parameters())
        merged = {name: base[name].detach() + delta for name, delta in self.merge(deltas).items()}
        return self._results(functional_call(stock, merged, tuple(values)), values, leaves, grad)

    def _results(
        self, out: Tensor, inputs: list[Tensor], lora: dict[str, nn.Parameter] | dict[str, Tensor], grad: Tensor
    ) -> dict[str, Tensor]:
        leaves = {f"input {i}": x for i, x in enumerate(inputs) if x.requires_grad} | lora
        gradients = torch.autograd.grad(out, list(leaves.values()), grad.view(out.shape).to(out.dtype))
        results = {"output": out.detach().flatten(), **dict(zip(leaves, gradients, strict=True))}
        return {name: value.float().cpu() for name, value in results.items()}

    def compare(self, forward: float, gradient: float) -> None:
        """Compare with the reference, to relative errors of these norms at most."""
        inputs = self.inputs()
        grad = torch.randn(inputs[0].shape).bfloat16().float()
        wanted = self.stocks(inputs, grad, torch.float32)
        for name, value in self.ours(inputs, grad).items():
            assert_close(value, wanted[name], forward if name == "output" else gradient, name)

    def gate_and_up(self, x: Tensor, ids: Tensor) -> Tensor:
        """What comes before the gate, for each token and each of its experts: [T, K, 2I] fp32."""
        taken, real = self.weights, ids.clamp(max=self.shape.num_experts - 1)
        gu = torch.einsum("th,tkoh->tko", x, taken.gate_up[real])
        for half, name in enumerate(self.shape.projections[:-1]):
            a, b = (self.lora()[f"{name}.{holder}"].detach().float().cpu()[real] for holder in ("lora_A", "lora_B"))
            added = torch.einsum("tkor,tkrh,th->tko", b, a, x) * (ALPHA / RANK)
            gu.view(*ids.shape, self.shape.gate.halves, -1)[:, :, half] += added
        return gu if taken.gate_up_bias is None else gu + taken.gate_up_bias[real]

    def clear(self, x: Tensor, ids: Tensor) -> Tensor:
        """Tokens none of whose gates and ups is where the derivative jumps: bf16 cannot tell on which side it is."""
        limit = self.shape.gate.limit
        if limit is None:
            return torch.arange(len(x))
        g, u = self.gate_and_up(x, ids).chunk(2, -1)
        a = g * torch.sigmoid(g) if self.shape.gate.clamps_after else g
        distance = torch.minimum((a - limit).abs(), (u.abs() - limit).abs()).flatten(1).amin(1)
        return (distance > EDGE).nonzero()[:, 0]

    def branches(self, x: Tensor, ids: Tensor) -> set[str]:
        """Which sides of its clamps the gate's inputs are on."""
        gate = self.shape.gate
        if gate.limit is None:
            return EVERY
        g, u = self.gate_and_up(x, ids).chunk(2, -1)
        a = g * torch.sigmoid(g) if gate.clamps_after else g
        sides = (a < gate.limit, a > gate.limit, u.abs() < gate.limit, u > gate.limit, u < -gate.limit)
        return {name for name, hit in zip(sorted(EVERY), sides, strict=True) if hit.float().mean() > 0.01}


@pytest.mark.parametrize("family", but_slow(FAMILIES, lambda name: name in SLOW))
def test_in_fp32(family: str) -> None:
    Layer(family, torch.float32).compare(1e-6, 1e-5)


@pytest.mark.parametrize("family", but_slow(FAMILIES, lambda name: name not in QUICK))
def test_in_bf16(family: str) -> None:
    Layer(family, torch.bfloat16).compare(0.02, 0.02)


@pytest.mark.parametrize("family", but_slow(CLAMPED, lambda name: name not in QUICK))
def test_in_bf16_at_the_edges(family: str) -> None:
    """With all tokens, those at a limit too, bf16 is no further from fp32 than stock's own module in bf16 is."""
    layer = Layer(family, torch.bfloat16)
    with torch.no_grad():  # stock has no LoRA; so does its merged weight lose nothing by rounding
        for name, value in layer.lora().items():
            value.mul_(0 if "lora_B" in name else 1)
    inputs = layer.inputs(20 * TOKENS, anywhere=True)
    grad = torch.randn(inputs[0].shape).bfloat16().float()
    exact, stock = (layer.stocks(inputs, grad, dtype) for dtype in (torch.float32, torch.bfloat16))
    for name, value in layer.ours(inputs, grad).items():
        if exact[name].any():  # A's gradient is zero
            assert relative_error(value, exact[name]) < 1.3 * relative_error(stock[name], exact[name]), name


@pytest.mark.usefixtures("cpu_for_gpu")
@pytest.mark.parametrize("tier", ["resident", "streamed"])
@pytest.mark.parametrize("family", but_slow(FAMILIES, lambda name: name not in QUICK))
def test_on_the_tiers_of_a_gpu(family: str, tier: str) -> None:
    """The CPU stands for the GPU: grouped products by PyTorch, and weights streamed from host memory in bf16."""
    layer = Layer(family, torch.bfloat16, kt_expert_placement={tier: 8})
    assert layer.layer.backend_name == ("streamed" if tier == "streamed" else "torch")
    layer.compare(0.02, 0.02)


@pytest.mark.slow
@pytest.mark.usefixtures("cpu_for_gpu")
@pytest.mark.parametrize("tier", ["resident", "streamed"])
@pytest.mark.parametrize("family", sorted(PLAIN))
def test_plain_families_on_the_tiers_of_a_gpu(family: str, tier: str) -> None:
    """The others, which have the usual gate and layout."""
    Layer(family, torch.bfloat16, kt_expert_placement={tier: 8}).compare(0.02, 0.02)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("tier", ["resident", "streamed"])
@pytest.mark.parametrize("family", [*FAMILIES, *sorted(PLAIN)])
def test_on_a_gpu(family: str, tier: str) -> None:
    layer = Layer(family, torch.bfloat16, "cuda", kt_expert_placement={tier: 8})
    assert layer.layer.backend.device.type == "cuda"
    layer.compare(0.02, 0.02)
