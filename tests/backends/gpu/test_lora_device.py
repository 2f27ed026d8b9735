"""LoRA on either device beside experts that the GPU computes: where it goes, resuming on the other, late copies."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kt_hf.experts import kt_layers
from kt_hf.experts.layer import update_lora
from kt_hf.experts.runner import ExpertsRunner
from kt_hf.placement import packer as packing
from tests.support.cases import TORCH_BF16
from tests.support.patched import fill_lora
from tests.support.resumed import KINDS, resumed_like_uninterrupted
from tests.support.tiered import E, tiered_model

RUN = {"use_cpu": False, "bf16": True}
STREAMED: list[int] = list(range(E))


def model_with(lora: str, seed: int = 1) -> Any:
    return tiered_model(TORCH_BF16, [], STREAMED, seed=seed, kt_moe_lora_device=lora)


def devices_of(model: nn.Module) -> set[str]:
    return {p.device.type for layer in kt_layers(model) for p in layer.lora_params.values()}


@pytest.mark.parametrize(("resident", "streamed"), [([], STREAMED), (STREAMED, []), ([1, 2], [0, 3, 4, 5, 6, 7])])
def test_auto_takes_the_gpu(resident: list[int], streamed: list[int]) -> None:
    assert devices_of(tiered_model(TORCH_BF16, resident, streamed).cuda()) == {"cuda"}


def test_auto_takes_the_cpu_beside_experts_there() -> None:
    assert devices_of(tiered_model(TORCH_BF16, [1], [2, 3]).cuda()) == {"cpu"}


def test_auto_takes_the_cpu_where_room_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "free_device_memory", lambda device: 2**20)
    assert devices_of(tiered_model(TORCH_BF16, [], STREAMED).cuda()) == {"cpu"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("before", "after"), [("gpu", "cpu"), ("cpu", "gpu")])
def test_resumed_with_lora_on_the_other_device(before: str, after: str, kind: str, tmp_path: Path) -> None:
    def model(lora: str) -> Callable[[], Any]:
        return lambda: model_with(lora)

    seen = resumed_like_uninterrupted(model(before), model(after), (kind, kind), tmp_path, **RUN)
    assert ("cpu" in seen.devices) == (after == "cpu")


def steps(model: Any, count: int, micro: int = 1, slow: bool = False, clip: bool = False) -> list[float]:
    """Losses of some steps, the GPU kept busy before each backward if `slow`."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, fused=True)
    update_lora(kt_layers(model))
    losses: list[torch.Tensor] = []
    for step in range(count):
        for part in range(micro):
            ids = torch.randint(64, (2, 33), generator=torch.Generator().manual_seed(micro * step + part)).cuda()
            loss = model(input_ids=ids, labels=ids).loss
            if slow:
                torch.cuda._sleep(50_000_000)
            loss.backward()
            losses.append(loss.detach())
        if clip:
            torch.nn.utils.clip_grad_norm_(trained, 0.5)
        optimizer.step()
        optimizer.zero_grad()
        update_lora(kt_layers(model))
    return [loss.item() for loss in losses]


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("clip", [False, True])
def test_late_gradients_train_as_those_on_the_gpu(checkpointing: bool | None, clip: bool) -> None:
    """Two micro-batches a step, the GPU lagging far behind the host: the same losses wherever LoRA is."""
    ends = []
    for lora in ("gpu", "cpu"):
        model = model_with(lora).cuda()
        if checkpointing is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
        ends.append(steps(model, 4, micro=2, slow=lora == "cpu", clip=clip))
    assert max(abs(a - b) for a, b in zip(*ends, strict=True)) < 0.02
    assert ends[0][-2] < ends[0][0]


def note(seen: dict[str, torch.Tensor], name: str, grad: torch.Tensor) -> None:
    seen[name] = grad.detach().clone()


def test_gradients_are_those_of_the_gpu_to_the_bit() -> None:
    """Handed over before they have arrived, added, and asked for by hooks."""
    grads = []
    for lora in ("gpu", "cpu"):
        model = model_with(lora).cuda()
        update_lora(kt_layers(model))
        names = [n for n, p in model.named_parameters() if p.requires_grad and "experts" in n]
        parameters = dict(model.named_parameters())
        seen: dict[str, torch.Tensor] = {}
        for name in names:
            parameters[name].register_hook(functools.partial(note, seen, name))
        ids = torch.arange(66, device="cuda").view(2, 33) % 64
        loss = model(input_ids=ids, labels=ids).loss
        torch.cuda._sleep(100_000_000)
        loss.backward(retain_graph=True)
        torch.cuda._sleep(100_000_000)
        loss.backward()
        assert all(torch.equal(2 * seen[name], parameters[name].grad) for name in names)
        grads.append({name: parameters[name].grad.cpu() for name in names})
    assert len(grads[0]) == 6 * 2
    assert all(torch.equal(grads[1][name], value) for name, value in grads[0].items())
    assert all(value.any() for value in grads[0].values())


def test_a_backward_does_not_wait_for_gradients_of_the_layers_above(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's thread begins the first layer's backward before the last layer's gradients are here."""
    model = model_with("cpu").cuda()
    update_lora(kt_layers(model))
    ids = torch.arange(66, device="cuda").view(2, 33) % 64
    model(input_ids=ids, labels=ids).loss.backward()  # the allocators have what they need
    begun: list[bool] = []
    kept, event = ExpertsRunner.backward, torch.cuda.Event()

    def backward(self: ExpertsRunner, *args: Any) -> Any:
        begun.append(event.query())
        return kept(self, *args)

    monkeypatch.setattr(ExpertsRunner, "backward", backward)
    loss = model(input_ids=ids, labels=ids).loss
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second, before all of backward
    event.record()
    loss.backward()
    assert begun == [False, False], "it waited for the last layer's gradients"


def test_values_are_waited_for_once_and_may_be_written_to() -> None:
    """Parameters are overwritten as soon as `update_lora` returns, though the GPU was busy: the copies are right."""
    expected: list[torch.Tensor] = []
    actual: list[torch.Tensor] = []
    for found, slow in ((expected, False), (actual, True)):
        model = model_with("cpu").cuda()
        layers = kt_layers(model)
        update_lora(layers)
        fill_lora(model, 5)
        if slow:
            torch.cuda._sleep(1_000_000_000)
        update_lora(layers)
        for layer in layers:
            for parameter in layer.lora_params.values():
                assert parameter.is_pinned()
                parameter.data.fill_(9)
        found += [t.cpu() for layer in layers for t in layer.backend.lora_copy()]
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))
    assert not any((t == 9).all() for t in actual)


def test_lora_on_the_gpu_is_not_waited_for() -> None:
    """The optimizer writes to it in order, on the same stream."""
    model = model_with("gpu").cuda()
    update_lora(kt_layers(model))
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)
    (slept := torch.cuda.Event()).record()
    update_lora(kt_layers(model))
    assert not slept.query()
