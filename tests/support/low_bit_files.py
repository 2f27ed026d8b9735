"""Checkpoints of 4 and 8 bits as others write them: made by the formats' definitions, not by the code under test.

A `Way` gives a weight's tensors and what the weight then is: codes are rounded here, and the weight is computed
of codes and scales in fp32 by the format's formula, rounded to bf16 once.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from tests.support.checkpoints import saved, set_config, tensors, write
from tests.support.models import FAMILIES, Family

SIZE = 128  # of the hidden states and of an expert's inner ones
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
NF4 = torch.tensor(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
)  # fmt: skip
Stored = tuple[dict[str, Tensor], Tensor]  # the parts by their names, and the weight in bf16


@dataclass(frozen=True)
class Way:
    """One format: how it stores a weight, what the configuration says, whether the dense rest is stored so too."""

    store: Callable[[Tensor], Stored]
    config: dict[str, Any]
    rest: bool = True
    fused: bool = False
    more: tuple[tuple[str, Any], ...] = ()  # fields of the configuration beside it


def _qwen() -> PreTrainedConfig:
    config = FAMILIES["qwen3_moe"].make_config()
    config.moe_intermediate_size = config.intermediate_size = SIZE
    return config


FAMILY: Family = replace(FAMILIES["qwen3_moe"], make_config=_qwen, intermediate=SIZE)


def in_int32(nibbles: Tensor) -> Tensor:
    """[..., 8] of 0 to 15 -> int32 [...], the first lowest."""
    whole = sum(nibbles[..., i].long() << (4 * i) for i in range(8))
    return torch.where(whole >= 2**31, whole - 2**32, whole).to(torch.int32)


def _asymmetric(w: Tensor, group: int, dtype: torch.dtype, least: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes and zero-points of 0 to 15, scales, and the weight."""
    blocks = w.float().unflatten(-1, (-1, group))
    scales = (blocks.abs().amax(-1) / 7).clamp(min=1e-4).to(dtype)
    zeros = torch.arange(scales.numel()).reshape(scales.shape) % (16 - least) + least
    codes = (blocks / scales.float()[..., None] + zeros[..., None]).round().clamp(0, 15).long()
    exact = (codes - zeros[..., None]).float() * scales.float()[..., None]
    return codes.flatten(-2), zeros, scales, exact.flatten(-2).bfloat16()


def int4(group: int, asymmetric: bool = False, scale_dtype: torch.dtype = torch.bfloat16) -> Callable[[Tensor], Stored]:
    def store(w: Tensor) -> Stored:
        size = w.shape[1] if group == -1 else group
        codes, zeros, scales, exact = _asymmetric(w, size, scale_dtype)
        if not asymmetric:
            blocks = w.float().unflatten(-1, (-1, size)) / scales.float()[..., None]
            codes = (blocks.round().clamp(-8, 7) + 8).long().flatten(-2)
            exact = ((codes - 8).float().unflatten(-1, (-1, size)) * scales.float()[..., None]).flatten(-2).bfloat16()
        parts = {"weight_packed": in_int32(codes.unflatten(1, (-1, 8))), "weight_scale": scales}
        parts["weight_shape"] = torch.tensor(w.shape)
        if asymmetric:
            rows = torch.nn.functional.pad(zeros, (0, 0, 0, -len(zeros) % 8)).unflatten(0, (-1, 8))
            parts["weight_zero_point"] = in_int32(rows.transpose(1, 2))
        return parts, exact

    return store


