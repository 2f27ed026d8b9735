"""LoRA of experts that ranks own, gathered: what is saved is of all experts, the same for any number of ranks."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ..experts.holders import owned_lora
from ..experts.layer import kt_layers
from ..ranks import Kind, Place, Ranks

_OF_ADAPTER = re.compile(r"\.(lora_|modules_to_save\.|trainable_tokens_)")


def ranks_of(model: Any) -> Ranks | None:
    """The processes that a model's experts are divided among; None where nothing is divided."""
    layers = kt_layers(model) if isinstance(model, nn.Module) else []
    exchange = layers[0].exchange if layers else None
    return exchange.ranks if exchange else None


@contextlib.contextmanager
def whole_lora(model: Any) -> Iterator[Ranks | None]:
    """While this is open, rank 0's state of the model holds the experts' LoRA of all ranks. All ranks open it together.

    Inside one that is open it does nothing; nor for a model whose experts are not divided. An error of one rank is told
    to the others at the end.

    Raises:
        KTAMXError: Another rank has failed, has ended, or does something else: a save by rank 0 alone, for example.
    """
    ranks = ranks_of(model)
    if ranks is None or ranks.gathered:
        yield ranks
        return
    holders = list(owned_lora(model))
    ranks.agree(Place(Kind.SAVING))
    ranks.gathered = True
    try:
        for holder in holders:
            parts = ranks.gather(holder.weight)
            holder.whole = None if parts is None else torch.cat(parts)
        with _whole_dense(model, ranks):
            yield ranks
    except Exception as error:
        ranks.agree(Place(Kind.SAVED), failure=error)
        raise
    finally:
        ranks.gathered = False
        for holder in holders:
            holder.whole = None
    ranks.agree(Place(Kind.SAVED))


@contextlib.contextmanager
def _whole_dense(model: nn.Module, ranks: Ranks) -> Iterator[None]:
    """While this is open, rank 0's state has whole tensors of an adapter where FSDP2 has sharded its parameters."""
    for module in model.modules():
        if isinstance(module, FSDPModule):  # some are whole after an evaluation, and rank 0's state would shard its own
            module.reshard()
    embeddings = {
        id(embedding.weight)
        for get in ("get_input_embeddings", "get_output_embeddings")
        if (embedding := getattr(model, get, lambda: None)()) is not None
    }
    by_name: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor) and (_OF_ADAPTER.search(name) or id(parameter) in embeddings):
            whole = parameter.full_tensor().detach()  # of all ranks together
            if ranks.rank == 0:
                by_name[name] = ranks.dense[id(parameter)] = whole.cpu()

    def replace(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        state.update({prefix + name: whole for name, whole in by_name.items() if prefix + name in state})

    handle = model.register_state_dict_post_hook(replace)
    try:
        yield
    finally:
        handle.remove()
        ranks.dense.clear()


@contextlib.contextmanager
def outlined_lora(model: nn.Module) -> Iterator[None]:
    """While this is open, a model's state has the shapes of all experts' LoRA, on the meta device. No rank waits."""
    holders = list(owned_lora(model))
    for holder in holders:
        holder.whole = holder.weight.detach().new_empty(holder.whole_shape, device="meta")
    try:
        yield
    finally:
        for holder in holders:
            holder.whole = None


def whole_shapes(model: nn.Module) -> dict[int, tuple[int, ...]]:
    """Shapes that differ in the file: of each owned parameter, by its `id`, that of the tensor of all experts."""
    return {id(holder.weight): holder.whole_shape for holder in owned_lora(model)}


def whole_values(model: nn.Module) -> dict[int, Tensor]:
    """The gathered tensors, by the `id` of the parameter that is a part of each; {} outside of `whole_lora`."""
    ranks = ranks_of(model)
    dense = ranks.dense if ranks is not None else {}
    return dense | {id(holder.weight): holder.whole for holder in owned_lora(model) if holder.whole is not None}
