"""Reading an exported adapter as its target will: safetensors' or PyTorch's own reader, and what the target expects.

Nothing of the code that wrote the file is asked: names and shapes are `check_shapes`', values `check_values`' and, of a
merged model, `check_merged`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..checkpoint.tensor_files import stored_tensors
from ..errors import KTAMXError
from ..peft_compat.internals import PREFIX
from ..system.files import as_path
from . import check_shapes as shapes_of
from .adapter import ADAPTER, CONFIG, Adapter, Projection
from .check_merged import MergedCheck
from .check_shapes import Shapes, fused_stem, sglang_stem
from .check_values import Factor, Values, by_pattern, by_two_numbers
from .config_file import read_config
from .convert import open_adapter
from .fused import FILE
from .stock_forms import stock_forms


def check_export(output: str | Path, adapter: str | Path, base: str | Path | None = None) -> list[str]:
    """Read what `convert` wrote, and compare it with the adapter that it was made from, value for value.

    Args:
        output: The export, of any format.
        adapter: Folder or file of the adapter.
        base: Folder of the base model; without it, the one that the adapter's settings name, if it is on this machine.

    Returns:
        What a program that reads the export must know, in sentences.

    Raises:
        KTAMXError: The export cannot be read, a tensor is missing, too many, of another shape or of other values than
            adapter and base give.
    """
    output = as_path(output, "output")
    if not output.exists():
        raise KTAMXError(f"{output} does not exist.")
    with open_adapter(adapter, base=base) as source:
        if output.suffix == ".pt":
            _check_pickle(output, source)
        elif output.name == FILE:
            _check_fused(output, source, None, by_pattern(source.config))
        elif not (output / CONFIG).exists():
            _check_merged(output, source, base)
        else:
            return _check_folder(output, source, base)
        return []


def _check_folder(output: Path, source: Adapter, base: str | Path | None) -> list[str]:
    config, file = read_config(output / CONFIG), output / ADAPTER
    rank = int(config["r"])
    common = by_two_numbers(config["lora_alpha"], rank)
    shapes = _stored(file)
    if (output / FILE).exists():
        _check_fused(output / FILE, source, rank, common)
        _compare(file, shapes, shapes_of.others(source, rank))
        with _values(file, source, common) as values:
            values.compare_others()
        return []
    if any(".experts.0." in name for name in shapes):
        single = shapes_of.of_single_experts(source, shapes_of.is_mixtral(shapes), rank)
        _compare(file, shapes, shapes_of.others(source, rank) | single)
        with _values(file, source, common) as values:
            values.compare_single_experts(shapes)
            values.compare_others()
        return []
    if any(".experts.gate_proj." in name or ".experts.down_proj." in name for name in shapes):
        _compare(file, shapes, shapes_of.of_kt(source))
        with _values(file, source, by_pattern(config)) as values:
            values.compare_stacks(_kt_stem, "A.weight", "B.weight")
            values.compare_others()
        return []
    place = base or source.config.get("base_model_name_or_path")
    plain = shapes_of.others(source) | shapes_of.of_stacks(source)
    _compare(file, shapes, shapes_of.of_peft(source, output, place) or plain)
    with _values(file, source, _by_parameter(config)) as values:
        values.compare_stock(stock_forms(base, source.config.get("base_model_name_or_path")))
        values.compare_others()
    if not source.experts:
        return []
    return ["It is for transformers 5 with PEFT 0.19 or later; SGLang and llama.cpp do not read it (--to per-expert)."]


def _kt_stem(one: Projection) -> str:
    return f"{PREFIX}{one.module}.lora_"


def _by_parameter(config: Mapping[str, Any]) -> Factor:
    """As stock PEFT decides: a linear layer that is named by its parameter is looked up by that."""
    named, factor = {*(config.get("target_parameters") or [])}, by_pattern(config)
    return lambda module: factor(f"{module}.weight" if f"{module}.weight" in named else module)


@contextmanager
def _values(file: Path, source: Adapter, factor: Factor) -> Iterator[Values]:
    with safe_open(str(file), framework="pt") as opened:
        yield Values(file, source, opened.get_tensor, factor)


def _check_fused(file: Path, source: Adapter, rank: int | None, factor: Factor) -> None:
    """fused_expert_lora.safetensors; `rank` that all projections are widened to."""
    _compare(file, _stored(file), shapes_of.of_fused(source, rank))
    with _values(file, source, factor) as values:
        values.compare_stacks(fused_stem, "a", "b")


def _check_pickle(file: Path, source: Adapter) -> None:
    """SGLang's .pt."""
    try:
        content = torch.load(file, weights_only=True, map_location="cpu")
        settings = content["metadata"]
        factor = by_two_numbers(float(settings["lora_alpha"]), int(settings["lora_rank"]))
        layers = {key: value for key, value in content.items() if key != "metadata"}
        tensors = {f"{layer}.{name}": t for layer, parts in layers.items() for name, t in parts.items()}
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError, EOFError) as error:
        raise KTAMXError(f"{file} cannot be read: {error}") from error
    _compare(file, shapes, shapes_of.of_sglang(source))
    values = Values(file, source, tensors.__getitem__, factor)
    values.compare_stacks(lambda one: sglang_stem(one.layer, one.name), "a", "b")
    values.compare_untrained()


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


def _check_merged(output: Path, source: Adapter, base: str | Path | None) -> None:
    """A checkpoint with the base's names, and what base and adapter give."""
    if base is None:
        raise KTAMXError(f"{output} is no adapter: to check a merged model, name its base.")
    check = MergedCheck(source, as_path(base, "base"))
    written = {file: stored_tensors(file) for file in sorted(output.glob("*.safetensors"))}
    shapes = {name: tensor.shape for tensors in written.values() for name, tensor in tensors.items()}
    _compare(output, shapes, check.shapes())
    for file, tensors in written.items():
        check.compare(file, tensors)
