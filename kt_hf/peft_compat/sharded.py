"""FSDP2 for what is not experts, by accelerate: owned LoRA stays with its rank, and checkpoints are those of DDP.

accelerate shards the dense part (`fully_shard`): its parameters, gradients and moments are DTensors then, owned LoRA's
plain tensors. A checkpoint holds whole tensors, so that a run goes on by FSDP2 or DDP, on any number of ranks.

The functions that take `original` are replacements of the table `patches.PATCHES`: `original` is the function they
stand for, and the other arguments are that function's. A model that is not divided gets what `original` does.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from ..adapters.whole import ranks_of
from ..errors import KTAMXConfigError
from ..experts.exchange import meet_before_pass
from ..experts.holders import owned_lora
from ..ranks import Ranks

_TWO = "fsdp_version: 2 (configs/accelerate/fsdp2.yaml), or leave FSDP out: DDP takes what is not experts"


def is_sharded(model: Any) -> bool:
    """Whether FSDP2 has sharded what is not experts of a model whose experts are divided among ranks."""
    return ranks_of(model) is not None and any(isinstance(p, DTensor) for p in model.parameters())


def refuse_flat(original: Callable[..., Any], accelerator: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    """Replaces `Accelerator.prepare_model`, by which FSDP1 would flatten owned LoRA together with the rest.

    Raises:
        KTAMXConfigError: Saying what takes its place.
    """
    state = accelerator.state
    if str(state.distributed_type).endswith("FSDP") and not state.is_fsdp2 and ranks_of(model) is not None:
        raise KTAMXConfigError(
            "fsdp_version=1: FSDP1 flattens parameters of all ranks into one, and experts' LoRA is of one rank each. "
            f"Set {_TWO}."
        )
    return original(accelerator, model, *args, **kwargs)


def shard_the_rest(original: Callable[..., Any], accelerator: Any, *args: Any) -> Any:
    """Replaces `Accelerator._prepare_fsdp2`: owned LoRA is left alone, and optimizers take both kinds of parameters.

    Raises:
        KTAMXConfigError: Settings of FSDP that experts cannot follow.
    """
    model = next((one for one in args if isinstance(one, nn.Module) and ranks_of(one) is not None), None)
    if model is None:
        return original(accelerator, *args)
    plugin = accelerator.state.fsdp_plugin
    if plugin.cpu_ram_efficient_loading:
        raise KTAMXConfigError(
            "fsdp_cpu_ram_efficient_loading=True: rank 0 alone would have weights, and each rank has its own experts. "
            "Set fsdp_cpu_ram_efficient_loading: false; load_kt_model reads no expert that another rank owns."
        )
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise KTAMXConfigError(
            "fsdp_offload_params=True has not been tried with experts that are divided among ranks. Set "
            "fsdp_offload_params: false; experts are in host memory by themselves (kt_expert_placement)."
        )
    given = plugin.ignored_modules
    if isinstance(given, str):
        given = [module for name, module in model.named_modules() if re.fullmatch(given, name)]
    owned = list(owned_lora(model))
    plugin.ignored_modules = [*(given or ()), *owned]
    result, ranks = original(accelerator, *args), ranks_of(model)
    assert ranks is not None
    for one in result if isinstance(result, (list, tuple)) else (result,):
        if isinstance(one, nn.Module):
            one.register_load_state_dict_pre_hook(_shard_loaded)
            meet = functools.partial(_meet, accelerator, ranks)
            one.register_forward_pre_hook(meet, prepend=True)  # before FSDP2's own, which gathers parameters
        elif isinstance(one, torch.optim.Optimizer):
            _step_by_kinds(_inner(one))
    return result


def _meet(accelerator: Any, ranks: Ranks, *_: Any) -> None:
    meet_before_pass(ranks, accelerator.sync_gradients)


def _shard_loaded(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Have whole tensors of a state that is loaded become parts of the sharded parameters that they are for."""
    parameters = dict(model.named_parameters())
    for key, value in list(state.items()):
        parameter = parameters.get(key.removeprefix(prefix))
        if isinstance(parameter, DTensor) and isinstance(value, Tensor) and not isinstance(value, DTensor):
            state[key] = part_of(value, parameter)


