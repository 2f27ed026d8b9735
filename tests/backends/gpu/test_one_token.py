"""One token without gradients on a real GPU: right wherever its experts are, and without a wait for those there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kt_hf.backends import ExpertWeights
from kt_hf.backends.gpu.pinned_weights import HostWeights
from kt_hf.backends.gpu.resident import GroupedBackend
from kt_hf.backends.gpu.streamed import StreamedBackend
from kt_hf.backends.gpu.weight_stream import Streamer
from tests.backends.test_one_token_on_gpu import (
    CHOICES,
    ONE,
    SHAPE,
    E,
    H,
    I,
    K,
    inputs,
    lora_of,
    plain_weights,
    reference,
)
from tests.support.packed import KINDS, random_experts
from tests.support.reference import assert_close


def made(kind: str, place: str) -> tuple[Any, ExpertWeights]:
    """A layer on the GPU or streamed to it, and its weights in bf16 on the CPU."""
    streamer = Streamer(torch.device("cuda"), 4 * ONE)
    if kind == "bf16":
        wide = plain_weights()
        if place == "resident":
            return GroupedBackend(ExpertWeights(wide.gate_up.cuda(), wide.down.cuda()), SHAPE), wide
        return StreamedBackend(HostWeights.copied(wide, range(E)), SHAPE, streamer), wide
    low = random_experts(kind, E, H, I)
    wide = ExpertWeights(low.gate_up.dequantized(torch.bfloat16), low.down.dequantized(torch.bfloat16))
    host = HostWeights.on_gpu(low, streamer.device) if place == "resident" else HostWeights.of_packed(low)
    return StreamedBackend(host, SHAPE, streamer), wide


@pytest.mark.parametrize("place", ["resident", "streamed"])
@pytest.mark.parametrize("kind", ["bf16", *KINDS])
def test_it_is_right(kind: str, place: str) -> None:
    """Token after token, through the same few buffers."""
    one, wide = made(kind, place)
    for rank in (0, 8):
        lora = lora_of(rank)
        one.set_lora(tuple(tensor.cuda() for tensor in lora))
        results = []
        for seed in range(8):
            x = inputs(CHOICES[seed % len(CHOICES)], seed)
            results.append((one.forward(*(t.cuda() for t in x), save=False)[0], reference(wide, lora, *x)))
        for out, expected in results:
            assert_close(out.cpu(), expected.float(), 2e-2, f"{kind}, {place}")


@pytest.mark.parametrize("kind", ["bf16", "int4"])
def test_a_resident_layer_waits_for_nothing(kind: str) -> None:
    one, _ = made(kind, "resident")
    one.set_lora(tuple(tensor.cuda() for tensor in lora_of(8)))
    x = [t.cuda() for t in inputs(CHOICES[0])]
    assert len(x[1][0]) == K
    one.forward(*x, save=False)  # compiles
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        one.forward(*x, save=False)
    finally:
        torch.cuda.set_sync_debug_mode(before)
