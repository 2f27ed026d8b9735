"""Input and output embeddings of a merged checkpoint: resized, tied, or no longer tied.

Where the base ties them, it has one tensor for both. An adapter may leave them equal (retrained tokens, which PEFT ties
too, or both trained as one with ensure_weight_tying), and may not: trained or adapted is one of them, or each apart.
The checkpoint then gets a tensor for each, and its config.json says that they are two.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import KTAMXError
from ..system.files import Lazy, Part, write_json
from ..system.json_fields import read_json
from .adapter import FLOATING, Adapter, token_rows
from .base_names import BaseNames
from .merged_module import merged_weight
from .other_tensors import OtherModule


@dataclass
class EmbeddingPlan:
    """What becomes of the embeddings.

    Attributes:
        modules: The adapter's modules that are served here.
        parts: Tensor of the base -> what is written in its place.
        added: Shard -> what is written after its tensors.
        more_bytes: By which the checkpoint grows.
        config: What is to change in config.json.
    """

    modules: set[str] = field(default_factory=set)
    parts: dict[str, Part] = field(default_factory=dict)
    added: dict[str, list[Part]] = field(default_factory=dict)
    more_bytes: int = 0
    config: dict[str, Any] = field(default_factory=dict)

    def write_config(self, folder: Path) -> None:
        """Change config.json, where the text model's settings are.

        Raises:
            KTAMXError: transformers does not read it as meant.
        """
        if not self.config:
            return
        from transformers import AutoConfig

        path = folder / "config.json"
        content = dict(read_json(path).object().values())
        content |= self.config
        for name in ("text_config", "llm_config", "language_config"):
            if isinstance(content.get(name), dict):
                content[name] = {**content[name], **self.config}
        write_json(path, content)
        read = AutoConfig.from_pretrained(folder).get_text_config()
        wrong = {name: value for name, value in self.config.items() if getattr(read, name, None) != value}
        if wrong:
            raise KTAMXError(f"{path}: {wrong} cannot be set in a configuration of this kind.")


def plan_embeddings(
    adapter: Adapter, names: BaseNames, tensors: Mapping[str, Mapping[str, Lazy]], base: Path
) -> EmbeddingPlan:
    """Decide what becomes of the embeddings, and check that it can be done.

    Args:
        adapter: Of any format.
        names: Of the base checkpoint.
        tensors: Shard -> its tensors.
        base: For messages.

    Raises:
        KTAMXError: What the adapter has for the embeddings does not fit the base or one another.
    """
    plan, modules = EmbeddingPlan(), adapter.other_modules()
    known = names.embeddings
    if known is None:
        _refuse_without_config(adapter, modules, tensors, names, base)
        return plan
    first, second = modules.get(known.input or ""), modules.get(known.output or "")
    if known.input is None or (first is None and second is None):
        return plan
    plan.modules = {module.name for module in (first, second) if module}
    places = _places(names, tensors)
    first = first or OtherModule(known.input)
    stored = _checked(adapter, first, places.get(known.input), base)
    if known.output is None:
        _put(plan, adapter, first, first, stored, places[known.input])
        return plan
    second = second or OtherModule(known.output)
    if known.tied:
        _share_base(adapter, first, second)
        _share_base(adapter, second, first)
    stored_output = None if known.tied else _checked(adapter, second, places.get(known.output), base)
    rows = {_rows(first, stored), _rows(second, stored_output or stored)}
    if known.tied and _stay_tied(first, second):
        rows = {_rows(first, stored)}
        _put(plan, adapter, first, first, stored, places[known.input])
    else:
        shared = first if known.tied and second.tokens is None and first.tokens is not None else second
        _put(plan, adapter, first, first, stored, places[known.input])
        _put(
            plan,
            adapter,
            second,
            shared,
            stored_output or stored,
            places.get(known.output) or (places[known.input][0], None),
        )
        if known.tied:
            plan.config["tie_word_embeddings"] = False
    if len(rows) > 1:
        raise KTAMXError(
            f"{adapter.where}: the vocabulary was resized, and the adapter has only one of {known.input} and "
            f"{known.output} of its new size: merged they would not go together. Train with modules_to_save of both."
        )
    if rows != {stored.shape[0]}:
        plan.config["vocab_size"] = rows.pop()
    return plan


_Place = tuple[str, str | None]


def _places(names: BaseNames, tensors: Mapping[str, Mapping[str, Lazy]]) -> dict[str, tuple[str, str, Lazy]]:
    """Input and output embeddings -> shard, name in the checkpoint, and the tensor."""
    assert names.embeddings is not None
    modules = {names.embeddings.input, names.embeddings.output}
    places: dict[str, tuple[str, str, Lazy]] = {}
    for shard, shard_tensors in tensors.items():
        for name, tensor in shard_tensors.items():
            target = names.find(name, tensor.shape)
            if target.module in modules and target.parameter == "weight" and not target.operations:
                places[target.module] = shard, name, tensor
    return places


def _checked(adapter: Adapter, module: OtherModule, place: tuple[str, str, Lazy] | None, base: Path) -> Lazy:
    """The base's tensor for a module, which what the adapter has must fit."""
    if place is None:
        raise KTAMXError(f"base={str(base)!r} has no weights of {module.name}, which {adapter.where} changes.")
    _, name, tensor = place
    if tensor.dtype not in FLOATING or len(tensor.shape) != 2:
        raise KTAMXError(f"The base's {name} is {tensor.dtype} {tensor.shape}: an adapter cannot be merged into it.")
    if set(module.whole) - {"weight"}:
        raise KTAMXError(f"{adapter.where}: {module.name} has {', '.join(module.whole)}, which the base has not.")
    return tensor


