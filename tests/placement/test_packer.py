"""When a layer is packed, with what, and how the memory decides whether backward weights are shared."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from peft import get_peft_model

from kt_hf import KTAMXConfigError, KTConfig, apply_kt_moe
from kt_hf.backends import ExpertWeights, TorchBackend
from kt_hf.backends.kt_kernel import operators
from kt_hf.placement import backward_copies
from kt_hf.placement import packer as packing
from kt_hf.placement.backward_copies import share_backward
from kt_hf.placement.packer import DEFAULT_MAX_LEN, Packer
from kt_hf.placement.tiers import Tiers
from kt_hf.shapes import ExpertShape, expert_bytes
from kt_hf.system.cpu import ThreadPlan
from kt_hf.system.memory import available_memory
from tests.support.cases import KERNEL_BF16, KERNEL_MARKS, Case, make_config
from tests.support.helpers import MIXTRAL
from tests.support.machine import write
from tests.support.patched import adapted_model, fill_lora, logits_of, lora_config, patched_model

GIB = 2**30
NO_WEIGHTS = ExpertWeights(torch.empty(0), torch.empty(0))
PLAN = ThreadPlan(((0, 1),))
GROUP = "sys/fs/cgroup/job"


SHAPE = ExpertShape(8, 2, 64, 96)


def packer(backend: str = "AMXBF16", expert_gib: float = 10, **config: Any) -> Packer:
    return Packer(KTConfig(**config), backend, "a test", PLAN, int(expert_gib * GIB), gpu=torch.device("cpu"))


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The settings each layer was packed with; nothing is built, and no operators are needed."""
    seen: list[dict[str, Any]] = []

    def pack(name: str, weights: Any, shape: Any, rank: int, plan: Any, max_len: int, share: bool, **rest: Any) -> Any:
        seen.append({"name": name, "rank": rank, "plan": plan, "max_len": max_len, "share_backward": share, **rest})
        return SimpleNamespace(name=name)

    monkeypatch.setattr(packing, "build_backend", pack)
    return seen


@pytest.mark.parametrize(
    ("expert_gib", "free_gib", "share"), [(10, 20, False), (10, 12.6, False), (10, 12.4, True), (10, 1, True)]
)
def test_backward_weights_are_shared_by_need(
    monkeypatch: pytest.MonkeyPatch, packed: list[dict[str, Any]], expert_gib: float, free_gib: float, share: bool
) -> None:
    """They cost the experts' size once more, and something must be left."""
    monkeypatch.setattr(backward_copies, "available_memory", lambda: int(free_gib * GIB))
    packer(expert_gib=expert_gib).build(NO_WEIGHTS, SHAPE, 8, "layer")
    assert packed[0]["share_backward"] is share


@pytest.mark.parametrize(("sizes_free", "share"), [(13.1, False), (12.9, True)])
def test_streamed_experts_take_host_memory_too(
    monkeypatch: pytest.MonkeyPatch, packed: list[dict[str, Any]], sizes_free: float, share: bool
) -> None:
    """Of 8 experts 4 are streamed while the model is read: 4 to pack, 4 to keep, 4 again if not shared."""
    shape, one = ExpertShape(8, 2, 4096, 4096), packer()
    one.streamed, one.tiers = True, Tiers(0, 4)
    one.place({0: shape}, None)
    assert one.cpu_bytes == 4 * expert_bytes(shape)
    monkeypatch.setattr(backward_copies, "available_memory", lambda: int(sizes_free * expert_bytes(shape)))
    assert share_backward(one.config, one.backend, None, one.cpu_bytes, -one._locked_bytes) is share


# A copy of what is packed is 1, 1/2 or 1/4 of the bf16 weights, which are let go as they are packed, unless streamed.
@pytest.mark.parametrize(
    ("backend", "streamed", "free_gib", "share"),
    [
        ("AMXBF16", True, 22.6, False), ("AMXBF16", True, 22.4, True),
        ("AMXInt8", False, 1.3, False), ("AMXInt8", False, 1.2, True),
        ("AMXInt8", True, 11.3, False), ("AMXInt8", True, 11.2, True),
        ("AMXInt4", False, 0.1, False), ("AMXInt4", True, 5.7, False), ("AMXInt4", True, 5.6, True),
    ],
)  # fmt: skip
def test_need_is_that_of_the_arithmetic_and_is_told(
    monkeypatch: pytest.MonkeyPatch, packed: list[dict[str, Any]], caplog: pytest.LogCaptureFixture,
    backend: str, streamed: bool, free_gib: float, share: bool,
) -> None:  # fmt: skip
    monkeypatch.setattr(backward_copies, "available_memory", lambda: int(free_gib * GIB))
    monkeypatch.setattr(packing, "return_freed_memory", lambda: None)
    one = packer(backend)
    one.streamed = streamed
    with caplog.at_level("INFO", "kt_hf"):
        one.build(NO_WEIGHTS, SHAPE, 8, "layer")
    assert packed[0]["share_backward"] is share
    copy = 10 * {"AMXBF16": 1, "AMXInt8": 0.5, "AMXInt4": 0.25}[backend]
    told = "one buffer for all layers, slower" if share else "one copy a layer"
    assert f"Backward weights of the experts: {told} ({copy:.1f} GiB more, " in caplog.text


