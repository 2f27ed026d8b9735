"""Rows of several tensors as bytes, and the tensors again."""

from __future__ import annotations

import pytest
import torch

from kt_hf.experts.row_bytes import inputs_of, packed, unpacked


@pytest.mark.parametrize("tokens", [0, 1, 2])
@pytest.mark.parametrize("top_k", [1, 2])
def test_whatever_the_width_of_a_row(top_k: int, tokens: int) -> None:
    """Of one row a column is contiguous, however wide the row is: 12 K + 2 H bytes, which 8 need not divide."""
    inputs = inputs_of(torch.randn(tokens, 64).bfloat16(), torch.ones(tokens, top_k).long(), torch.rand(tokens, top_k))
    rows, layout = packed(inputs)
    assert all(torch.equal(found, tensor) for found, tensor in zip(unpacked(rows, layout), inputs, strict=True))
    of_ranks = unpacked(torch.stack((rows, rows)), layout)
    assert all(torch.equal(found[1], tensor) for found, tensor in zip(of_ranks, inputs, strict=True))
