"""`auto` in runs, the CPU in the GPU's place with memory by script: layers come, go in time, and change no result."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from kt_hf import KTAMXConfigError, KTAMXError, KTConfig, apply_kt_moe, load_kt_model
from kt_hf.backends.gpu.pinned_weights import lock_pages
from kt_hf.backends.gpu.resident import GroupedBackend
from kt_hf.backends.gpu.streamed import StreamedBackend
from kt_hf.placement import packer_of
from kt_hf.placement.record import RUN_PLACEMENT, read_run_placement
from kt_hf.placement.tiers import Tiers, asked_for, is_auto
from tests.support.checkpoints import saved
from tests.support.helpers import MIXTRAL
from tests.support.patched import fill_lora, lora_config
from tests.support.trainers import assert_same_run, result, trainer_for

E = MIXTRAL.num_experts
LAYER = 3 * E * MIXTRAL.hidden * MIXTRAL.intermediate * 2  # bytes of a layer's experts
REST = 10 * LAYER  # what everything else takes


class Scripted:
    """A device of which a test says how much can be allocated: passes take `REST`."""

    limit_bytes = 100 * LAYER
    resets = 0

    def __init__(self, _: Any) -> None:
        self.promotion: Any = None

    def allocated(self) -> int:
        return REST + (len(self.promotion.held) * LAYER if self.promotion else 0)

    peak = allocated

    def reset_peak(self) -> None:
        Scripted.resets += 1

    def trim(self) -> None:
        pass

    def limit(self) -> int:
        return Scripted.limit_bytes


@pytest.fixture(autouse=True)
def roomy(monkeypatch: pytest.MonkeyPatch, cpu_for_gpu: None) -> None:
    """Room for all layers; and a CPU that is not worth measuring."""
    monkeypatch.setattr("kt_hf.placement.promotion.DeviceMemory", Scripted)
    monkeypatch.setattr("kt_hf.placement.choice.copy_rate", lambda _: 1e12)
    monkeypatch.setattr(Scripted, "limit_bytes", 100 * LAYER)


def model(seed: int = 1, **config: Any) -> PeftModel:
    """With nothing set, unless a test does."""
    patched = get_peft_model(apply_kt_moe(MIXTRAL(torch.bfloat16), KTConfig(**config)), lora_config(MIXTRAL))
    fill_lora(patched, seed)
    packer = packer_of(patched)
    assert packer is not None
    if packer.promotion is not None:
        packer.promotion._memory.promotion = packer.promotion  # type: ignore[attr-defined]
    return patched


def held(patched: Any) -> list[int]:
    packer = packer_of(patched)
    assert packer is not None
    assert packer.promotion is not None
    return packer.promotion.held


def steps(patched: Any, count: int, optimizer: torch.optim.Optimizer | None = None) -> tuple[list[Tensor], Any]:
    """Losses of training steps; and the optimizer."""
    trained = [p for p in patched.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(trained, lr=0.01)
    losses = []
    patched.train()
    for i in range(count):
        ids = MIXTRAL.inputs(2, 12, seed=i)
        loss = patched(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses, optimizer


def test_nothing_set_streams_and_moves_layers_without_a_trace_in_the_results(caplog: pytest.LogCaptureFixture) -> None:
    auto, streamed = model(), model(kt_expert_placement={"streamed": E})
    assert all(isinstance(layer.backend, StreamedBackend) for layer in auto._kt_wrappers)
    losses, optimizer = steps(auto, 2)
    assert held(auto) == []
    with caplog.at_level(logging.INFO, "kt_hf"):
        more, _ = steps(auto, 3, optimizer)
    assert held(auto) == [0, 1], "after the second step of the optimizer"
    assert "2 of 2 layers of experts are on the GPU now" in caplog.text
    assert caplog.text.count("a step takes") == 1
    expected, other = steps(streamed, 2)
    expected += steps(streamed, 3, other)[0]
    assert all(torch.equal(a, b) for a, b in zip(losses + more, expected, strict=True))
    names = dict(streamed.named_parameters())
    assert all(torch.equal(p, names[name]) for name, p in auto.named_parameters())


def test_memory_is_given_back_before_what_has_not_been_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    auto = model()
    _, optimizer = steps(auto, 3)
    steps(auto, 1, optimizer)
    assert held(auto) == [0, 1]
    auto.eval()
    with torch.no_grad():
        for expected in ([], [], [0, 1]):
            auto(input_ids=MIXTRAL.inputs(4, 12))
            assert held(auto) == expected
    steps(auto, 1, optimizer)
    assert held(auto) == [0, 1]
    Scripted.limit_bytes = int((REST + 1.5 * LAYER) / 0.93)
    steps(auto, 1, optimizer)
    assert held(auto) == [1], "another process takes memory"
    Scripted.limit_bytes = 100 * LAYER
    steps(auto, 1, optimizer)
    assert held(auto) == [0, 1]
    steps(auto, 1)
    assert held(auto) == [], "another optimizer makes its state"
    auto.add_adapter("wide", lora_config(MIXTRAL, r=24))
    _, optimizer = steps(auto, 3)
    steps(auto, 1, optimizer)
    assert held(auto) == [0, 1]
    auto.set_adapter("wide")
    steps(auto, 1, optimizer)
    assert held(auto) == []


def test_a_gpu_without_the_room_after_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """What others take between the look and the copy: fewer layers, no error."""
    auto = model()
    _, optimizer = steps(auto, 2)
    first, empty = auto._kt_wrappers[1].backend.weights, torch.empty

    def scarce(*size: Any, **kwargs: Any) -> Tensor:
        if size == (first.gate_up.shape,) and first.resident is not None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return empty(*size, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr("kt_hf.backends.gpu.pinned_weights.torch.empty", scarce)
        steps(auto, 1, optimizer)
    assert held(auto) == [], "one fits, and leaves room for what else is allocated"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, None),
        ({"kt_num_gpu_experts": None}, None),
        ({"kt_expert_placement": "auto", "kt_backend": "AMXBF16"}, None),
        ({"kt_num_gpu_experts": 0}, Tiers()),
        ({"kt_backend": "AMXBF16"}, Tiers()),
        ({"kt_backend": "torch"}, Tiers()),
        ({"kt_expert_placement": "cpu"}, Tiers()),
        ({"kt_weight_path": "saved"}, Tiers()),
        ({"kt_num_gpu_experts": 3}, Tiers(3)),
        ({"kt_expert_placement": {"resident_layers": 1}}, Tiers(0, E, 1)),
    ],
)
def test_when_auto_is_taken(config: dict[str, Any], expected: Tiers | None) -> None:
    shapes = [packer_shape()] * 2
    assert asked_for(KTConfig(**config), shapes, has_gpu=True) == expected
    assert is_auto(KTConfig(**config)) == (expected is None)
    if expected is None:
        assert asked_for(KTConfig(**config), shapes, has_gpu=False) == Tiers(), "without a GPU as before"


def packer_shape() -> Any:
    from kt_hf.shapes import ExpertShape

    return ExpertShape(E, MIXTRAL.top_k, MIXTRAL.hidden, MIXTRAL.intermediate)


@pytest.mark.parametrize("config", [{"kt_num_gpu_experts": 0}, {"kt_backend": "torch"}])
def test_who_asks_for_the_cpu_gets_it_and_a_hint(
    config: dict[str, Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level(logging.INFO, "kt_hf"):
        patched = apply_kt_moe(MIXTRAL(torch.bfloat16), KTConfig(**config))
    packer = packer_of(patched)
    assert packer is not None
    assert packer.promotion is None
    assert packer.tiers == Tiers()
    ((name, value),) = config.items()
    assert f"{name}={value} computes all experts on the CPU" in caplog.text
    assert "kt_expert_placement: auto does that" in caplog.text


def test_models_that_are_not_streamed_stay_on_the_cpu_with_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "kt_hf"):
        patched = apply_kt_moe(MIXTRAL(torch.float32))
    packer = packer_of(patched)
    assert packer is not None
    assert packer.tiers == Tiers()
    assert "computed on the CPU, though there is a GPU: the model is float32" in caplog.text


def test_refused_page_locks_are_no_error_under_auto(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """At every second layer; who asks for streaming by hand hears of it."""
    calls = []

    def refuse(tensor: Tensor) -> bool:
        calls.append(tensor)
        if len(calls) % 4 in (1, 3):
            raise KTAMXError("locked memory is limited")
        return lock_pages(tensor)

    monkeypatch.setattr("kt_hf.backends.gpu.pinned_weights.lock_pages", refuse)
    with caplog.at_level(logging.WARNING, "kt_hf"):
        losses, _ = steps(model(), 3)
    assert caplog.text.count("not page-locked") == 1
    assert "locked memory is limited" in caplog.text
    calls.clear()
    with pytest.raises(KTAMXError, match="locked memory is limited"):
        model(kt_expert_placement={"streamed": E})
    monkeypatch.undo()
    monkeypatch.setattr("kt_hf.system.gpu.experts_device", lambda: torch.device("cpu"))
    expected, _ = steps(model(kt_expert_placement={"streamed": E}), 3)
    assert all(torch.equal(a, b) for a, b in zip(losses, expected, strict=True))


def test_layers_that_the_host_cannot_hold_begin_on_the_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = saved(MIXTRAL, tmp_path)
    monkeypatch.setattr("kt_hf.placement.packer.available_memory", lambda: int(1.5 * LAYER))
    loaded = load_kt_model(folder, KTConfig(kt_lora_rank=8))
    kinds = [type(layer.backend) for layer in loaded._kt_wrappers]
    assert kinds == [StreamedBackend, GroupedBackend]
    packer = packer_of(loaded)
    assert packer is not None
    assert packer.tiers == Tiers(0, E, 1)


def test_whole_layers_by_hand() -> None:
    patched, streamed = model(kt_expert_placement={"resident_layers": 1}), model(kt_expert_placement={"streamed": E})
    assert [type(layer.backend) for layer in patched._kt_wrappers] == [StreamedBackend, GroupedBackend]
    assert all(torch.equal(a, b) for a, b in zip(steps(patched, 2)[0], steps(streamed, 2)[0], strict=True))
    for wrong, message in (
        ({"resident_layers": 3}, "the model has 2 layers of experts"),
        ({"resident_layers": -1}, "not an integer of 0 or more"),
        ({"resident_layers": 1, "streamed": 2}, "Leave one out"),
    ):
        with pytest.raises(KTAMXConfigError, match=message):
            apply_kt_moe(MIXTRAL(torch.bfloat16), KTConfig(kt_expert_placement=wrong))


def test_a_checkpoint_records_where_layers_are_and_a_resume_begins_with_it(tmp_path: Path) -> None:
    whole = trainer_for(model(), tmp_path / "whole", bf16=True)
    whole.train()
    first = trainer_for(model(), tmp_path / "run", max_steps=10, save_strategy="steps", save_steps=10, bf16=True)
    first.train()
    recorded = read_run_placement(tmp_path / "run" / "checkpoint-10")
    assert recorded is not None
    assert recorded.held == (0, 1)
    assert recorded.tiers == Tiers(0, E)
    assert recorded.seen["training"].whole
    second, seen = model(), []
    trainer = trainer_for(second, tmp_path / "run", bf16=True)
    second._kt_wrappers[0].register_forward_pre_hook(lambda *_: seen.append(held(second)))
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-10"))
    assert seen[0] == [0, 1]
    after, expected = result(trainer), result(whole)
    assert_same_run(after._replace(losses=after.losses[-10:]), expected._replace(losses=expected.losses[-10:]))
    elsewhere = (tmp_path / "run" / "checkpoint-10").rename(tmp_path / "moved")
    third, seen = model(), []
    trainer = trainer_for(third, tmp_path / "other", bf16=True, max_steps=12)
    third._kt_wrappers[0].register_forward_pre_hook(lambda *_: seen.append(held(third)))
    trainer.train(resume_from_checkpoint=str(elsewhere))
    assert seen[0] == [0, 1], "the record is beside the checkpoint, wherever that is"
    (elsewhere / RUN_PLACEMENT).write_text('{"format_version": 1, "tiers": {"resident": -1}}')
    with pytest.raises(KTAMXConfigError, match=r"resident=-1 .*Delete the file"):
        trainer_for(model(), tmp_path / "run").train(resume_from_checkpoint=str(elsewhere))


def test_an_interrupted_run_gives_layers_back_before_the_optimizer_of_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a notebook: its state is as large as they are."""
    auto = model()
    trainer = trainer_for(auto, tmp_path, max_steps=8, save_strategy="steps", save_steps=4, bf16=True)

    def interrupt(*_: Any) -> None:
        if trainer.state.global_step == 6:
            raise KeyboardInterrupt

    hook = auto._kt_wrappers[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    hook.remove()
    assert held(auto) == [0, 1]
    seen, load = [], torch.optim.AdamW.load_state_dict

    def loading(*args: Any) -> None:
        seen.append(held(auto))
        load(*args)

    monkeypatch.setattr(torch.optim.AdamW, "load_state_dict", loading)
    trainer.train(resume_from_checkpoint=True)
    assert seen == [[]]


def test_full_determinism_fixes_where_layers_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.trainer.enable_full_determinism", lambda seed: None)
    patched = model()
    trainer_for(patched, tmp_path, full_determinism=True, bf16=True).train()
    assert held(patched) == []


def test_a_forward_without_the_adapter_forgets_nothing() -> None:
    """As DPO's reference, or a comparison between steps."""
    auto = model()
    _, optimizer = steps(auto, 3)
    with auto.disable_adapter(), torch.no_grad():
        auto(input_ids=MIXTRAL.inputs(2, 12))
    steps(auto, 1, optimizer)
    assert held(auto) == [0, 1]


def test_layers_that_are_packed_one_after_the_other_are_all_moved() -> None:
    """By a first forward, when only the first is there as a pass begins."""
    auto = get_peft_model(apply_kt_moe(MIXTRAL(torch.bfloat16)), lora_config(MIXTRAL))
    packer = packer_of(auto)
    assert packer is not None
    assert packer.promotion is not None
    packer.promotion._memory.promotion = packer.promotion  # type: ignore[attr-defined]
    steps(auto, 4)
    assert held(auto) == [0, 1]


def test_a_run_gives_layers_back_and_another_way_of_steps_learns_anew(tmp_path: Path) -> None:
    auto = model()
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 4, "bf16": True}
    trainer_for(auto, tmp_path, **settings).train()
    assert held(auto) == []
    recorded = read_run_placement(tmp_path / "checkpoint-4")
    assert recorded is not None
    assert recorded.held == (0, 1)
    other, seen = model(), []
    other._kt_wrappers[0].register_forward_pre_hook(lambda *_: seen.append(held(other)))
    trainer = trainer_for(other, tmp_path, **settings | {"max_steps": 6, "per_device_train_batch_size": 1})
    trainer.args.gradient_accumulation_steps = 2
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert seen[0] == []


