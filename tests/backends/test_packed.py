"""Low-bit weights: what PyTorch widens them to, bit by bit, for every code."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from kt_hf.backends import packed
from kt_hf.backends.packed import NF4, PackedExperts, PackedMatrices, join_nibbles, nibbles
from tests.support.packed import KINDS, random_matrices

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def scalar(matrices: PackedMatrices, m: int, row: int, column: int) -> np.float32:
    """One weight in fp32, from the definitions, without PyTorch's arithmetic."""
    _, rows, columns = matrices.shape
    if matrices.code in ("e4m3", "int8"):
        parts = matrices.scales.shape[1]
        part, below = divmod(row, rows // parts)
        scale = matrices.scales[m, part, below // matrices.block[0], column // matrices.block[1]].item()
        return np.float32(np.float32(matrices.codes[m, row, column].float().item()) * np.float32(scale))
    byte = int(matrices.codes[m, row, column // 2])
    code = byte >> 4 if column % 2 else byte & 15
    at = m, row, column // (columns // matrices.scales.shape[-1])
    raw = matrices.scales[at]
    scale = np.float32(2.0 ** (int(raw) - 127) if matrices.scales.dtype == torch.uint8 else raw.float().item())
    if matrices.factor is not None:
        factor = np.float32(matrices.factor[m, row // (rows // matrices.factor.shape[1])].item())
        scale = np.float32(scale / factor if matrices.divide else scale * factor)
    if matrices.code == "int4":
        value = float(code - (8 if matrices.zeros is None else int(matrices.zeros[at])))
    else:
        value = NF4[code] if matrices.code == "nf4" else (-1 if code & 8 else 1) * E2M1[code & 7]
    return np.float32(np.float32(value) * scale)


@pytest.mark.parametrize("kind", KINDS)
def test_by_the_definition(kind: str) -> None:
    """Every weight of small matrices, in fp32, and rounded once to bf16."""
    matrices = random_matrices(kind, 2, 24, 64)
    n, rows, columns = matrices.shape
    expected = torch.tensor(
        [[[scalar(matrices, m, r, c) for c in range(columns)] for r in range(rows)] for m in range(n)]
    )
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(matrices.dequantized(dtype), expected.to(dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_parts_and_pieces(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row, some matrices and one piece at a time are those of the whole."""
    matrices = random_matrices(kind, 5, 24, 64)
    whole = matrices.dequantized(torch.bfloat16)
    assert all(torch.equal(matrices.row(m, r, torch.bfloat16), whole[m, r]) for m in (0, 3) for r in range(24))
    assert torch.equal(matrices.select([4, 1]).dequantized(torch.bfloat16), whole[[4, 1]])
    monkeypatch.setattr("kt_hf.backends.packed._PIECE", 2 * 24 * 64)
    assert torch.equal(matrices.dequantized(torch.bfloat16), whole)
    assert matrices.bits == pytest.approx(8 * matrices.nbytes / whole.numel())


def test_nibbles() -> None:
    values = torch.randint(0, 16, (3, 10), dtype=torch.uint8)
    assert torch.equal(nibbles(join_nibbles(values)), values)


def broken() -> Iterator[tuple[str, dict[str, Tensor]]]:
    codes, scales = torch.zeros(2, 8, 32, dtype=torch.uint8), torch.ones(2, 8, 2)
    yield "groups of 4", {"codes": codes, "scales": torch.ones(2, 8, 16)}
    yield "codes", {"codes": codes, "scales": torch.ones(2, 8, 3)}
    yield "codes", {"codes": codes.to(torch.int8), "scales": scales}
    yield "zero-points", {"codes": codes, "scales": scales, "zeros": torch.zeros(2, 8, 4, dtype=torch.uint8)}
    yield "factor", {"codes": codes, "scales": scales, "factor": torch.ones(2)}


@pytest.mark.parametrize(("words", "tensors"), list(broken()), ids=lambda x: x if isinstance(x, str) else "")
def test_what_does_not_go_together(words: str, tensors: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=words):
        PackedMatrices("int4", **tensors)  # type: ignore[arg-type]


def test_some_experts() -> None:
    experts = PackedExperts([1, 4, 6], random_matrices("int4", 3, 16, 32), random_matrices("int4", 3, 32, 16))
    some = experts.select([1, 6])
    assert some.experts == [1, 6]
    assert torch.equal(some.down.codes, experts.down.codes[[0, 2]])
    assert experts.select([1, 4, 6]) is experts


def test_where_the_kernel_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is tried once for each kind; but memory that runs out is no reason to think so."""
    given = random_matrices("fp8", 2, 32, 32)
    failing: list[BaseException] = [torch.OutOfMemoryError("no memory"), RuntimeError("no compiler")]
    fake = types.ModuleType("kernel")
    fake.widened = lambda *_: (_ for _ in ()).throw(failing.pop(0))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kt_hf.backends.gpu.widen_kernels", fake)
    monkeypatch.setattr(packed, "_kernel_runs", {})
    with pytest.raises(torch.OutOfMemoryError):
        packed._by_kernel(given)
    assert packed._by_kernel(given) is None
    assert packed._by_kernel(given) is None, "tried again"
    assert failing == []
    failing.append(RuntimeError("no such type"))
    assert packed._by_kernel(random_matrices("int4", 2, 32, 32)) is None
    assert failing == [], "another code was not tried"
