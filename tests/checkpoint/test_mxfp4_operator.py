"""A checkpoint in MXFP4 on kt-kernel's operators for it: loaded as it is stored, and computed as its weights say."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from transformers import AutoConfig

from kt_hf import KTConfig, load_kt_model
from kt_hf.checkpoint import ExpertCheckpoint
from tests.support.cases import KERNEL_MISSING
from tests.support.low_bit_files import FAMILY, WAYS, stored
from tests.support.low_bit_operator import missing
from tests.support.patched import fill_lora, gradients_of, logits_of, lora_config, loss_of
from tests.support.reference import relative_error

needs_mxfp4 = pytest.mark.skipif(missing("MXFP4") is not None, reason=str(missing("MXFP4")))
avx2_alone = pytest.mark.skipif(KERNEL_MISSING is None, reason="auto takes operators of bf16 there")
IN_MXFP4 = ["mxfp4 deepseek", pytest.param("mxfp4 compressed", marks=pytest.mark.slow)]
MIXED: dict[str, Callable[[str], bool]] = {
    "a layer": lambda name: "layers.2." in name,
    "an expert": lambda name: ".experts.3." in name,
    "a projection of all": lambda name: ".experts." in name and "down_proj" in name,
}


def loaded(folder: Path, backend: str, tokens: int | None = 64) -> Any:
    config = KTConfig(kt_backend=backend, kt_lora_rank=8, kt_num_threads=1)
    return load_kt_model(folder, config, dtype=torch.bfloat16, tokens_per_step=tokens)


def backends(model: Any) -> set[str]:
    return {layer.backend.name for layer in model._kt_wrappers}


def route_alike(model: Any) -> None:
    """Routers choose by token and layer alone: a choice that rounding turns is more than all of the operators' own."""

    def chosen(layer: int) -> Any:
        def hook(_: Any, __: Any, out: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
            logits, weights, ids = out
            drawn = torch.rand(logits.shape, generator=torch.Generator().manual_seed(layer))
            scores, ids = drawn.topk(ids.shape[1], dim=-1)
            return logits, (scores / scores.sum(-1, keepdim=True)).to(weights.dtype), ids

        return hook

    routers = [module for module in model.modules() if type(module).__name__.endswith("TopKRouter")]
    assert routers
    for layer, router in enumerate(routers):
        router.register_forward_hook(chosen(layer))


def results(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits with an adapter, and all its gradients."""
    route_alike(model)
    model = get_peft_model(model, lora_config(FAMILY))
    fill_lora(model, 3)
    return logits_of(model, FAMILY.inputs()), gradients_of(model, loss_of(model, FAMILY.inputs()))


@needs_mxfp4
@pytest.mark.parametrize("way", IN_MXFP4)
def test_computed_as_stored(way: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Beside PyTorch on the same checkpoint: nothing is rounded, the base is the same to an adapter's manifest."""
    low, _ = stored(WAYS[way], tmp_path)
    with caplog.at_level(logging.WARNING):
        model = loaded(low, "MXFP4")
    assert "rounds" not in caplog.text
    assert backends(model) == {"MXFP4"}
    expected = loaded(low, "torch")
    for one, other in zip(model._kt_wrappers, expected._kt_wrappers, strict=True):
        assert torch.equal(one.base_fingerprint, other.base_fingerprint)
    (logits, grads), (wanted, wanted_grads) = results(model), results(expected)
    assert relative_error(logits, wanted) < 0.02
    assert grads.keys() == wanted_grads.keys()
    for name, grad in grads.items():
        assert relative_error(grad, wanted_grads[name]) < 0.05, name


@needs_mxfp4
@avx2_alone
def test_auto_takes_it_for_short_steps(tmp_path: Path) -> None:
    low, _ = stored(WAYS["mxfp4 deepseek"], tmp_path)
    each = FAMILY.num_experts / AutoConfig.from_pretrained(low).num_experts_per_tok
    for tokens, backend in ((int(128 * each), "MXFP4"), (int(129 * each), "torch"), (None, "torch")):
        assert backends(loaded(low, "auto", tokens)) == {backend}


@pytest.mark.parametrize("what", MIXED)
def test_mixed_checkpoints_are_not_rounded(what: str, tmp_path: Path) -> None:
    """`auto` takes the operators only where every expert is in MXFP4, for they would round the others."""
    low, plain = stored(WAYS["mxfp4 deepseek"], tmp_path, keep=MIXED[what])
    assert ExpertCheckpoint(low, AutoConfig.from_pretrained(low)).stored() == []
    model, expected = loaded(low, "auto"), loaded(plain, "auto")
    assert backends(model) == backends(expected)
    if what == "an expert":  # the others are the same test
        assert torch.equal(results(model)[0], results(expected)[0])
