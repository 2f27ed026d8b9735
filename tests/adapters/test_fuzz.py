"""Files of strangers: whatever is in them, this package's error or none, soon, in little memory, and nothing elsewhere.

Seeded, so that a failure can be found again: the message names the seed of the case.
"""

from __future__ import annotations

import json
import random
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from kt_hf import KTAMXError, read_placement, verify_adapter
from kt_hf.adapters import MANIFEST, convert, last_complete, open_adapter
from kt_hf.adapters.manifest import write_manifest
from kt_hf.checkpoint.tensor_files import TensorFiles, stored_tensors
from kt_hf.placement.order import PLACEMENT
from kt_hf.quantized.manifest import MANIFEST as QUANTIZED
from kt_hf.quantized.manifest import read_manifest as read_quantized

ADAPTER, CONFIG, INDEX = "adapter_model.safetensors", "adapter_config.json", "model.safetensors.index.json"
EXPERTS, E, H, I, R = "base_model.model.model.layers.0.mlp.experts", 3, 8, 4, 2  # noqa: E741
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "8", "(",
    "a" * 3000, "\x00", "\x1b[31m", "\ud800", "..", "../x", "/etc/passwd", "(a+)+$", "(a|a)*b", ".*" * 30, "[" * 200,
    "all-linear", [],
    [None], [1], [[]], ["("], ["q_proj"], [""], {}, {"(": 1}, {"a": None}, {"q_proj": "x"}, {"": 4}, {"(x+)+": 2},
    {"q_proj": 2**40}, {"q_proj": float("nan")}, {"embed_tokens": [-1]}, [-1, 10**30], [[[[[[[]]]]]]],
)  # fmt: skip
SECONDS, MEMORY = 5.0, 2**30


def tensors(kind: str) -> dict[str, Tensor]:
    """A small adapter's tensors, in one of the formats."""
    content: dict[str, Tensor] = {}
    for name, (into, out) in {"gate_proj": (H, I), "up_proj": (H, I), "down_proj": (I, H)}.items():
        a, b = torch.ones(E, R, into), torch.ones(E, out, R)
        if kind == "kt":
            content |= {f"{EXPERTS}.{name}.lora_A.weight": a, f"{EXPERTS}.{name}.lora_B.weight": b}
        else:
            for e in range(E):
                key = f"{EXPERTS}.{e}.{name}"
                content |= {f"{key}.lora_A.weight": a[e].clone(), f"{key}.lora_B.weight": b[e].clone()}
    query = "base_model.model.model.layers.0.self_attn.q_proj"
    content |= {f"{query}.lora_A.weight": torch.ones(R, H), f"{query}.lora_B.weight": torch.ones(H, R)}
    return {**content, "base_model.model.model.embed_tokens.weight": torch.ones(7, H)}


