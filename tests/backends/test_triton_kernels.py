"""Triton's kernels without a GPU: computed by Triton's interpreter, and compiled for the GPUs that people have."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kt_hf.gates import PLAIN
from tests.support.gates import GATES

CASES = Path(__file__).with_name("kernel_cases.py")
# Shared memory that a block may have, by the CUDA programming guide: A100, 3090, 4090, H100, B200, 5090.
SHARED = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
# Tensor cores that have instructions of their own for tiles of 64 rows and more: H100's and B200's.
OWN = {90: "wgmma.mma_async", 100: "tcgen05.mma"}


@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_by_the_interpreter(which: str) -> None:
    """`kernel_cases.py`, in a process of its own: Triton decides at its import whether it interprets."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "--noconftest", "-p", "no:cacheprovider", "-m", which, str(CASES)],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


def compiled(kernel: Any, sm: int, pointers: dict[str, str], numbers: dict[str, int], **constants: Any) -> Any:
    """A kernel as it is launched: pointers at multiples of 16 bytes, numbers that are multiples of 16."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    options = {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants}
    fixed = {name: value for name, value in numbers.items() if value == 1}
    types = {
        name: pointers.get(name) or ("constexpr" if name in {**fixed, **constants} else "i32")
        for name in kernel.arg_names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if name in pointers or numbers.get(name, 1) % 16 == 0
    }
    source = ASTSource(kernel, types, {**fixed, **constants}, aligned)
    return compile(source, target=GPUTarget("cuda", sm, 32), options=options)


ALL = [pytest.param(sm, marks=() if sm == 80 else pytest.mark.slow) for sm in SHARED]


@pytest.mark.parametrize("height", [16, 64, 128])
@pytest.mark.parametrize("sm", ALL)
def test_the_product_compiles(sm: int, height: int) -> None:
    """Both orders of weights, within the shared memory there is, by tensor cores and copies that do not block."""
    pytest.importorskip("triton")
    from kt_hf.backends.gpu import grouped_product as module

    blocks = module.PRODUCT[SHARED[sm] >= module.LARGE, height]
    pointers = dict.fromkeys(("x", "w", "out"), "*bf16") | dict.fromkeys(("tile_expert", "tile_row", "ends"), "*i32")
    for strides in ({"w_in": 1, "w_out": 2048}, {"w_in": 1536, "w_out": 1}):
        done = compiled(
            module._product, sm, pointers, {"K": 2048, "N": 1536, "w_expert": 2048 * 1536, **strides}, EVEN_K=True,
            EVEN_N=True, HEIGHT=height, WIDTH=blocks.width, DEPTH=blocks.depth, num_warps=blocks.warps,
            num_stages=blocks.stages,
        )  # fmt: skip
        assert done.metadata.shared <= SHARED[sm]
        assert (OWN.get(sm, "mma.sync") if height >= 64 else "mma.sync") in done.asm["ptx"]
        assert "cp.async" in done.asm["ptx"]


@pytest.mark.parametrize("sm", ALL)
def test_the_products_of_lora_compile(sm: int) -> None:
    """Rank 8, whose sizes are no multiples of a block's."""
    pytest.importorskip("triton")
    from kt_hf.backends.gpu import grouped_product as module

    large = SHARED[sm] >= module.LARGE
    blocks, outer = module.PRODUCT[large, 64], module.OUTER[large]
    pointers = dict.fromkeys(("x", "w", "out"), "*bf16") | dict.fromkeys(("tile_expert", "tile_row", "ends"), "*i32")
    small = compiled(
        module._product, sm, pointers, {"K": 8, "N": 2048, "w_expert": 8 * 2048, "w_in": 1, "w_out": 8}, EVEN_K=False,
        EVEN_N=True, HEIGHT=64, WIDTH=blocks.width, DEPTH=16, num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    pointers = dict.fromkeys(("left", "right", "out"), "*bf16") | {"ends": "*i32"}
    done = compiled(
        module._outer, sm, pointers, {"M": 8, "N": 2048}, EVEN=False, HEIGHT=16, WIDTH=outer.width, DEPTH=outer.depth,
        num_warps=outer.warps, num_stages=outer.stages,
    )  # fmt: skip
    for one in (small, done):
        assert one.metadata.shared <= SHARED[sm]
        assert "mma" in one.asm["ptx"]


ROW_POINTERS = {
    "tokens": "*i32", "place": "*i32", "ends": "*i32", "experts": "*i16", "weights": "*fp32", "by_row": "*fp32",
}  # fmt: skip
VALUE_POINTERS = dict.fromkeys(("x", "out", "gu", "lora", "bias", "h", "gu_lora", "q", "q_lora", "base"), "*bf16")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "gpt_oss" else pytest.mark.slow) for n in GATES])
@pytest.mark.parametrize("sm", ALL)
def test_the_kernels_of_every_gate_compile(sm: int, name: str) -> None:
    """With biases, which are read as wide as rows are."""
    pytest.importorskip("triton")
    from kt_hf.backends.gpu import fused_kernels as module
    from kt_hf.backends.gpu.gate_kernels import constants

    gate = GATES[name]
    fixed = {
        "GATE": constants(gate), "GATED": gate.gated, "LORA": True, "BIAS": True, "ROWS": module._ROWS,
        "COLUMNS": module._COLUMNS,
    }  # fmt: skip
    for kernel in (module._gate, module._gate_gradients):
        ptx = compiled(kernel, sm, ROW_POINTERS | VALUE_POINTERS, {"width": 768, "last": 1 << 4}, **fixed).asm["ptx"]
        assert ptx.count("ld.global.v4") + ptx.count("ld.global.L1::evict_last.v4") >= 3 * gate.halves, kernel
        assert "st.global.v4" in ptx, kernel


