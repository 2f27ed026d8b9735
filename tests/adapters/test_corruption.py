"""Damaged, mixed and foreign checkpoints: each is refused with its reason, with a manifest and without; none loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from kt_hf import KTAMXError, apply_kt_moe, verify_adapter
from kt_hf.adapters import MANIFEST, check_checkpoint
from tests.support.cases import TORCH_FP32
from tests.support.helpers import MIXTRAL
from tests.support.models import FAMILIES
from tests.support.patched import lora_config, patched_model
from tests.support.trainers import model_to_train, trainer_for

ADAPTER, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LAYER = "base_model.model.model.layers.1.mlp.experts"
ATTENTION = "base_model.model.model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """checkpoint-1 and checkpoint-2 of a run, and an adapter of another base model."""
    folder = tmp_path_factory.mktemp("run")
    trainer_for(model_to_train(TORCH_FP32), folder, max_steps=2, save_strategy="steps", save_steps=1).train()
    family = FAMILIES["qwen2_moe"]
    get_peft_model(patched_model(family, TORCH_FP32), lora_config(family, r=4)).save_pretrained(folder / "other")
    return folder


@pytest.fixture
def checkpoint(run: Path, tmp_path: Path) -> Path:
    """A copy of checkpoint-2, beside copies of the others."""
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    return tmp_path / "checkpoint-2"


Corrupt = Callable[[Path], Any]


def cut(name: str, keep: float | int) -> Corrupt:
    """Keep a share of a file's bytes, or leave out so many (negative)."""

    def do(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])

    return do


def write(name: str, data: bytes) -> Corrupt:
    return lambda folder: (folder / name).write_bytes(data)


def delete(name: str) -> Corrupt:
    return lambda folder: (folder / name).unlink()


def flip(name: str, at: float) -> Corrupt:
    def do(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[int(len(data) * at)] ^= 64
        (folder / name).write_bytes(data)

    return do


def settings(name: str = CONFIG, **changes: Any) -> Corrupt:
    def do(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, **changes}))

    return do


