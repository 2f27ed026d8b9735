"""Saved experts compute what online quantisation computes, to the bit; what does not fit is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedConfig

from kt_hf import KTAMXConfigError, KTAMXError, apply_kt_moe, load_kt_model
from kt_hf.quantized import MANIFEST, open_saved
from tests.support.cases import KERNEL_MARKS
from tests.support.checkpoints import make_8_bits, tensors, write
from tests.support.low_bit import wide
from tests.support.models import FAMILIES, Family
from tests.support.quantized_folders import edit, load, quantised, results, save_checkpoint, settings

pytestmark = list(KERNEL_MARKS)

FAMILY = wide()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model") / "wide", FAMILY)


@pytest.fixture(scope="module")
def folders(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Path]:
    """(int8 or int4, with backward weights) -> folder. Never written to."""
    place = tmp_path_factory.mktemp("saved")
    return {
        (to, backward): quantised(checkpoint, place / f"{to}-{backward}", to, backward=backward)
        for to in ("int8", "int4")
        for backward in (True, False)
    }


@pytest.mark.parametrize("how", ["apply_kt_moe", "load_kt_model"])
@pytest.mark.parametrize(("backward", "share"), [(True, False), (True, True), (False, True), (False, None)])
@pytest.mark.parametrize("to", ["int8", "int4"])
def test_saved_is_online_to_the_bit(
    to: str, backward: bool, share: bool | None, how: str, checkpoint: Path, folders: dict[tuple[str, bool], Path]
) -> None:
    """Logits, and gradients of attention, router inputs and every expert's LoRA, through a whole model."""
    shared = {"kt_share_backward_weights": share}
    online = {"kt_share_backward_weights": True if share is None else share}
    expected = results(load(checkpoint, FAMILY), FAMILY, settings(to, **online))
    config = settings(to, folders[to, backward], **shared)
    if how == "apply_kt_moe":
        found = results(load(checkpoint, FAMILY), FAMILY, config)
    else:
        found = results(load_kt_model(checkpoint, config), FAMILY)
    assert expected.keys() == found.keys()
    assert [name for name, value in expected.items() if not torch.equal(value, found[name])] == []
    assert found["logits"].abs().sum() > 0


def test_the_state_tells_the_same_base_weights_as_online(checkpoint: Path, folders: Any) -> None:
    online = apply_kt_moe(load(checkpoint, FAMILY), settings("int8"))
    saved = load_kt_model(checkpoint, settings("int8", folders["int8", True]))
    marks = [[layer.base_fingerprint.tolist() for layer in model._kt_wrappers] for model in (online, saved)]
    assert marks[0] == marks[1]
    assert len({tuple(mark) for mark in marks[0]}) == len(marks[0]), "layers have weights of their own"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
def test_the_models_dtype_may_be_another(dtype: torch.dtype, checkpoint: Path, folders: Any) -> None:
    model = apply_kt_moe(load(checkpoint, FAMILY, dtype), settings(path=folders["int8", True]))
    assert {layer.backend_name for layer in model._kt_wrappers} == {"AMXInt8"}
    assert all(layer.packed for layer in model._kt_wrappers)
    assert not any("experts" in name for name, _ in model.named_parameters()), "the original weights are let go"


def test_twice_in_a_process_and_after_an_adapter(checkpoint: Path, folders: Any) -> None:
    """The operators' number of a layer is in the folder's name for them, and may never be used again."""
    from peft import get_peft_model

    from tests.support.patched import lora_config

    kept = [results(load(checkpoint, FAMILY), FAMILY, settings(path=folders["int8", False])) for _ in range(2)]
    assert all(torch.equal(value, kept[1][name]) for name, value in kept[0].items())
    model = get_peft_model(load(checkpoint, FAMILY), lora_config(FAMILY, target_modules=["q_proj"]))
    apply_kt_moe(model, settings(path=folders["int8", True]))
    assert {layer.backend_name for layer in model._kt_wrappers} == {"AMXInt8"}