def _e2m1(blocks: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """The bytes of the nearest codes, the even column low, and the values."""
    codes = (blocks[..., None] / scales[..., None, None] - E2M1).abs().argmin(-1)
    pairs = codes.flatten(-2).unflatten(-1, (-1, 2))
    return (pairs[..., 0] + 16 * pairs[..., 1]).to(torch.uint8), (E2M1[codes] * scales[..., None]).flatten(-2)


def _mx(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    blocks = w.float().unflatten(-1, (-1, 32))
    exponents = (torch.log2(blocks.abs().amax(-1).clamp(min=1e-6)).floor() - 2 + 127).to(torch.uint8)
    codes, exact = _e2m1(blocks, torch.exp2(exponents.float() - 127))
    return codes, exponents, exact.bfloat16()


def mxfp4_of_compressed_tensors(w: Tensor) -> Stored:
    codes, exponents, exact = _mx(w)
    return {"weight_packed": codes, "weight_scale": exponents}, exact


def mxfp4_of_deepseek_v4(w: Tensor) -> Stored:
    codes, exponents, exact = _mx(w)
    return {"weight": codes.view(torch.int8), "scale": exponents.view(torch.float8_e8m0fnu)}, exact


def mxfp4_of_gpt_oss(w: Tensor) -> Stored:
    """Of a stack [E, N, K]."""
    codes, exponents, exact = _mx(w)
    return {"blocks": codes.unflatten(-1, (-1, 16)), "scales": exponents}, exact


def nvfp4(divide: bool) -> Callable[[Tensor], Stored]:
    def store(w: Tensor) -> Stored:
        blocks = w.float().unflatten(-1, (-1, 16))
        factor = w.float().abs().max() / (6 * 448)
        factor = 1 / factor if divide else factor
        wanted = blocks.abs().amax(-1) / 6
        scales = (wanted * factor if divide else wanted / factor).clamp(2**-6, 448).to(torch.float8_e4m3fn)
        whole = scales.float() / factor if divide else scales.float() * factor
        codes, exact = _e2m1(blocks, whole)
        if divide:
            parts = {"weight_packed": codes, "weight_scale": scales, "weight_global_scale": factor.reshape(1)}
            return parts | {"input_global_scale": torch.ones(1)}, exact.bfloat16()
        parts = {"weight": codes, "weight_scale": scales, "weight_scale_2": factor}
        return parts | {"input_scale": torch.ones(())}, exact.bfloat16()

    return store


def gptq(group: int, version: int) -> Callable[[Tensor], Stored]:
    def store(w: Tensor) -> Stored:
        codes, zeros, scales, exact = _asymmetric(w, group, torch.float16, least=2 - version)
        stored = zeros.T - 1 if version == 1 else zeros.T
        parts = {
            "qweight": in_int32(codes.T.unflatten(0, (-1, 8)).transpose(1, 2)),
            "qzeros": in_int32(stored.unflatten(1, (-1, 8))),
            "scales": scales.T,
            "g_idx": (torch.arange(w.shape[1]) // group).int(),
        }
        return parts, exact

    return store


def awq(w: Tensor) -> Stored:
    codes, zeros, scales, exact = _asymmetric(w, 64, torch.float16)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    packed = [in_int32(t.T.unflatten(1, (-1, 8))[..., order]) for t in (codes, zeros)]
    return {"qweight": packed[0], "qzeros": packed[1], "scales": scales.T}, exact


def nf4(nested: bool) -> Callable[[Tensor], Stored]:
    def store(w: Tensor) -> Stored:
        absmax = w.float().reshape(-1, 64).abs().amax(-1)
        state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(w.shape)}
        parts: dict[str, Tensor] = {"weight.absmax": absmax}
        if nested:
            table = torch.linspace(-1, 1, 256)
            offset = float(absmax.mean())
            outer = torch.stack([part.abs().amax() for part in (absmax - offset).split(256)])
            scaled = (absmax - offset) / outer.repeat_interleave(256)[: len(absmax)]
            codes = (scaled[:, None] - table).abs().argmin(-1)
            absmax = table[codes] * outer.repeat_interleave(256)[: len(absmax)] + offset
            parts = {"weight.absmax": codes.to(torch.uint8), "weight.nested_absmax": outer}
            parts["weight.nested_quant_map"] = table
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        codes = (w.float().reshape(-1, 64, 1) / absmax[:, None, None] - NF4).abs().argmin(-1)
        exact = (NF4[codes] * absmax[:, None]).reshape(w.shape).bfloat16()
        pairs = codes.reshape(-1, 2)
        parts["weight"] = (16 * pairs[:, 0] + pairs[:, 1]).to(torch.uint8)[:, None]
        parts["weight.quant_map"] = NF4.clone()
        text = json.dumps(state).encode()
        parts["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(text), dtype=torch.uint8)
        return parts, exact

    return store


def fp8_of_a_matrix(w: Tensor) -> Stored:
    scale = w.float().abs().max() / 448
    values = (w.float() / scale).to(torch.float8_e4m3fn)
    return {"weight": values, "weight_scale": scale}, (values.float() * scale).bfloat16()


def fp8_of_deepseek_v4(w: Tensor) -> Stored:
    exponent = torch.full((1, 1), 120, dtype=torch.uint8)
    values = (w.float() * 128).to(torch.float8_e4m3fn)
    return {"weight": values, "scale": exponent.view(torch.float8_e8m0fnu)}, (values.float() / 128).bfloat16()


def compressed(layout: str, **weights: Any) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"} | weights
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group}, "ignore": []}


_GPTQ = {"quant_method": "gptq", "bits": 4, "desc_act": False, "sym": False}
_BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
_FP8 = {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]}
WAYS = {
    "int4 group 32": Way(int4(32), compressed("pack-quantized", group_size=32)),
    "int4 group 128": Way(int4(128, scale_dtype=torch.float16), compressed("pack-quantized", group_size=128)),
    "int4 zero-points": Way(int4(32, True), compressed("pack-quantized", group_size=32, symmetric=False)),
    "int4 rows": Way(int4(-1), compressed("pack-quantized", strategy="channel")),
    "mxfp4 deepseek": Way(mxfp4_of_deepseek_v4, _FP8, rest=False, more=(("expert_dtype", "fp4"),)),
    "mxfp4 compressed": Way(
        mxfp4_of_compressed_tensors, compressed("mxfp4-pack-quantized", type="float", group_size=32)
    ),
    "fp8 a matrix": Way(fp8_of_a_matrix, {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "nvfp4 modelopt": Way(nvfp4(False), {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
    "nvfp4 compressed": Way(
        nvfp4(True), compressed("nvfp4-pack-quantized", type="float", strategy="tensor_group", group_size=16)
    ),
    "gptq v1": Way(gptq(64, 1), _GPTQ | {"group_size": 64, "checkpoint_format": "gptq"}),
    "gptq v2": Way(gptq(32, 2), _GPTQ | {"group_size": 32, "checkpoint_format": "gptq_v2"}),
    "awq": Way(awq, {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}),
    "mxfp4 gpt-oss": Way(mxfp4_of_gpt_oss, {"quant_method": "mxfp4"}, rest=False, fused=True),
    "nf4": Way(nf4(False), _BNB),
    "nf4 nested": Way(nf4(True), _BNB | {"bnb_4bit_use_double_quant": True}),
}


def _linear(name: str) -> bool:
    return name.endswith("_proj.weight")


def stored(way: Way, folder: Path, keep: Callable[[str], bool] = lambda name: False) -> tuple[Path, Path]:
    """A checkpoint stored in this way, and one of the same weights in bf16.

    Args:
        way: The format.
        folder: Where both go.
        keep: Names of weights that stay bf16.
    """
    low, plain = saved(FAMILY, folder / "low"), saved(FAMILY, folder / "plain")
    content, exact = {}, {}
    for name, tensor in tensors(low).items():
        routed = ".experts." in name
        if not _linear(name) or keep(name) or not (routed or way.rest) or (routed and way.fused):
            content[name] = exact[name] = tensor
            continue
        parts, exact[name] = way.store(tensor)
        content |= {name.removesuffix("weight") + part: value for part, value in parts.items()}
    if way.fused:
        _fuse(way, content, exact)
    write(low, content)
    write(plain, exact)
    set_config(low, quantization_config=way.config, **dict(way.more))
    return low, plain


def _fuse(way: Way, content: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Put gpt-oss's stacks in the place of one tensor an expert; gate and up in turns."""
    for index in FAMILY.moe_layers:
        layer = f"model.layers.{index}.mlp.experts"
        names = {p: [f"{layer}.{e}.{p}_proj.weight" for e in range(FAMILY.num_experts)] for p in ("gate", "up", "down")}
        gate, up, down = (torch.stack([content.pop(name) for name in some]) for some in names.values())
        parts, both = way.store(torch.stack((gate, up), 2).flatten(1, 2))
        content |= {f"{layer}.gate_up_proj_{part}": value for part, value in parts.items()}
        parts, below = way.store(down)
        content |= {f"{layer}.down_proj_{part}": value for part, value in parts.items()}
        for e in range(FAMILY.num_experts):
            exact[names["gate"][e]], exact[names["up"][e]] = both[e, 0::2], both[e, 1::2]
            exact[names["down"][e]] = below[e]
