"""A bare driver of kt-kernel's operators for low-bit weights, independent of kt_hf, for their contract tests."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.contract_operator import Operator, engine

CLASSES = {"MXFP4": "MXFP4_SFT_MOE", "AMXFP8": "AMXFP8_SFT_MOE", "AMXInt4KGroup": "AMXInt4_KGroup_SFT_MOE"}
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
PROBE = "import sys, kt_kernel; sys.exit(0 if hasattr(kt_kernel.kt_kernel_ext.moe, sys.argv[1]) else 3)"


@cache
def missing(kind: str) -> str | None:
    """Why these operators cannot run here, or None; asks the CPU and kt-kernel, not the package tested."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "no /proc/cpuinfo"
    flags = set(next((line for line in lines if line.startswith("flags")), "").split())
    if not flags & ({"avx2"} if kind == "MXFP4" else {"avx512_bf16", "amx_bf16"}):
        return f"the CPU cannot run {kind}"
    if kind == "AMXFP8" and "avx512vbmi" not in flags:
        return "the CPU has no AVX512-VBMI"
    forced = os.environ.get("KT_KERNEL_CPU_VARIANT", "").lower()
    if forced and (kind, forced) != ("MXFP4", "avx2"):
        return f"KT_KERNEL_CPU_VARIANT={forced} forces a variant"
    probe = subprocess.run([sys.executable, "-c", PROBE, CLASSES[kind]], capture_output=True)
    return None if probe.returncode == 0 else f"kt-kernel's variant here has no {CLASSES[kind]}"


def kind_param(kind: str) -> Any:
    """A test's parameter, skipped where the operators do not run; those for AVX512 alone are marked `kernel`."""
    skip = pytest.mark.skipif(missing(kind) is not None, reason=str(missing(kind)))
    return pytest.param(kind, marks=[skip] if kind == "MXFP4" else [pytest.mark.kernel, skip])


def drawn(
    kind: str, matrices: int, rows: int, columns: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales as the operators take them, and the weights in fp32, about 1/sqrt(columns) large."""
    size = columns**-0.5
    if kind == "AMXFP8":
        codes = torch.randn(matrices, rows, columns, generator=generator).to(torch.float8_e4m3fn)
        blocks = (matrices, rows // 128, columns // 128)
        scales = (torch.rand(blocks, generator=generator) + 0.5) * size
        wide = codes.float() * scales.repeat_interleave(128, 1).repeat_interleave(128, 2)
        return codes, scales, wide
    codes = torch.randint(0, 256, (matrices, rows, columns // 2), dtype=torch.uint8, generator=generator)
    values = torch.stack((codes & 15, codes >> 4), -1).flatten(-2).long()
    groups = (matrices, rows, columns // 32)
    if kind == "MXFP4":
        scales = torch.ldexp(torch.ones(groups), torch.randint(-3, 0, groups, generator=generator)) * 2.0 ** round(
            torch.tensor(size).log2().item()
        )
        table = E2M1[values]
    else:
        scales, table = (torch.rand(groups, generator=generator) + 0.5) * size / 4, values.float() - 8
    scales = scales.bfloat16()
    return codes, scales, table * scales.float().repeat_interleave(32, 2)


class LowBitOperator(Operator):
    """One layer of random codes and scales; `gate`, `up`, `down` are what they are worth, in fp32."""

    def __init__(
        self, kind: str = "MXFP4", E: int = 8, K: int = 2, H: int = 128, inner: int = 128, rank: int = 8, seed: int = 0,
        max_len: int = 512, limit: float | None = None, **settings: Any,
    ) -> None:  # fmt: skip
        from kt_kernel import kt_kernel_ext

        g = torch.Generator().manual_seed(seed)
        self.E, self.K, self.H, self.inner, self.rank = E, K, H, inner, rank
        shapes = {"gate": (inner, H), "up": (inner, H), "down": (H, inner)}
        self.stored = {}
        for name, (rows, columns) in shapes.items():
            codes, scales, wide = drawn(kind, E, rows, columns, g)
            self.stored[name] = codes, scales
            setattr(self, name, wide)
        sizes = (E, rank, H), (E, inner, rank), (E, rank, H), (E, inner, rank), (E, rank, inner), (E, H, rank)
        self.lora = [(torch.randn(size, generator=g) * 0.1).bfloat16() for size in sizes] if rank else []
        self.grads = [torch.zeros(size, dtype=torch.bfloat16) for size in sizes] if rank else []
        self.map = torch.arange(E, dtype=torch.int64)
        config = kt_kernel_ext.moe.MOESFTConfig()
        self._set(config, kind, rank, max_len, limit, settings)
        self.moe = getattr(kt_kernel_ext.moe, CLASSES[kind])(config)
        engine().submit(self.moe.load_weights_task())
        engine().sync()
        self.update_lora()

    def _set(self, config: Any, kind: str, rank: int, max_len: int, limit: float | None, settings: Any) -> None:
        from tests.support import contract_operator

        config.expert_num, config.num_experts_per_tok = self.E, self.K
        config.hidden_size, config.intermediate_size = self.H, self.inner
        config.lora_rank, config.lora_alpha, config.lora_dropout = rank, float(rank), 0.0
        config.max_cache_depth, config.max_len = 1, max_len
        config.layer_idx = next(contract_operator._keys)
        config.share_backward_bb = kind == "AMXFP8"
        config.share_cache_pool = config.full_weight_grad = False
        config.authoritative_optimizer_grads = rank > 0
        config.physical_to_logical_map = self.map.data_ptr()
        config.swiglu_limit = (1e30 if kind == "MXFP4" else 0.0) if limit is None else limit
        config.quant_config.bits = 8 if kind == "AMXFP8" else 4
        config.quant_config.group_size = 128 if kind == "AMXFP8" else 32
        config.quant_config.zero_point = False
        names = ("gate_lora_a", "gate_lora_b", "up_lora_a", "up_lora_b", "down_lora_a", "down_lora_b")
        for name, tensor in zip(names, self.lora, strict=False):
            setattr(config, name, tensor.data_ptr())
        for name, (codes, scales) in self.stored.items():
            if kind == "AMXInt4KGroup":
                setattr(config, f"{name}_proj", codes.data_ptr())
                setattr(config, f"{name}_scale", scales.data_ptr())
            else:
                setattr(config, f"{name}_projs", [[codes[e].data_ptr() for e in range(self.E)]])
                setattr(config, f"{name}_scales", [[scales[e].data_ptr() for e in range(self.E)]])
        for name, value in settings.items():
            setattr(config, name, value)
        config.pool = engine().backend_
