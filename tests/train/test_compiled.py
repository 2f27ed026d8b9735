"""`torch_compile` in kt-hf train: what is around the experts is compiled, under gradient checkpointing too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from kt_hf import KTConfig, apply_kt_moe
from kt_hf.train import run as run_module
from kt_hf.train.compiled import asked, compile_around_experts, compile_left_out, compile_problems, without
from kt_hf.train.config.read import read_arguments
from tests.support.models import FAMILIES
from tests.support.reference import assert_all_close
from tests.support.tiny import trained, write_yaml


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
        ({"torch_compile_backend": "AOT_EAGER"}, {"backend": "aot_eager"}),
        ({"torch_compile_backend": "no"}, None),
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


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"torch_compile_mode": "reduce-overhead"}, "torch_compile_mode"),
        ({"torch_compile_mode": "foo"}, "torch_compile_mode"),
        ({"torch_compile_backend": "cudagraphs"}, "torch_compile_backend"),
        ({"torch_compile_backend": "foo"}, "torch_compile_backend"),
        ({"torch_compile_backend": "aot_eager", "torch_compile_mode": "default"}, None),
        ({"torch_compile": True}, None),
    ],
)
def test_what_cannot_be_done(options: dict[str, Any], key: str | None) -> None:
    found = list(compile_problems(options))
    assert [name for name, _ in found] == ([key] if key else [])
    assert all(str(options[name]) in text and "leave it out" in text for name, text in found)


class Parted(nn.Module):
    """A decoder layer whose norms are in a list, and whose layers may be in a dictionary."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(4), nn.LayerNorm(4)])
        self.block = nn.ModuleDict({"experts": experts, "shared": nn.Linear(4, 4)})


@pytest.mark.parametrize(
    "held", [nn.ModuleList, lambda layers: nn.ModuleDict({str(i): m for i, m in enumerate(layers)})]
)
def test_members_of_lists_are_called_and_lists_are_not(held: Any) -> None:
    experts = apply_kt_moe(FAMILIES["mixtral"](torch.float32), KTConfig(kt_backend="torch"))._kt_wrappers
    model = nn.Module()
    model.layers = held([Parted(one) for one in experts])
    count = compile_around_experts(model, backend="eager")
    compiled = {name for name, module in model.named_modules() if module._compiled_call_impl is not None}
    parts = ("norms.0", "norms.1", "block.shared")
    assert compiled == {f"layers.{i}.{part}" for i in range(len(experts)) for part in parts}
    assert count == len(compiled)


@pytest.mark.slow
def test_a_run_is_the_same(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs of attention and norms, with checkpointing; loss and adapter as without, and nothing of it in names."""
    rows, found = [{"text": f"Story {number} goes on."} for number in range(8)], []
    compile_them = run_module.compile_around_experts

    def counted(model: Any, **how: Any) -> int:
        counters.clear()  # of the step that was tried before
        return compile_them(model, **how)

    monkeypatch.setattr(run_module, "compile_around_experts", counted)
    for folder, overrides in (("plain", ()), ("compiled", ("torch_compile_backend=aot_eager",))):
        (tmp_path / folder).mkdir()
        counters.clear()
        four = "max_steps=4", "activation_checkpointing=true", *overrides
        summary, text = trained(tmp_path / folder, tiny_model, rows, *four)
        adapter = load_file(tmp_path / folder / "out/adapter_model.safetensors")
        found.append((summary["loss"], counters["stats"]["unique_graphs"], adapter, "torch_compile: " in text))
    (plain, none, expected, silent), (compiled, graphs, actual, told) = found
    assert (none, silent, told) == (0, False, True)
    assert graphs >= 2
    assert compiled == pytest.approx(plain, rel=2e-3)
    assert set(actual) == set(expected)
    assert_all_close(actual, expected, 0.05)


@pytest.mark.parametrize(("stage", "left_out"), [("grpo", True), ("dpo", False)])
def test_where_answers_are_generated_it_is_left_out(stage: str, left_out: bool, tmp_path: Path) -> None:
    more: dict[str, Any] = {"reward_funcs": "x:y"} if left_out else {}
    file = write_yaml(
        tmp_path / "run.yaml", model_name_or_path="builtin:smollm2-moe", stage=stage, torch_compile=True,
        output_dir=str(tmp_path / "out"), **more,
    )  # fmt: skip
    settings = read_arguments(file, purpose="estimate")
    assert ("torch_compile" not in settings.trainer) == left_out
    assert any("torch_compile is left out" in note for note in settings.notices) == left_out
    assert compile_left_out({"bf16": True}, stage) == []


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
