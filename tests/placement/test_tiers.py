"""Numbers of experts by tier, and which layers are resident whole."""

from __future__ import annotations

import itertools

import pytest

from kt_hf.config import KTConfig
from kt_hf.placement.tiers import Tiers, asked_for, order_matters, problem, spread
from kt_hf.shapes import ExpertShape

SHAPES = [ExpertShape(8, 2, 64, 32)] * 4


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 12, 26, 48, 61, 94])
def test_layers_are_spread_evenly_however_many_there_are(layers: int) -> None:
    order = spread(layers, layers)
    assert sorted(order) == list(range(layers))
    for count in range(layers + 1):
        assert spread(count, layers) == order[:count], "a layer more, or a layer less, moves no other"
        edges = [-1, *sorted(order[:count]), layers]
        gaps = [after - before - 1 for before, after in itertools.pairwise(edges)]
        assert max(gaps) <= 2 * min(gaps) + 2
    assert spread(layers + 5, layers) == order


def test_whole_layers_in_words_and_in_the_settings() -> None:
    tiers = Tiers(0, 8, 3)
    assert tiers.need_gpu
    assert Tiers(resident_layers=1).need_gpu
    assert not Tiers().need_gpu
    assert (tiers.on_gpu, tiers.on_cpu(8)) == (8, 0), "of the other layers"
    assert str(tiers) == "3 whole layers on the GPU; of each other layer 0 experts on the GPU, 8 streamed to it"
    assert str(Tiers(2, 3)) == "2 experts of each layer on the GPU, 3 streamed to it"
    too_many = problem(Tiers(0, 8, 5), KTConfig(kt_expert_placement="gpu"), SHAPES, True)
    assert too_many
    assert "the model has 4 layers of experts. Set resident_layers to 4 or less" in too_many
    assert asked_for(KTConfig(kt_expert_placement={"streamed": 8}), SHAPES, True) == Tiers(0, 8)
    assert order_matters(KTConfig(kt_expert_placement={"streamed": 8}))
    assert not order_matters(KTConfig(kt_expert_placement={"resident": 0}))