def _share_base(adapter: Adapter, module: OtherModule, other: OtherModule) -> None:
    """Of tied embeddings that were resized PEFT may save the one that has LoRA or retrained tokens: both are it."""
    trained = other.name.endswith(tuple(adapter.config.get("modules_to_save") or ["\0"]))
    if not module.whole and "weight" in other.whole and not trained:
        module.whole["weight"] = other.whole["weight"]


def _rows(module: OtherModule, stored: Lazy) -> int:
    whole = module.whole.get("weight")
    return (whole or stored).shape[0]


def _stay_tied(first: OtherModule, second: OtherModule) -> bool:
    """Whether both come out equal."""
    if first.lora or second.lora:
        return False
    same_rows = second.tokens is None or _equal(first.tokens, second.tokens)
    return same_rows and _equal(first.whole.get("weight"), second.whole.get("weight"))


def _equal(a: Lazy | None, b: Lazy | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and torch.equal(a.load(), b.load())


def _put(
    plan: EmbeddingPlan,
    adapter: Adapter,
    module: OtherModule,
    tokens_of: OtherModule,
    stored: Lazy,
    place: tuple[str, str, Lazy] | _Place,
) -> None:
    """Plan one tensor: in the place of the base's, or added to a shard under the model's own name."""
    shard, name = place[0], place[1]
    shape = (_rows(module, stored), stored.shape[1])
    _check_shape(adapter, module, tokens_of, shape)

    def make() -> Iterable[Tensor]:
        return [merged_weight(adapter, module, "weight", stored.load(), tokens_of)]

    part = Part({name or f"{module.name}.weight": (stored.dtype, shape)}, make)
    size = shape[0] * shape[1] * stored.dtype.itemsize
    if name is None:
        plan.added.setdefault(shard, []).append(part)
        plan.more_bytes += size
    else:
        plan.parts[name] = part
        plan.more_bytes += size - stored.shape[0] * stored.shape[1] * stored.dtype.itemsize


def _check_shape(adapter: Adapter, module: OtherModule, tokens_of: OtherModule, shape: tuple[int, int]) -> None:
    whole = module.whole.get("weight")
    wrong = whole is not None and whole.shape != shape
    if "lora_embedding_A" in module.lora:
        sides = (module.lora["lora_embedding_A"].shape[1], module.lora["lora_embedding_B"].shape[0])
        wrong |= sides != shape
    elif module.lora:
        wrong |= (module.lora["lora_B.weight"].shape[0], module.lora["lora_A.weight"].shape[1]) != shape
    if tokens_of.tokens is not None:
        rows = token_rows(adapter.config, tokens_of.name) or []
        wrong |= tokens_of.tokens.shape[1] != shape[1] or max([*rows, 0]) >= shape[0]
    if wrong:
        raise KTAMXError(f"{adapter.where}: what it has for {module.name} does not fit the base's, of shape {shape}.")


def _refuse_without_config(
    adapter: Adapter,
    modules: Mapping[str, OtherModule],
    tensors: Mapping[str, Mapping[str, Lazy]],
    names: BaseNames,
    base: Path,
) -> None:
    """Without a configuration it is unknown whether embeddings are tied."""
    unsure = [name for name, module in modules.items() if "lora_embedding_A" in module.lora or module.tokens]
    unsure += [name for name, module in modules.items() if module.whole and name.endswith(("embed_tokens", "lm_head"))]
    if unsure:
        raise KTAMXError(
            f"base={str(base)!r} has no config.json, so it cannot be told whether its embeddings are tied, and "
            f"{adapter.where} changes {unsure[0]}."
        )