def config(**changes: Any) -> dict[str, Any]:
    return {
        "peft_type": "LORA", "r": R, "lora_alpha": 4, "target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"],
        "lora_dropout": 0.0, "bias": "none", "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {},
        "modules_to_save": ["embed_tokens"], "exclude_modules": None, "layers_to_transform": None,
        "layers_pattern": None, "target_parameters": None, "trainable_token_indices": None,
        "init_lora_weights": True, "use_dora": False, "base_model_name_or_path": "base", "task_type": "CAUSAL_LM",
        **changes,
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter of format kt with its manifest, in a folder that is the only one to be written."""
    path = tmp_path / "inside" / "checkpoint-5"
    path.mkdir(parents=True)
    save_file(tensors("kt"), path / ADAPTER)
    (path / CONFIG).write_text(json.dumps(config()))
    write_manifest(path, None)
    (tmp_path / "inside" / "victim").write_text("whole")
    return path


def written(path: Path) -> dict[str, int]:
    return {str(file): file.stat().st_mtime_ns for file in sorted(path.rglob("*"))}


@contextmanager
def watched(case: object) -> Iterator[None]:
    """Nothing but a KTAMXError, and that soon."""
    start = time.process_time()
    message = "none"
    try:
        yield
    except KTAMXError as error:
        message = str(error)
    except Exception as error:
        raise AssertionError(f"{case}: {type(error).__name__}: {error}") from error
    assert message, case
    assert message.isprintable(), (case, message)
    assert time.process_time() - start < SECONDS, case


def memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def mutated(rng: random.Random, value: Any, depth: int = 0) -> Any:
    """The value with something in it replaced, left out, doubled or nested."""
    if isinstance(value, dict) and value and (depth == 0 or rng.random() < 0.8):
        key = rng.choice(sorted(value))
        changed = dict(value)
        kind = rng.random()
        if kind < 0.1:
            del changed[key]
        elif kind < 0.2:
            changed[rng.choice(("", "..", "../x", "a" * 600, "\x1b[0m", "9" * 4400, key + "x"))] = changed.pop(key)
        else:
            changed[key] = mutated(rng, changed[key], depth + 1)
        return changed
    if isinstance(value, list) and value and rng.random() < 0.6:
        index = rng.randrange(len(value))
        return [*value[:index], mutated(rng, value[index], depth + 1), *value[index + 1 :]]
    return rng.choice(ODD)


def text_of(rng: random.Random, content: Any) -> bytes:
    """Its JSON, now and then damaged."""
    data = json.dumps(content).encode("utf-8", "surrogatepass")
    kind = rng.random()
    if kind < 0.03:
        return data[: rng.randrange(len(data))]
    if kind < 0.06:
        return bytes(rng.randrange(256) for _ in range(20))
    if kind < 0.08:
        return b"[" * rng.choice((70, 5000, 100_000)) + data
    if kind < 0.12:
        at = rng.randrange(len(data))
        return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
    return data


def fuzz_configs(folder: Path, count: int) -> None:
    (folder / MANIFEST).unlink()
    other = folder.parent / "per-expert"
    other.mkdir()
    save_file(tensors("per-expert"), other / ADAPTER)
    for seed in range(count):
        rng = random.Random(seed)
        content: Any = config()
        for _ in range(rng.randrange(1, 4)):
            content = mutated(rng, content)
            if not isinstance(content, dict):
                break
        path = rng.choice((folder, other))
        (path / CONFIG).write_bytes(text_of(rng, content))
        with watched(("config", seed)), open_adapter(path) as adapter:
            adapter.check()
            adapter.layers()


def header_of(content: dict[str, Tensor]) -> tuple[dict[str, Any], bytes]:
    header: dict[str, Any] = {}
    data = b""
    for name, tensor in content.items():
        header[name] = {
            "dtype": "F32", "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + tensor.nbytes],
        }  # fmt: skip
        data += tensor.numpy().tobytes()
    return header, data


def fuzz_headers(folder: Path, count: int) -> None:
    (folder / MANIFEST).unlink()
    for seed in range(count):
        rng = random.Random(seed)
        header, data = header_of(tensors(rng.choice(("kt", "per-expert"))))
        changed: Any = header
        for _ in range(rng.randrange(0, 3)):
            changed = mutated(rng, changed) if isinstance(changed, dict) else changed
        if isinstance(changed, dict) and rng.random() < 0.3:
            key = rng.choice(sorted(changed, key=str) or ["x"])
            number = rng.choice(("300000000000", "99999999999999999999", "9", "9" * 5000, "007"))
            changed = {name.replace(".0.", f".{number}.") if name == key else name: v for name, v in changed.items()}
        text = text_of(rng, changed)
        length = len(text) if rng.random() < 0.95 else rng.choice((0, 2**40, 2**63, 7))
        if rng.random() < 0.1:
            data = data[: rng.randrange(len(data))]
        (folder / ADAPTER).write_bytes(length.to_bytes(8, "little") + text + data)
        with watched(("header", seed)):
            for tensor in stored_tensors(folder / ADAPTER).values():
                tensor.load()
        with watched(("adapter", seed)), open_adapter(folder) as adapter:
            adapter.check(finite=True)


def fuzz_manifests(folder: Path, count: int) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / "trainer_state.json").write_text('{"global_step": 5}')
    placement = {
        "format_version": 1, "source": "x", "share": [0.5, 0.5], "layers": {"0": [1, 0], "1": [0, 1]},
    }  # fmt: skip
    mark = {"shape": [4, 4], "dtype": "bfloat16", "sha256": "0" * 64}
    layer = {"folder": "layer_0", "shape": [2, 4, 4], "source": {"down_proj": mark}, "files": {"a/b.kt": [4, "0" * 64]}}
    quantized = {
        "format": 1, "backend": "AMXInt8", "backward": True, "pools": 1, "kt_kernel": "0.7", "variant": "amx",
        "model": "m", "model_type": "t", "config_sha256": "0" * 64, "marks": {"norm": mark}, "layers": {"l": layer},
    }  # fmt: skip
    index = {"metadata": {}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    state = {"global_step": 5, "log_history": [{"loss": 1.0, "step": 1}]}
    files: dict[str, tuple[dict[str, Any], Callable[[], object]]] = {
        MANIFEST: (manifest, lambda: verify_adapter(folder)),
        PLACEMENT: (placement, lambda: read_placement(folder)),
        QUANTIZED: (quantized, lambda: read_quantized(folder / QUANTIZED)),
        INDEX: (index, lambda: TensorFiles(folder)),
        "trainer_state.json": (state, lambda: last_complete(folder.parent)),
    }
    for seed in range(count):
        rng = random.Random(seed)
        name = list(files)[seed % len(files)]
        content, read = files[name]
        changed: Any = content
        for _ in range(rng.randrange(1, 3)):
            changed = mutated(rng, changed) if isinstance(changed, dict) else changed
        (folder / name).write_bytes(text_of(rng, changed))
        with watched((name, seed)):
            read()
        if name == MANIFEST:
            with watched(("last_complete", seed)):
                last_complete(folder.parent)
            (folder / name).write_text(json.dumps(manifest))
        else:
            (folder / name).unlink()


FUZZ = {"configs": (fuzz_configs, 20_000), "headers": (fuzz_headers, 5_000), "manifests": (fuzz_manifests, 1_000)}


def run(name: str, folder: Path, share: int) -> None:
    fuzz, count = FUZZ[name]
    before, peak = written(folder.parent.parent), memory()
    fuzz(folder, count // share)
    assert memory() - peak < MEMORY
    elsewhere = {path for path in written(folder.parent.parent) if not path.startswith(str(folder.parent))}
    assert elsewhere == {path for path in before if not path.startswith(str(folder.parent))}
    assert (folder.parent / "victim").read_text() == "whole"


@pytest.mark.parametrize("name", FUZZ)
def test_a_few(name: str, folder: Path) -> None:
    run(name, folder, 40)


@pytest.mark.slow
@pytest.mark.parametrize("name", FUZZ)
def test_many(name: str, folder: Path) -> None:
    run(name, folder, 1)


def test_the_whole_ones_are_read(folder: Path) -> None:
    """So that the refusals are due to the changes."""
    assert verify_adapter(folder)
    with open_adapter(folder) as adapter:
        assert len(adapter.experts) == 3
    save_file(tensors("per-expert"), folder / ADAPTER)
    (folder / MANIFEST).unlink()
    with open_adapter(folder) as adapter:
        assert adapter.format == "per-expert"
        assert len(adapter.experts) == 3


def base_that_names(folder: Path, shard: str) -> Path:
    """A base checkpoint whose index says that a tensor is in this file, which is there."""
    base = folder / "base"
    base.mkdir()
    save_file({"model.norm.weight": torch.ones(4)}, base / "model-1.safetensors")
    target = base / shard
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        save_file({"lm_head.weight": torch.ones(4, 4)}, target)
    weight_map = {"model.norm.weight": "model-1.safetensors", "lm_head.weight": shard}
    (base / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return base


@pytest.mark.parametrize("shard", ["../outside.safetensors", "sub/outside.safetensors", "/{}/outside.safetensors"])
def test_no_path_of_an_index_leaves_the_folder(shard: str, folder: Path, tmp_path: Path) -> None:
    shard = shard.replace("/{}", str(tmp_path / "far"))
    base = base_that_names(tmp_path, shard)
    before = written(tmp_path)
    for use in (lambda: convert(folder, tmp_path / "merged", to="merged", base=base), lambda: TensorFiles(base)):
        with pytest.raises(KTAMXError, match=r"weight_map\.lm_head.*is no file name"):
            use()
    assert written(tmp_path) == before


@pytest.mark.parametrize("shard", ["\x1b[2J.safetensors", "a\nb.safetensors", "\u202eerom.safetensors", "a\0b"])
def test_a_file_name_that_cannot_be_printed_is_refused(shard: str, folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": shard}}))
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][shard] = manifest["files"].pop(CONFIG)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    for use in (lambda: TensorFiles(folder), lambda: verify_adapter(folder)):
        with pytest.raises(KTAMXError, match="cannot be printed") as caught:
            use()
        assert str(caught.value).isprintable()


def test_a_number_in_a_name_takes_no_memory(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    content = tensors("per-expert")
    for number, reason in (("300000000000", "is no name of a tensor"), ("999999999", "has no lora_A")):
        renamed = {key.replace("experts.2.", f"experts.{number}."): value for key, value in content.items()}
        save_file(renamed, folder / ADAPTER)
        peak = memory()
        with pytest.raises(KTAMXError, match=reason), open_adapter(folder):
            pass
        assert memory() - peak < 2**26
