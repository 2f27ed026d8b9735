"""What Trainer, accelerate and generation do otherwise for a model whose experts are divided among ranks.

The functions that take `original` are replacements of the table `patches.PATCHES`: `original` is the function they
stand for, and the other arguments are that function's. A model that is not divided gets what `original` does.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..adapters.manifest import begin
from ..adapters.owned_optimizer import remove_state, write_state
from ..adapters.whole import ranks_of, whole_lora
from ..errors import KTAMXConfigError, KTAMXError
from ..experts.clipping import clip_grad_norm_, owned_among
from ..experts.exchange import DIVIDED, meet_before_pass
from ..ranks import Kind, Place
from .sharded import as_unsharded, is_sharded


def clip_whole_norm(
    original: Callable[..., Any], accelerator: Any, parameters: Any, max_norm: float, norm_type: float = 2
) -> Any:
    """Replaces `Accelerator.clip_grad_norm_`: the norm is that of all ranks' gradients."""
    parameters = list(parameters)
    if not owned_among(parameters)[0]:
        return original(accelerator, parameters, max_norm, norm_type)
    accelerator.unscale_gradients()
    return clip_grad_norm_(parameters, max_norm, float(norm_type))


def clip_mixed_norm(original: Callable[..., Any], trainer: Any, model: Any, max_norm: float) -> Any:
    """Replaces `Trainer._mixed_mesh_grad_norm`, by which gradients are clipped of which FSDP2 has sharded some."""
    parameters = list(model.parameters())
    if not owned_among(parameters)[0]:
        return original(trainer, model, max_norm)
    return clip_grad_norm_(parameters, max_norm)


def refuse_state(original: Callable[..., Any], accelerator: Any, *args: Any, **kwargs: Any) -> Any:
    """Replaces `Accelerator.save_state` and `load_state`, which know of rank 0's experts alone.

    Raises:
        KTAMXConfigError: A model in the process is divided.
    """
    if list(DIVIDED):
        raise KTAMXConfigError(
            "Accelerator.save_state and load_state write and read rank 0's experts alone. Save the adapter by "
            "accelerator.unwrap_model(model).save_pretrained(FOLDER) on all ranks; a Trainer's checkpoints hold the "
            "optimizer's state too."
        )
    return original(accelerator, *args, **kwargs)


def all_parameters_used(original: Callable[..., Any], trainer: Any, **kwargs: Any) -> Any:
    """Replaces `Trainer._build_accelerator_args`: DDP does not look for unused parameters unless it is told to.

    The Trainer has it look for them in a PeftModel, which fails under reentrant checkpointing ("marked ready only
    once"); those that a step does not use are LoRA of experts, which are none of DDP's.
    """
    if trainer.args.ddp_find_unused_parameters is None and ranks_of(trainer.model) is not None:
        trainer.args.ddp_find_unused_parameters = False
    return original(trainer, **kwargs)


def meet_before_forward(original: Callable[..., Any], ddp: Any, module: Any, *args: Any, **kwargs: Any) -> None:
    """Replaces `DistributedDataParallel.__init__`: ranks meet before each forward, in which DDP broadcasts buffers."""
    original(ddp, module, *args, **kwargs)
    ranks = ranks_of(module)
    if ranks is not None:
        ddp.register_forward_pre_hook(lambda ddp, _: meet_before_pass(ranks, ddp.require_backward_grad_sync))


def name_lost_rank(original: Callable[..., Any], trainer: Any, *args: Any, **kwargs: Any) -> Any:
    """Replaces `Trainer.train`: an exchange of DDP's or accelerate's that a rank's end stops says which rank.

    Raises:
        KTAMXError: Naming the rank that has ended or stands still.
    """
    try:
        return original(trainer, *args, **kwargs)
    except KTAMXError:  # some are RuntimeErrors
        raise
    except RuntimeError as error:
        ranks = ranks_of(trainer.model)
        words = ranks.loss_in_words(error) if ranks is not None else None
        if words is None:
            raise
        raise KTAMXError(words) from error


def generate_together(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """Replaces `generate`: ranks that are done go on until all are, for each needs the others' experts."""
    if kwargs.get("synced_gpus") is None and ranks_of(model) is not None:
        kwargs["synced_gpus"] = True
    return original(model, *args, **kwargs)


def save_whole(
    original: Callable[..., Any], trainer: Any, output_dir: str | None = None, _internal_call: bool = False
) -> Any:
    """Replaces `Trainer.save_model`: rank 0 saves the LoRA of all ranks' experts, each rank its optimizer's state."""
    if ranks_of(trainer.model) is None:
        return original(trainer, output_dir, _internal_call)
    folder = Path(output_dir or trainer.args.output_dir)
    with whole_lora(trainer.model) as ranks:
        assert ranks is not None
        if _internal_call and re.search(r"checkpoint-\d+$", folder.name):
            if ranks.rank == 0:
                begin(folder)  # before another file in it changes
                remove_state(folder)
            ranks.agree(Place(Kind.SAVING))
            if not trainer.args.save_only_model and trainer.optimizer is not None and ranks.replicas.index == 0:
                write_state(folder, trainer.model, trainer.optimizer, ranks.owners.index)
            ranks.agree(Place(Kind.SAVED))
        with as_unsharded(trainer) if is_sharded(trainer.model) else contextlib.nullcontext():
            return original(trainer, output_dir, _internal_call)


def save_random_state(original: Callable[..., Any], trainer: Any, output_dir: str) -> None:
    """Replaces `Trainer._save_rng_state`: all ranks' files are there before rank 0 removes an older checkpoint."""
    ranks = ranks_of(trainer.model)
    if ranks is None:
        original(trainer, output_dir)
        return
    try:
        original(trainer, output_dir)
    except Exception as error:
        ranks.agree(Place(Kind.SAVED), failure=error)
        raise
    ranks.agree(Place(Kind.SAVED))
