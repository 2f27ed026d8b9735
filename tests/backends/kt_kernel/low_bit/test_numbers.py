"""How far INT8 and INT4 are from the original weights, on layers of real sizes and in training."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.quantized import errors_of, normal, random_layer, real_layers
from kt_hf.builtin import smollm2_moe as upcycle
from tests.support.cases import KERNEL_BF16, KERNEL_MARKS, Case
from tests.support.low_bit import INT4, INT8, wide
from tests.support.patched import adapted_model
from tests.support.trl_runs import logged, sft

pytestmark = list(KERNEL_MARKS)

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec(upcycle.GGUF_PACKAGE) is None, reason=f"needs {upcycle.INSTALL_HINT}"
)
LAYERS = [0, 3]


@pytest.mark.parametrize("shape", [(16, 4, 512, 384), (8, 2, 576, 1536), (4, 2, 2048, 1408)], ids=str)
def test_int8_of_random_layers(shape: tuple[int, int, int, int]) -> None:
    """The routing weights' gradients are products of two sums with errors: a little above the rest."""
    found = errors_of("AMXInt8", *random_layer(*shape, tokens=64))
    assert found.pop("weights") < 0.035
    assert max(found.values()) < 0.03, found


@pytest.mark.parametrize("shape", [(16, 4, 512, 384), (4, 2, 2048, 1408)], ids=str)
def test_int4_of_random_layers(shape: tuple[int, int, int, int]) -> None:
    found = errors_of("AMXInt4", *random_layer(*shape, tokens=64))
    assert max(found.values()) < 0.35, found
    assert min(found.values()) > 0.05, "this is not INT4"


@pytest.fixture(scope="module")
def layers() -> dict[int, Any]:
    return real_layers(LAYERS)


@needs_smollm2
@pytest.mark.parametrize("index", LAYERS)
def test_int8_of_real_layers(layers: dict[int, Any], index: int) -> None:
    """A real text's hidden states have a few channels far above the rest: twice the error of random ones."""
    found = errors_of("AMXInt8", *normal(layers[index]))
    assert max(found.values()) < 0.03, found
    found = errors_of("AMXInt8", *layers[index])
    assert max(found.values()) < 0.08, found
    assert found["output"] < 0.06
    assert max(errors_of("AMXBF16", *layers[index]).values()) < 0.01


def losses(case: Case, folder: Path, tokenizer: Any) -> list[float]:
    """Of 30 steps of TRL's SFTTrainer, with the same start."""
    model = adapted_model(wide(), case, seed=1)
    return logged(sft(model, folder, tokenizer, max_steps=30, learning_rate=3e-4))


def test_sft_in_int8_is_sft_in_bf16(tokenizer: Any, tmp_path: Path) -> None:
    bf16, int8 = (losses(case, tmp_path, tokenizer) for case in (KERNEL_BF16, INT8))
    assert bf16[-1] < bf16[0] - 0.5
    assert abs(int8[-1] - bf16[-1]) < 0.03, (bf16, int8)


def test_sft_in_int4_learns(tokenizer: Any, tmp_path: Path) -> None:
    found = losses(INT4, tmp_path, tokenizer)
    assert all(torch.isfinite(torch.tensor(found)))
    assert found[-1] < found[0] - 0.5, found