def drop(name: str, key: str) -> Corrupt:
    def do(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        del content[key]
        (folder / name).write_text(json.dumps(content))

    return do


def tensors(change: Callable[[dict[str, Tensor]], Any]) -> Corrupt:
    def do(folder: Path) -> None:
        content = {key: value.clone() for key, value in load_file(folder / ADAPTER).items()}
        content = change(content) or content
        save_file({key: value.contiguous() for key, value in content.items()}, folder / ADAPTER, {"format": "pt"})

    return do


def take(name: str, source: str) -> Corrupt:
    return lambda folder: shutil.copyfile(folder.parent / source / name, folder / name)


def take_all(folder: Path) -> None:
    for name in (ADAPTER, CONFIG, MANIFEST):
        take(name, "other")(folder)


def pickled(folder: Path) -> None:
    content = {key: value.clone() for key, value in load_file(folder / ADAPTER).items()}
    torch.save(content, folder / ADAPTER)


def without(text: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda content: {key: value for key, value in content.items() if text not in key}


def put(key: str, value: Callable[[dict[str, Tensor]], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    return lambda content: content.__setitem__(key, value(content))


def fill(key: str, value: float) -> Callable[[dict[str, Tensor]], None]:
    return lambda content: content.update(
        {key: content[key].flatten().index_fill(0, SEVEN, value).view_as(content[key])}
    )


SEVEN = torch.tensor([7])


def swap(content: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {"lora_A": "lora_B", "lora_B": "lora_A"}
    return {key.replace(s := key.split(".")[-2], names[s]): value for key, value in content.items()}


@dataclass
class Damage:
    """What is done to a checkpoint, and the reason it is refused for; `bare` without a manifest, None: not to be told.

    `resume`: the adapter itself is whole, a Trainer's file is not.
    """

    do: Corrupt
    reason: str
    bare: str | None = None
    resume: bool = False


GATE_A, DOWN_B = f"{LAYER}.gate_proj.lora_A.weight", f"{LAYER}.down_proj.lora_B.weight"
DAMAGED = "truncated, damaged, or no safetensors file|it is truncated|is missing in|its last tensor"
CHANGED = "is not the file that was saved"

DAMAGES: dict[str, Damage] = {
    # the adapter's file
    "half a file": Damage(cut(ADAPTER, 0.5), "is truncated", DAMAGED),
    "a byte less": Damage(cut(ADAPTER, -1), "is truncated", DAMAGED),
    "the header alone": Damage(cut(ADAPTER, 900), "is truncated", DAMAGED),
    "an empty file": Damage(write(ADAPTER, b""), "is truncated", DAMAGED),
    "a pickle": Damage(pickled, "is longer", DAMAGED),
    "no file": Damage(delete(ADAPTER), "is missing", "is missing"),
    "a folder in its place": Damage(lambda f: (delete(ADAPTER)(f), (f / ADAPTER).mkdir()), "is missing", DAMAGED),
    "another extension": Damage(lambda f: (f / ADAPTER).rename(f / "adapter_model.bin"), "is a pickle", "is a pickle"),
    "a flipped bit of a value": Damage(flip(ADAPTER, 0.9), CHANGED),
    "a flipped bit of the header": Damage(flip(ADAPTER, 0.001), CHANGED, DAMAGED),
    "a flipped bit of the length": Damage(flip(ADAPTER, 0.00001), CHANGED, DAMAGED),
    "bytes more": Damage(lambda f: (f / ADAPTER).open("ab").write(b"more"), "is longer", DAMAGED),
    "zeros in place of the end": Damage(
        lambda f: write(ADAPTER, (f / ADAPTER).read_bytes()[:-9000] + bytes(9000))(f), CHANGED
    ),
    "noise": Damage(
        lambda f: write(ADAPTER, torch.randint(256, ((f / ADAPTER).stat().st_size,)).byte().numpy().tobytes())(f),
        CHANGED, DAMAGED,
    ),
    # its config
    "no config": Damage(delete(CONFIG), "is missing", "is missing"),
    "half a config": Damage(cut(CONFIG, 0.5), "cannot be read", "cannot be read"),
    "an empty config": Damage(write(CONFIG, b""), "cannot be read", "cannot be read"),
    "a config that is a list": Damage(write(CONFIG, b"[]"), "holds no object", "holds no object"),
    "another rank": Damage(settings(r=16), "r=16, but the adapter was saved with 8", "by adapter_config.json"),
    "a rank that is none": Damage(settings(r="8"), "r='8', but", "r='8' is not a positive number"),
    "rank zero": Damage(settings(r=0), "r=0, but", "r=0 is not a positive number"),
    "another alpha": Damage(settings(lora_alpha=99), "lora_alpha=99, but the adapter was saved with 12"),
    "no alpha": Damage(drop(CONFIG, "lora_alpha"), "lora_alpha=None", "lora_alpha=None is not a positive number"),
    "another scaling": Damage(settings(use_rslora=True), "use_rslora=True, but"),
    "another method": Damage(settings(peft_type="IA3"), "peft_type='IA3', but", "peft_type='IA3' is not LORA"),
    "DoRA": Damage(settings(use_dora=True), "use_dora=True, but", "use_dora=True is not supported"),
    "a rank pattern": Damage(settings(rank_pattern={"up_proj": 4}), "rank_pattern=", "by adapter_config.json"),
    "fewer targets": Damage(settings(target_modules=["q_proj"]), "target_modules=", "loading would drop it"),
    # its manifest
    "half a manifest": Damage(cut(MANIFEST, 0.5), "cannot be read"),
    "an empty manifest": Damage(write(MANIFEST, b""), "cannot be read"),
    "an unfinished manifest": Damage(settings(MANIFEST, complete=False), "saving was interrupted"),
    "a later format": Damage(settings(MANIFEST, format_version=2), "format_version=2"),
    "a manifest without files": Damage(drop(MANIFEST, "files"), "lacks files"),
    "a manifest that is a list": Damage(write(MANIFEST, b"[]"), "holds no object"),
    "a manifest by someone else": Damage(settings(MANIFEST, writer="someone"), "was not written by kt_hf"),
    "a manifest of another tensor": Damage(settings(MANIFEST, tensors={}), "tensors differ"),
    "a manifest of the step before": Damage(take(MANIFEST, "checkpoint-1"), CHANGED),
    # files of several saves
    "the step before's tensors": Damage(take(ADAPTER, "checkpoint-1"), CHANGED),
    "another model's tensors": Damage(take(ADAPTER, "other"), "is longer|is truncated", "layers|place|size|config"),
    "another model's config": Damage(take(CONFIG, "other"), "r=4, but", "by adapter_config.json"),
    "another model's adapter": Damage(take_all, "trained on another base model", "another base model"),
    # its tensors
    "NaN in an expert": Damage(tensors(fill(GATE_A, float("nan"))), CHANGED, "not finite"),
    "infinity in attention": Damage(
        tensors(fill(f"{ATTENTION}.lora_B.weight", float("inf"))), CHANGED, "not finite"
    ),
    "no layer 1": Damage(tensors(without(LAYER)), "is truncated", "experts missing"),
    "no lora_A": Damage(tensors(without(GATE_A)), "is truncated", "has no lora_A"),
    "no lora_B": Damage(tensors(without(DOWN_B)), "is truncated", "has no lora_B"),
    "no up_proj": Damage(tensors(without(f"{LAYER}.up_proj")), "is truncated", "has no LoRA of up_proj"),
    "half of attention's pair": Damage(tensors(without(f"{ATTENTION}.lora_A")), "is truncated", "not the other"),
    "no experts": Damage(tensors(without(".experts.")), "is truncated", "experts missing"),
    "a weight of the base": Damage(
        tensors(put("base_model.model.model.norm.weight", lambda c: torch.ones(64))), "is longer", "is no LoRA tensor"
    ),
    "a layer more": Damage(
        tensors(lambda c: {**c, **{k.replace(".1.", ".9."): v.clone() for k, v in c.items() if LAYER in k}}),
        "is longer", "has no place",
    ),
    "a rank less": Damage(tensors(put(GATE_A, lambda c: c[GATE_A][:, :4])), "is truncated", "by adapter_config.json"),
    "an expert less": Damage(
        tensors(lambda c: {k: v[:7] if ".experts." in k else v for k, v in c.items()}),
        "is truncated", "this model needs",
    ),
    "an expert less in one": Damage(tensors(put(GATE_A, lambda c: c[GATE_A][:7])), "is truncated", "by adapter_config"),
    "transposed": Damage(
        tensors(put(GATE_A, lambda c: c[GATE_A].transpose(1, 2))),
        f"{CHANGED}|is longer|is truncated", "by adapter_config",
    ),
    "flat": Damage(
        tensors(put(GATE_A, lambda c: c[GATE_A].flatten(0, 1))), f"{CHANGED}|is longer|is truncated", "has no lora_A"
    ),
    "another size in one layer": Damage(
        tensors(put(GATE_A, lambda c: c[GATE_A][:, :, :32])), "is truncated", "is of another size"
    ),
    "A and B swapped": Damage(tensors(swap), f"{CHANGED}|is longer|is truncated", "by adapter_config.json"),
    "two formats": Damage(
        tensors(put(f"{LAYER}.0.up_proj.lora_A.weight", lambda c: torch.ones(8, 64))), "is longer", "mixes formats"
    ),
    "another dtype": Damage(tensors(lambda c: {k: v.bfloat16() for k, v in c.items()}), "is truncated"),
    # what the Trainer wrote
    "half an optimizer": Damage(cut("optimizer.pt", 0.5), "is truncated", "is truncated or damaged", True),
    "no optimizer": Damage(delete("optimizer.pt"), "is missing", "lacks optimizer.pt", True),
    "the step before's optimizer": Damage(take("optimizer.pt", "checkpoint-1"), CHANGED, None, True),
    "no scheduler": Damage(delete("scheduler.pt"), "is missing", "lacks scheduler.pt", True),
    "no random state": Damage(delete("rng_state.pth"), "is missing", "lacks rng_state.pth", True),
    "no trainer_state": Damage(delete("trainer_state.json"), "is missing", "trainer_state.json is missing", True),
    "half a trainer_state": Damage(cut("trainer_state.json", 0.5), "is truncated", "cannot be read", True),
    "the step before's trainer_state": Damage(take("trainer_state.json", "checkpoint-1"), "is truncated", None, True),
}  # fmt: skip


def test_there_are_sixty() -> None:
    assert len(DAMAGES) >= 60


@pytest.mark.parametrize("bare", [False, True], ids=["manifest", "bare"])
def test_whole_checkpoints_load(checkpoint: Path, bare: bool) -> None:
    """So that the refusals below are due to the damage."""
    for folder in (checkpoint, checkpoint.parent / "checkpoint-1"):
        if bare:
            delete(MANIFEST)(folder)
        assert verify_adapter(folder, patched_model(MIXTRAL, TORCH_FP32)) != bare
        check_checkpoint(folder)
        PeftModel.from_pretrained(patched_model(MIXTRAL, TORCH_FP32), folder, is_trainable=True)


CASES = [(name, False) for name in DAMAGES] + [(name, True) for name, damage in DAMAGES.items() if damage.bare]


@pytest.mark.parametrize(("name", "bare"), CASES, ids=[f"{n}, bare" if b else n for n, b in CASES])
def test_refused(name: str, bare: bool, checkpoint: Path) -> None:
    damage = DAMAGES[name]
    damage.do(checkpoint)
    if bare:
        delete(MANIFEST)(checkpoint)
    reason = damage.bare if bare else damage.reason
    model = patched_model(MIXTRAL, TORCH_FP32)
    if not damage.resume:
        with pytest.raises(KTAMXError, match=str(reason)):
            verify_adapter(checkpoint, model)
        with pytest.raises(Exception):  # noqa: B017, PT011  PEFT reads the config before anybody else can
            PeftModel.from_pretrained(patched_model(MIXTRAL, TORCH_FP32), checkpoint)
        with pytest.raises(KTAMXError):
            apply_kt_moe(MIXTRAL(), adapter=checkpoint)
    trainer = trainer_for(model_to_train(TORCH_FP32), checkpoint.parent, max_steps=3)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    with pytest.raises((KTAMXError, ValueError)) as error:
        trainer.train(resume_from_checkpoint=True)
    if (checkpoint / ADAPTER).is_file():  # else the Trainer says that there is no valid checkpoint
        if damage.resume:
            assert error.match(str(reason))
        assert "checkpoint-1'" in str(error.value)
    assert all(torch.equal(p, before[n]) for n, p in trainer.model.named_parameters() if n in before)