@pytest.mark.parametrize("sm", ALL)
def test_the_fused_kernels_compile(sm: int) -> None:
    """Those of the large tensors read and write 16 bytes at a time."""
    pytest.importorskip("triton")
    from kt_hf.backends.gpu import fused_kernels as module
    from kt_hf.backends.gpu import grouped_product
    from kt_hf.backends.gpu.gate_kernels import constants

    rows, values = ROW_POINTERS, VALUE_POINTERS
    tile = {"ROWS": module._ROWS, "COLUMNS": module._COLUMNS}
    gate = {"GATE": constants(PLAIN), "GATED": True, "LORA": True, "BIAS": False}
    for kernel, fixed in (
        (module._gather, tile), (module._gate, gate | tile), (module._gate_gradients, gate | tile),
        (module._weight, {"LORA": True, "WEIGHTED": True} | tile),
        (module._sum, {"K": 8, "LORA": True, "WEIGHTED": True, "COLUMNS": module._WIDE}),
    ):  # fmt: skip
        ptx = compiled(kernel, sm, rows | values, {"H": 2048, "width": 768, "last": 1 << 4}, **fixed).asm["ptx"]
        assert "ld.global.v4" in ptx or "ld.global.L1::evict_last.v4" in ptx, kernel
        assert "st.global.v4" in ptx, kernel
    compiled(module._indexed, sm, rows | {"order": "*i64"}, {"K": 8, "count": 16}, INDICES=module._INDICES)
    compiled(
        grouped_product._list_tiles, sm, dict.fromkeys(("ends", "tile_expert", "tile_row"), "*i32"), {}, HEIGHT=64,
        EXPERTS=128, AT_ONCE=64,
    )  # fmt: skip


@pytest.mark.parametrize("sm", [pytest.param(sm, marks=() if sm in (80, 120) else pytest.mark.slow) for sm in SHARED])
def test_widening_compiles(sm: int) -> None:
    """Every code and kind of scale, floats of 8 bits among them where a GPU has none; stores are of 16 bytes."""
    pytest.importorskip("triton")
    from kt_hf.backends.gpu import widen_kernels as module

    numbers = {"count": 2**20, "part_words": 2**12}
    pointers = {"words": "*i32", "zeros": "*u8", "factors": "*fp32", "table": "*fp32", "out": "*bf16"}
    for code, kind, scale, zero, factor in (
        (0, 0, "*bf16", False, 0), (0, 0, "*fp16", True, 0), (1, 1, "*u8", False, 0), (1, 2, "*u8", False, 1),
        (1, 2, "*u8", False, 2), (2, 0, "*fp32", False, 0),
    ):  # fmt: skip
        done = compiled(
            module._widen4, sm, pointers | {"scales": scale}, numbers, CODE=code, SCALE=kind, ZERO=zero, FACTOR=factor,
            GROUP=2 if kind == 2 else 4, BLOCK=module._WORDS, num_warps=module._WARPS,
        )  # fmt: skip
        assert "st.global.cs.v4" in done.asm["ptx"], (code, kind)
    sizes = {"lines": 2**16, "rows": 1536, "row_words": 512, "part_rows": 768, "R": 6, "C": 16}
    for fp8 in (True, False):
        for per, words in ((4, "*i32"), (1, "*i8")):
            types = {"words": words, "scales": "*fp32", "out": "*bf16"}
            done = compiled(
                module._widen8, sm, types, sizes, HEIGHT=128, WIDTH=128 // per, FP8=fp8, PER=per, LINES=2, WORDS=512,
                num_warps=module._WARPS,
            )  # fmt: skip
            assert "st.global.cs" in done.asm["ptx"], (fp8, per)
            assert per == 1 or "st.global.cs.v2" in done.asm["ptx"] or "st.global.cs.v4" in done.asm["ptx"], fp8
