"""Random low-bit matrices of every format, and layers of them."""

from __future__ import annotations

import torch

from kt_hf.backends.packed import PackedExperts, PackedMatrices

# Formats as checkpoints have them, by what tells them apart.
KINDS = (
    "int4", "int4 fp16 g128", "int4 a row", "int4 zeros", "mxfp4", "nvfp4", "nvfp4 divided", "nf4",
    "fp8", "fp8 edges", "fp8 two parts", "int8", "int8 a row",
)  # fmt: skip


def random_matrices(kind: str, n: int, rows: int, columns: int, seed: int = 0) -> PackedMatrices:
    """n matrices of a kind; groups and blocks are cut down to what the sizes allow."""
    g = torch.Generator().manual_seed(seed + rows)
    bits = kind.split()[0] in ("fp8", "int8")
    if bits:
        return _eight(kind, n, rows, columns, g)
    codes = torch.randint(0, 256, (n, rows, columns // 2), dtype=torch.uint8, generator=g)
    size = {"nvfp4": 16, "nf4": 64}.get(kind.split()[0], 32)
    size = columns if "a row" in kind or columns % size else min(size, columns)
    size = columns if "g128" in kind and columns < 128 else 128 if "g128" in kind else size
    if columns % size or size % 8:
        size = 8
    scales = torch.rand(n, rows, columns // size, generator=g) * 0.02 + 0.001
    zeros = factor = None
    if kind == "int4 zeros":
        zeros = torch.randint(0, 16, scales.shape, dtype=torch.uint8, generator=g)
    if kind == "mxfp4":
        return PackedMatrices("e2m1", codes, torch.randint(110, 124, scales.shape, dtype=torch.uint8, generator=g))
    if kind.startswith("nvfp4"):
        factor = torch.rand(n, 2, generator=g) + 0.5
        scales8 = (scales * 1000).to(torch.float8_e4m3fn)
        return PackedMatrices("e2m1", codes, scales8, factor=factor / 900, divide="divided" in kind)
    if kind == "nf4":
        return PackedMatrices("nf4", codes, scales)
    return PackedMatrices("int4", codes, scales.to(torch.float16 if "fp16" in kind else torch.bfloat16), zeros=zeros)


def _eight(kind: str, n: int, rows: int, columns: int, g: torch.Generator) -> PackedMatrices:
    wide = torch.randn(n, rows, columns, generator=g) * 40
    block = (1, 1 << 40) if "a row" in kind else (20, 7) if "edges" in kind else (16, 16)
    parts = 2 if "two" in kind or "edges" in kind else 1
    scales = torch.rand(n, parts, -(-rows // parts // block[0]), -(-columns // block[1]), generator=g) * 0.001
    if kind.startswith("int8"):
        return PackedMatrices("int8", wide.round().clamp(-127, 127).to(torch.int8), scales, block)
    return PackedMatrices("e4m3", wide.to(torch.float8_e4m3fn), scales, block)


def random_experts(kind: str, experts: int, hidden: int, intermediate: int) -> PackedExperts:
    """All experts of a layer."""
    gate_up = random_matrices(kind, experts, 2 * intermediate, hidden, 1)
    return PackedExperts(list(range(experts)), gate_up, random_matrices(kind, experts, hidden, intermediate, 2))