def test_two_models_whose_passes_take_turns_move_nothing() -> None:
    """As a policy and its reference; one after the other does."""
    first, second = model(), model()
    _, optimizer = steps(first, 5)
    assert held(first) == [0, 1]
    for _ in range(4):
        second(input_ids=MIXTRAL.inputs(2, 12))
        steps(first, 1, optimizer)
        assert held(first) == []
    steps(first, 5, optimizer)
    assert held(first) == [0, 1]


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_layer_that_runs_out_of_memory_is_computed_once_more(
    where: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without the layers that were held; fewer of them come back, and no bit is another."""
    auto, streamed = model(), model(kt_expert_placement={"streamed": E})
    for one in (auto, streamed):
        if checkpointing:
            one.enable_input_require_grads()
            one.gradient_checkpointing_enable()
    losses, optimizer = steps(auto, 4)
    assert held(auto) == [0, 1]
    second, compute = auto._kt_wrappers[1].backend, getattr(StreamedBackend, where)

    def scarce(backend: StreamedBackend, *args: Any) -> Any:
        result = compute(backend, *args)
        if backend is second and held(auto):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return result

    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING, "kt_hf"):
        patched.setattr(StreamedBackend, where, scarce)
        losses += steps(auto, 1, optimizer)[0]
        assert held(auto) == []
    assert caplog.text.count("ran out of memory") == 1
    assert f"in {auto._kt_wrappers[1].label}: the 2 layers" in caplog.text
    losses += steps(auto, 1, optimizer)[0]
    assert held(auto) == [1], "one less than before"
    expected, other = steps(streamed, 4)
    expected += steps(streamed, 1, other)[0] + steps(streamed, 1, other)[0]
    assert all(torch.equal(a, b) for a, b in zip(losses, expected, strict=True))
    names = dict(streamed.named_parameters())
    assert all(torch.equal(p, names[name]) for name, p in auto.named_parameters())


def test_memory_that_no_layer_can_give_back_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    auto, calls = model(), []

    def scarce(*_: Any) -> Any:
        calls.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(StreamedBackend, "forward", scarce)
    with pytest.raises(torch.OutOfMemoryError):
        steps(auto, 1)
    assert len(calls) == 1
