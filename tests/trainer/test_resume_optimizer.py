"""A resumed run's optimizer goes on with the saved moments, however AdamW is computed before and after."""

from __future__ import annotations

from pathlib import Path

import pytest

from kt_hf.train.resume import KeepRecord
from tests.support.cases import TORCH_BF16
from tests.support.resumed import resumed_like_uninterrupted
from tests.support.trainers import model_to_train


@pytest.mark.parametrize(("before", "after"), [("fused", "plain"), ("foreach", "fused")])
def test_another_adamw(before: str, after: str, tmp_path: Path) -> None:
    """With the callback of `kt-hf train`, which has it computed as the settings of now say."""

    def model() -> object:
        return model_to_train(TORCH_BF16)

    seen = resumed_like_uninterrupted(model, model, (before, after), tmp_path, (KeepRecord({}),))
    assert seen.fused == {after == "fused"}, "it computes as the checkpoint's did"
