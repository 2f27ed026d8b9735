"""`torch_compile` in kt-hf train: what is around the experts is compiled, under gradient checkpointing too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from kt_hf import KTConfig, apply_kt_moe
from kt_hf.train.compiled import asked, compile_around_experts, without
from tests.support.models import FAMILIES
from tests.support.tiny import trained


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("options", "how"),
    [
        ({}, None),
        ({"torch_compile": False}, None),
        ({"torch_compile": True}, {}),
        ({"torch_compile_backend": "aot_eager"}, {"backend": "aot_eager"}),
        ({"torch_compile": True, "torch_compile_mode": "default"}, {"mode": "default"}),
    ],
)
def test_what_is_asked(options: dict[str, Any], how: dict[str, Any] | None) -> None:
    """As the Trainer's arguments understand it, which get none of it then."""
    assert asked(options) == how
    assert without(options | {"bf16": True}) == {"bf16": True}


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "qwen2_moe"])
def test_which_modules(name: str) -> None:
    """Attention, norms and the MLP of a layer without experts; the block of experts with its router is left alone."""
    model: Any = apply_kt_moe(FAMILIES[name](torch.float32), KTConfig(kt_backend="torch"))
    count = compile_around_experts(model, backend="eager")
    layers = model.model.layers
    compiled = {n for n, m in model.named_modules() if m._compiled_call_impl is not None}
    assert len(compiled) == count
    for i, layer in enumerate(layers):
        expected = {f"model.layers.{i}.{child}" for child, _ in layer.named_children()}
        blocks = {n for n in expected if any(w.label.startswith(f"{n}.") for w in model._kt_wrappers)}
        assert len(blocks) == (i in FAMILIES[name].moe_layers)
        assert {n for n in compiled if n.startswith(f"model.layers.{i}.")} == expected - blocks
        assert f"model.layers.{i}.self_attn" in compiled


@pytest.mark.slow
def test_a_run_is_the_same(tiny_model: Path, tmp_path: Path) -> None:
    """Graphs of attention and norms, with checkpointing; losses and adapter as without, and nothing of it in names."""
    rows, found = [{"text": f"Story {number} goes on."} for number in range(8)], []
    both: tuple[tuple[str, tuple[str, ...]], ...] = (("plain", ()), ("compiled", ("torch_compile_backend=aot_eager",)))
    for folder, overrides in both:
        counters.clear()
        (tmp_path / folder).mkdir()
        summary, _ = trained(
            tmp_path / folder, tiny_model, rows, "max_steps=4", "activation_checkpointing=true", *overrides
        )
        found.append((summary["loss"], counters["stats"]["unique_graphs"]))
    (plain, none), (compiled, graphs) = found
    assert none == 0
    assert graphs >= 2
    assert compiled == pytest.approx(plain, rel=2e-3)


@pytest.mark.slow
def test_layers_share_their_graphs() -> None:
    """Four layers have as many graphs as two, and another length makes them dynamic once."""
    counts = []
    for layers in (2, 4):
        torch._dynamo.reset()
        family = FAMILIES["mixtral"]
        config = family.make_config()
        config.num_hidden_layers = layers
        model: Any = apply_kt_moe(family.model_class(config), KTConfig(kt_backend="torch"))
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        backend = CompileCounterWithBackend("aot_eager")
        compile_around_experts(model, backend=backend)
        for length in (7, 9, 11):
            ids = family.inputs(2, length)
            model.get_input_embeddings().requires_grad_(True)
            model(input_ids=ids, labels=ids).loss.backward()
        counts.append(backend.frame_count)
    assert 2 <= counts[0] == counts[1] <= 6
