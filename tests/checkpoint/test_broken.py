"""Broken checkpoints: each is refused with file and tensor named, before anything is loaded; none crashes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from kt_hf import KTAMXError, load_kt_model, loading
from kt_hf.checkpoint import ExpertCheckpoint
from tests.support.cases import make_config
from tests.support.checkpoints import (
    INDEX,
    SINGLE,
    edit,
    fuse,
    header,
    make_8_bits,
    read_index,
    saved,
    set_config,
    set_header,
    tensors,
    write_index,
)
from tests.support.models import FAMILIES

QWEN3, MIXTRAL, V3 = FAMILIES["qwen3_moe"], FAMILIES["mixtral"], FAMILIES["deepseek_v3"]
LAYER = "model.layers.2.mlp.experts"
UP = f"{LAYER}.3.up_proj.weight"
Broken = Callable[[Path], tuple[str, ...]]
CASES: dict[str, Broken] = {}


def case(name: str) -> Callable[[Broken], Broken]:
    """A way to break a checkpoint in a new folder; it returns what the message must say."""

    def add(break_it: Broken) -> Broken:
        CASES[name] = break_it
        return break_it

    return add


def sharded(folder: Path) -> tuple[dict[str, str], Path]:
    """The index, and the file that has UP."""
    index = read_index(saved(QWEN3, folder, sharded=True))
    return index, folder / index[UP]


def changed(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    edit(saved(QWEN3, folder), lambda content: (change(content), None)[1])


@case("a shard is missing")
def _(folder: Path) -> tuple[str, ...]:
    _, file = sharded(folder)
    first = next(iter(name for name, shard in read_index(folder).items() if shard == file.name))
    file.unlink()
    return f"{file} is missing", first


@case("a shard is truncated in its data")
def _(folder: Path) -> tuple[str, ...]:
    _, file = sharded(folder)
    last = max(header(file).items(), key=lambda item: item[1].get("data_offsets", [0, 0])[1])[0]
    file.write_bytes(file.read_bytes()[:-10])
    return f"{file}: {last} ends at byte", "it is truncated"


@case("a shard is truncated in its header")
def _(folder: Path) -> tuple[str, ...]:
    _, file = sharded(folder)
    file.write_bytes(file.read_bytes()[:200])
    return f"{file} is truncated, damaged, or no safetensors file", "the file has 200"


@case("a shard is empty")
def _(folder: Path) -> tuple[str, ...]:
    _, file = sharded(folder)
    file.write_bytes(b"")
    return (f"{file} is truncated, damaged, or no safetensors file",)


@case("a shard is a web page")
def _(folder: Path) -> tuple[str, ...]:
    _, file = sharded(folder)
    file.write_text("<html><body>Too many requests, come again in an hour.</body></html>")
    return (f"{file} is truncated, damaged, or no safetensors file",)


@case("a shard's header is no JSON")
def _(folder: Path) -> tuple[str, ...]:
    _, file = sharded(folder)
    set_header(file, "{" * 40)
    return (f"{file} is truncated, damaged, or no safetensors file",)


@case("a shard goes on after its last tensor")
def _(folder: Path) -> tuple[str, ...]:
    _, file = sharded(folder)
    file.write_bytes(file.read_bytes() + b"more")
    return str(file), "its last tensor"


@case("a header has a tensor twice")
def _(folder: Path) -> tuple[str, ...]:
    _, file = sharded(folder)
    entry = f'"{UP}": {{"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}}'
    set_header(file, f"{{{entry}, {entry}}}")
    return str(file), f"{UP} is there twice"


@case("a header's shape needs more bytes than it gives")
def _(folder: Path) -> tuple[str, ...]:
    _, file = sharded(folder)
    content = header(file)
    content[UP]["shape"][0] += 1
    set_header(file, content)
    return f"{file}: {UP} has 8192 bytes", "needs 8448"


@case("a header's tensors overlap")
def _(folder: Path) -> tuple[str, ...]:
    _, file = sharded(folder)
    content = header(file)
    content[UP]["data_offsets"] = [offset - 64 for offset in content[UP]["data_offsets"]]
    set_header(file, content)
    return str(file), UP, "begins at byte"


@case("a header has a negative shape")
def _(folder: Path) -> tuple[str, ...]:
    _, file = sharded(folder)
    content = header(file)
    content[UP]["shape"][0] *= -1
    set_header(file, content)
    return f"{file}: {UP}.shape[0]=-32", "is not a whole number"


@case("a header lacks a tensor's dtype")
def _(folder: Path) -> tuple[str, ...]:
    _, file = sharded(folder)
    content = header(file)
    del content[UP]["dtype"]
    set_header(file, content)
    return (f"{file}: dtype is missing in {UP}",)


@case("a dtype is unknown")
def _(folder: Path) -> tuple[str, ...]:
    _, file = sharded(folder)
    content = header(file)
    content[UP]["dtype"] = "F4"
    set_header(file, content)
    return (f"{file}: {UP} is of dtype F4",)


@case("the index names another shard")
def _(folder: Path) -> tuple[str, ...]:
    index, file = sharded(folder)
    other = next(shard for shard in sorted(set(index.values())) if shard != file.name)
    write_index(folder, index | {UP: other})
    return f"{folder / INDEX} says that {folder / other} has {UP}", f"it is in {file}"


@case("the index names a tensor that is nowhere")
def _(folder: Path) -> tuple[str, ...]:
    index, file = sharded(folder)
    write_index(folder, index | {f"{LAYER}.8.up_proj.weight": file.name})
    return f"{file} has {LAYER}.8.up_proj.weight, which is not so", str(folder / INDEX)


@case("the index lacks a shard")
def _(folder: Path) -> tuple[str, ...]:
    index, file = sharded(folder)
    write_index(folder, {name: shard for name, shard in index.items() if shard != file.name})
    lost = [name for name, shard in index.items() if shard == file.name and ".experts." in name]
    return f"{lost[0].rsplit('.', 2)[0]}", f"{file} has ", f"but {INDEX} does not list it"


@case("the index is no JSON")
def _(folder: Path) -> tuple[str, ...]:
    sharded(folder)
    (folder / INDEX).write_text('{"weight_map": {')
    return (f"{folder / INDEX} cannot be read",)


@case("the index has no files")
def _(folder: Path) -> tuple[str, ...]:
    sharded(folder)
    write_index(folder, {})
    return (f"{folder / INDEX} is damaged",)


@case("the index leaves the folder")
def _(folder: Path) -> tuple[str, ...]:
    index, _ = sharded(folder)
    write_index(folder, index | {UP: "../model.safetensors"})
    return f"{folder / INDEX}: weight_map.{UP}", "'../model.safetensors'", "is no file name"


@case("a tensor is in two shards")
def _(folder: Path) -> tuple[str, ...]:
    index, file = sharded(folder)
    other = folder / next(shard for shard in sorted(set(index.values())) if shard != file.name)
    content = tensors(folder)
    save_file({n: content[n] for n in [*header(other), UP] if n != "__metadata__"}, other, {"format": "pt"})
    return f"{UP} is there twice", str(other), str(file)


@case("an expert lacks a projection")
def _(folder: Path) -> tuple[str, ...]:
    changed(folder, lambda content: content.pop(UP))
    return f"{UP} is missing (expert 3 of {LAYER})", str(folder / SINGLE)


@case("an expert of Mixtral lacks a projection")
def _(folder: Path) -> tuple[str, ...]:
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    edit(saved(MIXTRAL, folder), lambda content: (content.pop(name), None)[1])
    return f"{name} is missing", str(folder / SINGLE)


@case("the last expert is missing")
def _(folder: Path) -> tuple[str, ...]:
    changed(folder, lambda content: [content.pop(n) for n in list(content) if n.startswith(f"{LAYER}.7.")])
    return f"{LAYER}.7.gate_proj.weight is missing", str(folder / SINGLE)


@case("a layer has no experts")
def _(folder: Path) -> tuple[str, ...]:
    changed(folder, lambda content: [content.pop(n) for n in list(content) if n.startswith(LAYER)])
    return f"{LAYER}.0.gate_proj.weight is missing", str(folder)


@case("there is an expert too many")
def _(folder: Path) -> tuple[str, ...]:
    more = {f"{LAYER}.8.{name}_proj.weight": f"{LAYER}.7.{name}_proj.weight" for name in ("gate", "up", "down")}
    changed(folder, lambda content: content.update({n: content[o].clone() for n, o in more.items()}))
    return str(folder / SINGLE), f"{LAYER}.8.", "has 8 experts by the model's config"


@case("an expert is too small")
def _(folder: Path) -> tuple[str, ...]:
    changed(folder, lambda content: content.update({UP: content[UP][:-1].clone()}))
    return f"{folder / SINGLE}: {UP} has the shape [31, 128]", "[32, 128]"


@case("an expert is transposed")
def _(folder: Path) -> tuple[str, ...]:
    changed(folder, lambda content: content.update({UP: content[UP].T.contiguous()}))
    return f"{folder / SINGLE}: {UP} has the shape [128, 32]", "[32, 128]"


@case("the config is another model's")
def _(folder: Path) -> tuple[str, ...]:
    set_config(saved(QWEN3, folder), moe_intermediate_size=64)
    return str(folder / SINGLE), "model.layers.0.mlp.experts.0.", "64"


@case("an expert is of integers")
def _(folder: Path) -> tuple[str, ...]:
    changed(folder, lambda content: content.update({UP: content[UP].to(torch.int16)}))
    return f"{folder / SINGLE}: {UP} is of torch.int16", "known are bfloat16"


@case("an expert of 8 bits has no scales")
def _(folder: Path) -> tuple[str, ...]:
    changed(folder, lambda content: content.update({UP: content[UP].to(torch.int8)}))
    return f"{folder / SINGLE}: {UP} is of torch.int8", f"its scales, {UP}_scale_inv or {UP}_scale, are missing"


@case("experts are packed in four bits")
def _(folder: Path) -> tuple[str, ...]:
    def change(content: dict[str, Tensor]) -> None:
        for name in [name for name in content if ".experts." in name]:
            content[name.replace(".weight", ".qweight")] = content.pop(name).view(torch.int32)

    changed(folder, change)
    return str(folder / SINGLE), ".qweight", "a form that is not known"


@case("two layouts at once")
def _(folder: Path) -> tuple[str, ...]:
    changed(folder, lambda content: content.update({UP.replace("up_proj", "w3"): content[UP].clone()}))
    return str(folder / SINGLE), UP, f"{LAYER}.3.w3.weight", "the same weight of expert 3"


@case("fused and one tensor an expert at once")
def _(folder: Path) -> tuple[str, ...]:
    fuse(saved(QWEN3, folder), QWEN3(torch.bfloat16))
    edit(folder, lambda content: content.update({UP: torch.zeros(32, 128).bfloat16()}))
    return str(folder / SINGLE), UP, f"{LAYER}.gate_up_proj", "the same weight of expert 3"


@case("fused with an expert too few")
def _(folder: Path) -> tuple[str, ...]:
    fuse(saved(QWEN3, folder), QWEN3(torch.bfloat16))
    name = f"{LAYER}.gate_up_proj"
    edit(folder, lambda content: content.update({name: content[name][:7].clone()}))
    return f"{folder / SINGLE}: {name} has the shape [7, 64, 128]", "8 experts"


@case("fused and transposed")
def _(folder: Path) -> tuple[str, ...]:
    fuse(saved(QWEN3, folder), QWEN3(torch.bfloat16))
    name = f"{LAYER}.gate_up_proj"
    edit(folder, lambda content: content.update({name: content[name].transpose(1, 2).contiguous()}))
    return f"{folder / SINGLE}: {name} has the shape [128, 64] an expert", "[64, 128]"


@case("fused without the down projections")
def _(folder: Path) -> tuple[str, ...]:
    fuse(saved(QWEN3, folder), QWEN3(torch.bfloat16))
    edit(folder, lambda content: (content.pop(f"{LAYER}.down_proj"), None)[1])
    return f"{LAYER}.down_proj is missing", str(folder / SINGLE)


@case("FP8 without scales")
def _(folder: Path) -> tuple[str, ...]:
    make_8_bits(saved(V3, folder), (32, 16))
    edit(folder, lambda content: (content.pop(f"{UP}_scale_inv"), None)[1])
    return (
        f"{folder / SINGLE}: {UP} is of torch.float8_e4m3fn",
        f"its scales, {UP}_scale_inv or {UP}_scale, are missing",
    )


@case("FP8 with scales of other blocks")
def _(folder: Path) -> tuple[str, ...]:
    make_8_bits(saved(V3, folder), (32, 16))
    set_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [16, 16]})
    return str(folder / SINGLE), "_scale_inv", "blocks of 16 × 16"


@case("scales of a weight that is not FP8")
def _(folder: Path) -> tuple[str, ...]:
    changed(folder, lambda content: content.update({f"{UP}_scale_inv": torch.ones(1, 1)}))
    return f"{folder / SINGLE}: {UP} is of torch.bfloat16", f"{UP}_scale_inv"


@case("attention in FP8 without scales")
def _(folder: Path) -> tuple[str, ...]:
    name = "model.layers.1.self_attn.o_proj.weight"
    make_8_bits(saved(V3, folder), (32, 16))
    edit(folder, lambda content: (content.pop(f"{name}_scale_inv"), None)[1])
    return f"{folder / SINGLE}: {name} is of torch.float8_e4m3fn", f"{name}_scale_inv"


@pytest.fixture(params=CASES.values(), ids=CASES)
def broken(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, tuple[str, ...]]:
    return tmp_path, request.param(tmp_path)


def test_it_is_refused_by_name_before_anything_is_loaded(
    broken: tuple[Path, tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, words = broken
    loaded: list[str] = []
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: loaded.append("rest"))
    monkeypatch.setattr(ExpertCheckpoint, "read", lambda *_: loaded.append("experts"))
    with pytest.raises(KTAMXError) as refused:
        load_kt_model(folder, make_config("torch"))
    for word in words:
        assert word in str(refused.value)
    assert not loaded


def test_there_is_no_checkpoint(tmp_path: Path) -> None:
    saved(QWEN3, tmp_path)
    (tmp_path / SINGLE).rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(KTAMXError, match=f"{tmp_path} has neither {SINGLE} nor {INDEX}"):
        load_kt_model(tmp_path, make_config("torch"))


@pytest.mark.parametrize("change", ["shorter", "gone"])
def test_a_file_changes_after_it_was_checked(change: str, tmp_path: Path) -> None:
    _, file = sharded(tmp_path)
    checkpoint = ExpertCheckpoint(tmp_path, AutoConfig.from_pretrained(tmp_path))
    if change == "gone":
        shutil.move(file, tmp_path / "elsewhere")
    else:
        file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(KTAMXError, match=f"{file}.*{LAYER}"):
        checkpoint.read(LAYER, torch.bfloat16)


def test_a_file_that_changes_while_it_is_streamed_ends_the_loading(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error of the reading thread arrives, and the next load works."""
    _, file = sharded(tmp_path)
    whole = file.read_bytes()
    load = loading.load_rest

    def then_damage(*args: Any) -> object:
        model = load(*args)
        file.write_bytes(whole[:1000])
        return model

    monkeypatch.setattr(loading, "load_rest", then_damage)
    with pytest.raises(KTAMXError, match=f"{file.name}.*became shorter"):
        load_kt_model(tmp_path, make_config(backend, kt_lora_rank=4))
    monkeypatch.undo()
    file.write_bytes(whole)
    load_kt_model(tmp_path, make_config(backend, kt_lora_rank=4))