def test_the_original_experts_are_not_read(checkpoint: Path, folders: Any, tmp_path: Path) -> None:
    """Were a number of them read, it would not be one."""
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    config = settings(path=folders["int8", True], kt_share_backward_weights=False)
    expected = results(load_kt_model(copy, config), FAMILY)
    content = tensors(copy)
    write(copy, {n: torch.full_like(t, torch.nan) if ".experts." in n else t for n, t in content.items()})
    found = results(load_kt_model(copy, config), FAMILY)
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_fp8_checkpoints_are_quantised_from_what_they_stand_for(tmp_path: Path) -> None:
    """DeepSeek-V3's block-wise FP8, to bf16, to INT8: saved as online."""
    v3 = FAMILIES["deepseek_v3"]

    def config() -> PreTrainedConfig:
        made = v3.make_config()
        made.hidden_size, made.moe_intermediate_size = 128, 64
        return made

    family = replace(v3, make_config=config, hidden=128, intermediate=64)
    checkpoint = save_checkpoint(tmp_path / "model", family)
    make_8_bits(checkpoint, (32, 32))
    folder = quantised(checkpoint, tmp_path / "saved")
    share = {"kt_share_backward_weights": False}
    online, saved = (
        results(load_kt_model(checkpoint, settings(path=path, **share), dtype=torch.bfloat16), family)
        for path in (None, folder)
    )
    assert all(torch.equal(value, saved[name]) for name, value in online.items())
    assert {"model.norm.weight", "lm_head.weight"} <= set(open_saved(folder).manifest.marks)


def no_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def cut_manifest(folder: Path) -> None:
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text[: len(text) // 2])


def strange_manifest(folder: Path) -> None:
    edit(folder, layers={"model.layers.0.mlp.experts": {"folder": "../elsewhere"}})


def outside(folder: Path) -> None:
    layers = json.loads((folder / MANIFEST).read_text())["layers"]
    layers["model.layers.0.mlp.experts"]["folder"] = "../elsewhere"
    edit(folder, layers=layers)


def a_file(folder: Path, pattern: str = "INT8_up_3_*quant*", layer: int = 1) -> Path:
    return next((folder / f"layer_{layer:04d}" / "_numa_0").glob(pattern))


def missing(folder: Path) -> None:
    a_file(folder).unlink()


def missing_backward(folder: Path) -> None:
    a_file(folder, "INT8_down_bwd_7_*scale*").unlink()


def truncated(folder: Path) -> None:
    file = a_file(folder)
    file.write_bytes(file.read_bytes()[:-1])


def foreign(folder: Path) -> None:
    shutil.copy(a_file(folder), a_file(folder).with_name("INT8_up_3_99Byte_quant_.kt"))


def flipped(folder: Path, layer: int = 0) -> None:
    file = a_file(folder, layer=layer)
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(bytes(data))


def no_layer(folder: Path) -> None:
    shutil.rmtree(folder / "layer_0001")


def gone(folder: Path) -> None:
    shutil.rmtree(folder)


# name -> (what happened to the folder, other settings, words of the message)
BROKEN: dict[str, tuple[Callable[[Path], object], dict[str, Any], tuple[str, ...]]] = {
    "no folder": (gone, {}, ("kt_weight_path=", "not a folder", "kt-hf quantize")),
    "no manifest": (no_manifest, {}, (MANIFEST, "not written by `kt-hf quantize`")),
    "manifest cut off": (cut_manifest, {}, (MANIFEST, "is damaged")),
    "manifest of another form": (strange_manifest, {}, (MANIFEST, "is damaged")),
    "manifest that leads outside": (outside, {}, (MANIFEST, "is damaged", "elsewhere")),
    "later format": (lambda f: edit(f, format=2), {}, ("format 2", "update")),
    "other kt-kernel": (lambda f: edit(f, kt_kernel="0.8.0"), {}, ("kt-kernel 0.8.0", "quantise again")),
    "missing file": (missing, {}, ("INT8_up_3_", "quant_.kt is missing")),
    "missing backward file": (missing_backward, {}, ("INT8_down_bwd_7_", "scale_.kt is missing")),
    "missing layer": (no_layer, {}, ("layer_0001", "is missing")),
    "truncated file": (truncated, {}, ("INT8_up_3_", "has 16383 bytes, 16384 were written")),
    "foreign file": (foreign, {}, ("INT8_up_3_99Byte_quant_.kt does not belong there",)),
    "changed contents": (flipped, {}, ("INT8_up_3_", "is not what was written")),
    "wrong pools": (lambda f: edit(f, pools=2), {}, ("2 pools", "this run has 1", "--pools 1")),
    "other backend": (lambda f: None, {"kt_backend": "AMXInt4"}, ("AMXInt8", "kt_backend=AMXInt4")),
    "bf16": (lambda f: None, {"kt_backend": "AMXBF16"}, ("kt_backend=AMXInt8", "kt_backend=AMXBF16")),
    "torch": (lambda f: None, {"kt_backend": "torch"}, ("kt_backend=AMXInt8", "kt_backend=torch")),
    "auto": (lambda f: None, {"kt_backend": "auto"}, ("kt_backend=AMXInt8", "kt_backend=auto")),
    "no rank": (lambda f: None, {"kt_lora_rank": None}, ("needs kt_lora_rank",)),
    "other type of model": (lambda f: edit(f, model_type="qwen3_moe"), {}, ("of type qwen3_moe", "is mixtral")),
}  # fmt: skip


def refused(model: Any, config: Any, words: tuple[str, ...]) -> None:
    """With every word in the message, and the model as it was."""
    modules = dict(model.named_modules())
    with pytest.raises(KTAMXError) as caught:
        apply_kt_moe(model, config)
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)
    assert dict(model.named_modules()) == modules


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folders_and_wrong_settings_are_refused(
    name: str, checkpoint: Path, folders: dict[tuple[str, bool], Path], tmp_path: Path
) -> None:
    breaks, other, words = BROKEN[name]
    folder = shutil.copytree(folders["int8", True], tmp_path / "copy")
    breaks(folder)
    refused(load(checkpoint, FAMILY), replace(settings(path=folder), **other), words)


def test_contents_are_compared_in_each_layer(checkpoint: Path, folders: Any, tmp_path: Path) -> None:
    """As it is loaded, so that a file is read once; the model is then half loaded and of no use."""
    folder = shutil.copytree(folders["int8", True], tmp_path / "copy")
    flipped(folder, layer=1)
    with pytest.raises(KTAMXError, match=r"layer_0001/_numa_0/INT8_up_3_\d+Byte_quant_.kt is not what was written"):
        load_kt_model(checkpoint, settings(path=folder))


def test_backward_weights_that_are_not_there_are_not_to_be_had(checkpoint: Path, folders: Any) -> None:
    config = settings(path=folders["int8", False], kt_share_backward_weights=False)
    refused(load(checkpoint, FAMILY), config, ("has no backward weights", "kt_share_backward_weights=False"))


@pytest.mark.parametrize("what", ["sizes", "layers", "weights", "attention", "experts"])
def test_other_models_are_refused(what: str, checkpoint: Path, folders: Any) -> None:
    words: tuple[str, ...] = ("was made of other weights",)
    if what == "sizes":
        model, words = wide(inner=256)(torch.bfloat16), ("of another model", "[8, 128, 128] there, [8, 128, 256] in")
    elif what == "layers":
        model = load(checkpoint, FAMILY)
        del model.model.layers[1]
        words = ("layer model.layers.1.mlp.experts, the model has none of that name",)
    elif what == "weights":
        model = FAMILY(torch.bfloat16, seed=1)
    else:
        model = load(checkpoint, FAMILY)
        layer = model.model.layers[1]
        changed = layer.self_attn.v_proj.weight if what == "attention" else layer.mlp.experts.down_proj
        changed.data[-1] *= 1.5
        words += ("v_proj",) if what == "attention" else ("model.layers.1.mlp.experts.down_proj",)
    refused(model, settings(path=folders["int8", True]), words)


def test_load_kt_model_refuses_another_models_folder(folders: Any, tmp_path: Path) -> None:
    other = save_checkpoint(tmp_path / "other", FAMILY, seed=1)
    with pytest.raises(KTAMXConfigError, match="was made of other weights"):
        load_kt_model(other, settings(path=folders["int8", True]))


def test_what_the_manifest_says(checkpoint: Path, folders: Any) -> None:
    saved = open_saved(folders["int8", True])
    assert (saved.manifest.backend, saved.backward, saved.manifest.pools) == ("AMXInt8", True, 1)
    assert saved.manifest.model == str(checkpoint)
    assert list(saved.manifest.layers) == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    assert saved.manifest.layers["model.layers.1.mlp.experts"].shape == [8, 128, 128]
    assert len(saved.manifest.layers["model.layers.1.mlp.experts"].files) == 8 * 12
    assert len(open_saved(folders["int4", False]).manifest.layers["model.layers.0.mlp.experts"].files) == 8 * 6


def test_a_family_with_names_of_its_own(tmp_path: Path) -> None:
    """Layers that are not all of the model's, and shared experts beside them."""
    family: Family = FAMILIES["deepseek_v2"]
    checkpoint = save_checkpoint(tmp_path / "model", family)
    folder = quantised(checkpoint, tmp_path / "saved")
    expected = results(load(checkpoint, family), family, settings(kt_share_backward_weights=False))
    found = results(
        load(checkpoint, family), family, settings(path=folder, kt_share_backward_weights=False)
    )  # fmt: skip
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