def test_saved_weights_without_those_for_backward_are_always_shared(
    packed: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    one = packer("AMXInt8", expert_gib=0.001)
    one.saved = SimpleNamespace(backward=False, path="saved")
    with caplog.at_level("INFO", "kt_hf"):
        one.build(NO_WEIGHTS, SHAPE, 0, "layer")
    assert packed[0]["share_backward"] is True
    assert "one buffer for all layers, for saved has none" in caplog.text


def test_memory_is_asked_once(monkeypatch: pytest.MonkeyPatch, packed: list[dict[str, Any]]) -> None:
    """Later layers find less memory free, and a pool of half the layers would be worth nothing."""
    free = iter([100 * GIB, 1])
    monkeypatch.setattr(backward_copies, "available_memory", lambda: next(free))
    one = packer()
    for _ in range(3):
        one.build(NO_WEIGHTS, SHAPE, 8, "layer")
    assert [call["share_backward"] for call in packed] == [False] * 3


@pytest.mark.parametrize("share", [True, False])
def test_backward_weights_are_shared_as_asked(packed: list[dict[str, Any]], share: bool) -> None:
    packer(expert_gib=0.001 if share else 10_000, kt_share_backward_weights=share).build(NO_WEIGHTS, SHAPE, 8, "layer")
    assert packed[0]["share_backward"] is share


def test_settings_reach_the_backend(packed: list[dict[str, Any]]) -> None:
    one = packer(kt_max_len=99, kt_expert_activations="recompute", kt_share_backward_weights=True)
    told: list[Any] = []
    one.on_build = told.append
    built = one.build(NO_WEIGHTS, SHAPE, 4, "layer 7")
    expected = {"name": "AMXBF16", "rank": 4, "plan": PLAN, "max_len": 99, "label": "layer 7"}
    assert packed == [{**expected, "share_backward": True, "share_cache": True}]
    assert told == [built]
    packer(kt_share_backward_weights=False).build(NO_WEIGHTS, SHAPE, 4, "layer 7")
    assert packed[1] == {**expected, "max_len": DEFAULT_MAX_LEN, "share_backward": False, "share_cache": False}


def test_buffers_of_the_longest_call_fit_the_machine(
    packed: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSeek-V3's layer with room for 32,768 tokens hung on a machine of 24 GiB, in the operators' constructor."""
    monkeypatch.setattr(operators.psutil, "virtual_memory", lambda: SimpleNamespace(total=24 * GIB))
    one = packer(kt_share_backward_weights=False)
    for shape in (SHAPE, ExpertShape(256, 8, 7168, 2048)):
        one.build(NO_WEIGHTS, shape, 4, "layer")
    assert packed[0]["max_len"] == DEFAULT_MAX_LEN
    assert 8_192 < packed[1]["max_len"] < 24_000


def test_torch_packs_without_a_copy() -> None:
    weights = ExpertWeights(torch.randn(4, 12, 8), torch.randn(4, 8, 6))
    backend = packer("torch").build(weights, ExpertShape(4, 2, 8, 6), 8, "layer")
    assert isinstance(backend, TorchBackend)
    assert backend.weights.gate_up is weights.gate_up
    assert backend.weights.down is weights.down


@pytest.fixture
def system_memory(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=50 * GIB))
    return 50 * GIB


@pytest.mark.parametrize(
    ("limit", "used", "free"),
    [("max", 3 * GIB, 50 * GIB), (20 * GIB, 3 * GIB, 17 * GIB), (99 * GIB, 3 * GIB, 50 * GIB), (GIB, 3 * GIB, 0)],
)
def test_memory_of_the_control_group(tmp_path: Path, system_memory: int, limit: Any, used: int, free: int) -> None:
    root = write(
        tmp_path,
        {"proc/self/cgroup": "0::/job", f"{GROUP}/memory.max": limit, f"{GROUP}/memory.current": used},
    )
    assert available_memory(root) == free


@pytest.mark.parametrize("groups", [None, "4:memory:/job", "0::/elsewhere"], ids=["no cgroup", "v1", "no files"])
def test_memory_without_a_limit(tmp_path: Path, system_memory: int, groups: str | None) -> None:
    root = write(tmp_path, {} if groups is None else {"proc/self/cgroup": groups})
    assert available_memory(root) == system_memory


def test_memory_limit_of_the_parent_group(tmp_path: Path, system_memory: int) -> None:
    """A pod limits its containers' group, which says max itself."""
    files = {
        "proc/self/cgroup": "0::/pod/box",
        "sys/fs/cgroup/pod/memory.max": 8 * GIB,
        "sys/fs/cgroup/pod/memory.current": 2 * GIB,
        "sys/fs/cgroup/pod/box/memory.max": "max",
        "sys/fs/cgroup/pod/box/memory.current": 2 * GIB,
    }
    assert available_memory(write(tmp_path, files)) == 6 * GIB


def test_packed_when_the_rank_is_known(case: Case) -> None:
    model = patched_model(MIXTRAL, case)
    assert not any(layer.packed for layer in model._kt_wrappers)
    model = get_peft_model(model, lora_config(MIXTRAL, target_modules=list(MIXTRAL.attention)))
    logits_of(model, MIXTRAL.inputs())
    assert not any(layer.packed for layer in model._kt_wrappers), "attention's rank is not the experts'"
    model.add_adapter("experts", lora_config(MIXTRAL))
    assert all(layer.packed for layer in model._kt_wrappers)
    assert {layer.backend_name for layer in model._kt_wrappers} == {case.backend}


@pytest.mark.parametrize("rank", [0, 4])
def test_packed_at_once_with_a_rank_given(case: Case, rank: int) -> None:
    model = patched_model(MIXTRAL, case, kt_lora_rank=rank)
    assert all(layer.packed for layer in model._kt_wrappers)
    assert {layer._runner.backend.max_rank for layer in model._kt_wrappers} == {rank if case is KERNEL_BF16 else None}


def test_engine_of_the_model(case: Case) -> None:
    model = patched_model(MIXTRAL, case)
    assert model._kt_cpu_infer is None
    model = get_peft_model(model, lora_config(MIXTRAL))
    assert (model._kt_cpu_infer is not None) == (case is KERNEL_BF16)


def test_larger_rank_than_packed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the operators would; theirs are stood in for."""
    model = patched_model(MIXTRAL, Case("torch", torch.float32, 0, 0, 0), kt_lora_rank=4)
    for layer in model._kt_wrappers:
        layer.factory.backend = "AMXBF16"
        monkeypatch.setattr(layer._runner.backend, "max_rank", 4)
    with pytest.raises(KTAMXConfigError, match=r"layers\.0\.mlp\.experts.*rank 8.*the 4 .*kt_lora_rank=8"):
        get_peft_model(model, lora_config(MIXTRAL))


@pytest.mark.parametrize("mark", [pytest.param(None, marks=KERNEL_MARKS, id="kernel")])
@pytest.mark.parametrize("first", [{"kt_lora_rank": 4}, {}], ids=["by config", "by the first adapter"])
def test_larger_rank_than_the_operators_were_built_for_is_refused(mark: None, first: dict[str, int]) -> None:
    model = patched_model(MIXTRAL, KERNEL_BF16, **first)
    model = get_peft_model(model, lora_config(MIXTRAL, r=4))
    with pytest.raises(KTAMXConfigError, match=r"layers\.0\.mlp\.experts.*rank 8.*the 4 .*kt_lora_rank=8"):
        model.add_adapter("larger", lora_config(MIXTRAL, r=8))


def test_smaller_ranks_are_padded(case: Case) -> None:
    """An adapter of rank 4 computes the same on experts packed for 16 as on those packed for 4."""
    ids = MIXTRAL.inputs()
    logits = []
    for rank in (4, 16):
        model = apply_kt_moe(MIXTRAL(case.dtype), make_config(case.backend, kt_lora_rank=rank))
        model = get_peft_model(model, lora_config(MIXTRAL, r=4))
        fill_lora(model, seed=1)
        logits.append(logits_of(model, ids))
    assert torch.equal(*logits)
    assert not torch.equal(logits[0], logits_of(adapted_model(MIXTRAL, case), ids))
