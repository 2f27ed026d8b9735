"""Reading an exported adapter as its target will: safetensors' or PyTorch's own reader, and what the target expects.

Nothing of the code that wrote the file is asked. Names and shapes of a stock PEFT adapter are those that PEFT makes on
the base model; those of the other formats are written out here from the tensors of the training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..checkpoint.tensor_files import SINGLE, read_index, stored_tensors
from ..discovery import skeleton
from ..errors import KTAMXError
from ..peft_compat.internals import PREFIX
from ..shapes import ALIASES, PROJECTIONS
from ..system.files import as_path
from .adapter import ADAPTER, CONFIG, Adapter
from .config_file import read_config
from .convert import open_adapter
from .fused import FILE
from .verify import verify_adapter

Shapes = dict[str, tuple[int, ...]]
_SHORT = {name: short for short, name in ALIASES.items()}


def check_export(output: str | Path, adapter: str | Path, base: str | Path | None = None) -> list[str]:
    """Read what `convert` wrote, and compare it with the adapter that it was made from.

    Args:
        output: The export, of any format.
        adapter: Folder or file of the adapter.
        base: Folder of the base model; without it, the one that the adapter's settings name, if it is on this machine.

    Returns:
        What a program that reads the export must know, in sentences: settings that some readers leave out.

    Raises:
        KTAMXError: The export cannot be read, a tensor is missing, too many, of another shape or another value.
    """
    output = as_path(output, "output")
    if not output.exists():
        raise KTAMXError(f"{output} does not exist.")
    with open_adapter(adapter, base=base) as source:
        if output.suffix == ".pt":
            _compare(output, _pickled(output), _of_sglang(source))
            return []
        if output.name == FILE:
            _compare(output, _stored(output), _of_fused(source))
            return []
        if not (output / CONFIG).exists():
            _check_merged(output, source, base)
            return []
        shapes = _stored(output / ADAPTER)
        if (output / FILE).exists():
            _compare(output / FILE, _stored(output / FILE), _of_fused(source))
            _compare(output / ADAPTER, shapes, _others(source))
            return []
        if any(".experts.0." in name for name in shapes):
            _compare(output / ADAPTER, shapes, _others(source) | _of_single_experts(source, shapes))
            _compare_values(output / ADAPTER, source)
            return _one_scaling(source.config)
        if any(".experts.gate_proj." in name or ".experts.down_proj." in name for name in shapes):
            verify_adapter(output)
            return []
        place = base or source.config.get("base_model_name_or_path")
        expected = _of_peft(output, place) or _others(source) | _of_stacks(source)
        _compare(output / ADAPTER, shapes, expected)
        return _without_transformers_5(source)


def _stored(file: Path) -> Shapes:
    """Names and shapes of a safetensors file, by safetensors' own reader; every tensor is read and is finite."""
    shapes: Shapes = {}
    try:
        with safe_open(str(file), framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 -- no mapping
                tensor = opened.get_tensor(name)
                if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
                    raise KTAMXError(f"{file}: {name} holds values that are not finite.")
                shapes[name] = tuple(tensor.shape)
    except (SafetensorError, OSError) as error:
        raise KTAMXError(f"{file} cannot be read: {error}") from error
    return shapes


def _pickled(file: Path) -> Shapes:
    try:
        content = torch.load(file, weights_only=True, map_location="cpu")
        layers = {key: value for key, value in content.items() if key != "metadata"}
        return {f"{layer}.{name}": tuple(t.shape) for layer, tensors in layers.items() for name, t in tensors.items()}
    except (OSError, RuntimeError, ValueError, AttributeError, EOFError) as error:
        raise KTAMXError(f"{file} cannot be read: {error}") from error


def _compare(file: Path, shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    missing, more = sorted(set(expected) - set(shapes)), sorted(set(shapes) - set(expected))
    if missing:
        raise KTAMXError(
            f"{file} lacks {len(missing)} of {len(expected)} tensors, {missing[0]} for one. Export it again."
        )
    if more:
        raise KTAMXError(f"{file} has {len(more)} tensors that its reader does not know, {more[0]} for one.")
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise KTAMXError(f"{file}: {name} is {shapes[name]}; its reader expects {shape}.")


def _others(source: Adapter) -> Shapes:
    return {name: tensor.shape for name, tensor in source.others.items()}


def _of_fused(source: Adapter) -> Shapes:
    stem = {one.module: f"layers.{one.layer}.experts.{one.name.split('_')[0]}_lora" for one in source.experts.values()}
    return {f"{stem[one.module]}_{side}": t.shape for one in source.experts.values() for side, t in _sides(one)}


def _sides(one: Any) -> Iterator[tuple[str, Any]]:
    yield "a", one.a
    yield "b", one.b


def _of_sglang(source: Adapter) -> Shapes:
    """Of each layer six tensors of one rank, whichever projections were trained."""
    ones = list(source.experts.values())
    rank, experts = max(one.rank for one in ones), ones[0].a.shape[0]
    above = [one for one in ones if one.name != "down_proj"]
    down = [one for one in ones if one.name == "down_proj"]
    hidden, inner = (above[0].a.shape[2], above[0].b.shape[1]) if above else (down[0].b.shape[1], down[0].a.shape[2])
    shapes: Shapes = {}
    for layer in {one.layer for one in ones}:
        for name in PROJECTIONS:
            into, out = (inner, hidden) if name == "down_proj" else (hidden, inner)
            stem = f"layer_{layer}.{name.split('_')[0]}_lora"
            shapes |= {f"{stem}_a": (experts, rank, into), f"{stem}_b": (experts, out, rank)}
    return shapes


def _single_names(one: Any, expert: int, mixtral: bool) -> str:
    experts = one.experts.replace(".mlp.experts", ".block_sparse_moe.experts") if mixtral else one.experts
    return f"{PREFIX}{experts}.{expert}.{_SHORT[one.name] if mixtral else one.name}.lora_"


def _of_single_experts(source: Adapter, shapes: Mapping[str, Any]) -> Shapes:
    mixtral = any(".block_sparse_moe.experts." in name for name in shapes)
    return {
        f"{_single_names(one, expert, mixtral)}{side.upper()}.weight": tensor.shape[1:]
        for one in source.experts.values()
        for side, tensor in _sides(one)
        for expert in range(tensor.shape[0])
    }


def _compare_values(file: Path, source: Adapter) -> None:
    """Each expert's matrices are those of the training, to the bit."""
    with safe_open(str(file), framework="pt") as opened:
        mixtral = any(".block_sparse_moe.experts." in name for name in opened.keys())  # noqa: SIM118 -- no mapping
        for one in source.experts.values():
            for side, lazy in _sides(one):
                for expert, expected in enumerate(lazy.load().unbind(0)):
                    name = f"{_single_names(one, expert, mixtral)}{side.upper()}.weight"
                    if not torch.equal(opened.get_tensor(name), expected):
                        raise KTAMXError(f"{file}: {name} is of other values than {source.where}'s. Export it again.")


def _of_stacks(source: Adapter) -> Shapes:
    """Of a stock PEFT file, where the base model is not at hand: plain experts."""
    shapes: Shapes = {}
    for experts, projections in source.layers().items():
        above = [projections[name] for name in PROJECTIONS[:2] if name in projections]
        down = projections.get("down_proj")
        if above:
            rank = sum(one.rank for one in above) * above[0].a.shape[0]
            stem = f"{PREFIX}{experts}.{'base_layer.' if down else ''}lora_"
            shapes |= {
                f"{stem}A.weight": (rank, above[0].a.shape[2]),
                f"{stem}B.weight": (2 * above[0].b.shape[1], rank),
            }
        if down:
            rank, stem = down.rank * down.a.shape[0], f"{PREFIX}{experts}.lora_"
            shapes |= {f"{stem}A.weight": (rank, down.a.shape[2]), f"{stem}B.weight": (down.b.shape[1], rank)}
    return shapes


def _of_peft(output: Path, base: Any) -> Shapes | None:
    """Names and shapes that PEFT itself gives the adapter's tensors on the base model, without memory for it.

    Returns None where the base's configuration is not on this machine.
    """
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from transformers import AutoConfig

    read_config(output / CONFIG)
    try:
        config = AutoConfig.from_pretrained(base, local_files_only=True)
    except (OSError, ValueError, TypeError):
        return None
    model = get_peft_model(skeleton(config), LoraConfig.from_pretrained(output), low_cpu_mem_usage=True)
    state: dict[str, Tensor] = get_peft_model_state_dict(model)
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _check_merged(output: Path, source: Adapter, base: str | Path | None) -> None:
    """A checkpoint with the base's names and shapes, its tensors readable and finite."""
    if base is None:
        raise KTAMXError(f"{output} is no adapter: to check a merged model, name its base.")
    before: Shapes = {}
    for file in list(dict.fromkeys(read_index(as_path(base, "base")).values())) or [SINGLE]:
        before |= {name: tensor.shape for name, tensor in stored_tensors(as_path(base, "base") / file).items()}
    after: Shapes = {}
    for written in sorted(output.glob("*.safetensors")):
        after |= _stored(written)
    grown = {name: shape for name, shape in after.items() if name not in before}
    own = {
        module for module, tensors in source.other_modules().items() if tensors.whole or tensors.tokens or tensors.lora
    }
    # What the adapter trains outside the experts may part tied embeddings, or bring rows.
    changed = {name for name in (*before, *after) if name.rpartition(".")[0] in own}
    _compare(output, after, {n: (after.get(n, s) if n in changed else s) for n, s in (before | grown).items()})


def _one_scaling(config: Mapping[str, Any]) -> list[str]:
    """SGLang and llama.cpp read lora_alpha and nothing else of an adapter's scaling."""
    notes = []
    patterns = [name for name in ("rank_pattern", "alpha_pattern") if config.get(name)]
    if config.get("use_rslora"):
        notes.append("SGLang and llama.cpp do not read use_rslora: their adapter would be sqrt(r) times too weak.")
    if patterns:
        notes.append(f"SGLang and llama.cpp do not read {' and '.join(patterns)}: serve it merged there.")
    return notes


def _without_transformers_5(source: Adapter) -> list[str]:
    if not source.experts:
        return []
    return ["It is for transformers 5 with PEFT 0.19 or later; SGLang and llama.cpp do not read it (--to per-expert)."]