def part_of(value: Tensor, like: DTensor) -> DTensor:
    """This rank's part of a whole tensor, which all ranks have, sharded like a parameter."""
    whole = value.to(like.device)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def _step_by_kinds(optimizer: Any) -> None:
    """Have an optimizer's step take DTensors and plain tensors one after the other, for it takes no mixture at once.

    Its groups are as they were before and after, so that schedulers and states know them.
    """

    def divide(optimizer: Any, *_: Any) -> None:
        join(optimizer)
        optimizer._kt_groups = whole = optimizer.param_groups
        optimizer.param_groups = [
            {**group, "params": params}
            for group in whole
            for kind in (True, False)
            if (params := [p for p in group["params"] if isinstance(p, DTensor) is kind])
        ]

    def join(optimizer: Any, *_: Any) -> None:
        whole = optimizer.__dict__.pop("_kt_groups", None)  # left by a step that has failed, or of this one
        if whole is not None:
            optimizer.param_groups = whole

    optimizer.register_step_pre_hook(divide)
    optimizer.register_step_post_hook(join)


class _WholeStates:
    """An optimizer as a Trainer saves and loads it: the states of sharded parameters are whole tensors.

    Args:
        optimizer: Whose parameters are sharded.
        state: Its state dict with whole tensors, where it is to be saved.
    """

    def __init__(self, optimizer: Any, state: dict[str, Any] | None = None) -> None:
        self._optimizer, self._state = optimizer, state
        self.optimizer = _inner(optimizer)

    def state_dict(self) -> Any:
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for index, values in state["state"].items():
            parameter = parameters[index]
            if isinstance(parameter, DTensor):
                for name, value in values.items():
                    if isinstance(value, Tensor) and value.shape == parameter.shape:
                        values[name] = part_of(value, parameter)
        self._optimizer.load_state_dict(state)


@contextlib.contextmanager
def as_unsharded(trainer: Any, optimizer: Any = None) -> Iterator[None]:
    """While this is open a Trainer saves and loads a sharded model, and `optimizer` if it is given, as DDP's."""
    kept, trainer.is_fsdp_enabled = (trainer.is_fsdp_enabled, trainer.optimizer), False
    if optimizer is not None:
        trainer.optimizer = optimizer
    try:
        yield
    finally:
        trainer.is_fsdp_enabled, trainer.optimizer = kept


def save_whole_states(original: Callable[..., Any], trainer: Any, output_dir: str) -> Any:
    """Replaces `Trainer._save_optimizer_and_scheduler`: rank 0 writes whole tensors, which all ranks have gathered."""
    if not is_sharded(trainer.model):
        return original(trainer, output_dir)
    state = trainer.optimizer.state_dict()
    state["state"] = {index: {k: _whole(v) for k, v in values.items()} for index, values in state["state"].items()}
    with as_unsharded(trainer, _WholeStates(trainer.optimizer, state)):
        return original(trainer, output_dir)


def load_best(original: Callable[..., Any], trainer: Any) -> Any:
    """Replaces `Trainer._load_best_model`, which looks for what FSDP saves."""
    if not is_sharded(trainer.model):
        return original(trainer)
    with as_unsharded(trainer):
        return original(trainer)


def loading_whole_states(trainer: Any) -> contextlib.AbstractContextManager[None]:
    """While this is open a Trainer's optimizer takes states of whole tensors, if its model is sharded."""
    if not is_sharded(trainer.model):
        return contextlib.nullcontext()
    return as_unsharded(trainer, _WholeStates(trainer.optimizer))


def _whole(value: Any) -> Any:
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value


def _inner(optimizer: Any) -> Any:
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer
