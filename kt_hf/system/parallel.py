"""Ways to use several GPUs or processes that experts cannot follow, refused in words that say which way they can."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..errors import KTAMXConfigError
from ..ranks import current_world

_UNTRIED = {
    "deepspeed": "DeepSpeed divides parameters and gradients by itself",
    "fp16": "gradients of owned experts would overflow on one rank alone",
    "auto_find_batch_size": "ranks would go on with unlike batch sizes",
}


def refuse_parallel(model: nn.Module | None) -> None:
    """Refuse a model inside `nn.DataParallel`.

    Raises:
        KTAMXConfigError: The model is wrapped.
    """
    if isinstance(model, nn.DataParallel):
        raise KTAMXConfigError(
            "nn.DataParallel cannot hold experts: pass the model inside it. For several GPUs start a process for each: "
            f"{launch_command(torch.cuda.device_count())}"
        )


def launch_command(processes: int) -> str:
    """The command that starts this program once for each GPU."""
    if sys.argv and (sys.argv[0].endswith("kt-hf") or Path(sys.argv[0]).parent.name == "cli"):
        rest = sys.argv[1:] if sys.argv[1:2] == ["train"] else ["train", "RUN.yaml"]
        return shlex.join(["torchrun", "--nproc_per_node", str(max(processes, 2)), "-m", "kt_hf.cli", *rest])
    script = os.path.basename(sys.argv[0]) if sys.argv and sys.argv[0].endswith(".py") else "SCRIPT.py"
    return f"torchrun --nproc_per_node {max(processes, 2)} {script} (or accelerate launch --multi_gpu {script})"


def refuse_several_gpus(count: int) -> None:
    """Refuse one process that several GPUs are shown to.

    Args:
        count: GPUs that it sees; of one or none nothing is said.

    Raises:
        KTAMXConfigError: Saying how a process is started for each.
    """
    if count > 1:
        raise KTAMXConfigError(
            f"The trainer sees {count} GPUs and would use nn.DataParallel, which cannot hold experts. Start a process "
            f"for each GPU: {launch_command(count)}; or show this one a single GPU: CUDA_VISIBLE_DEVICES=0."
        )


def refuse_parallel_trainer(model: nn.Module, gpus: int, args: Any) -> None:
    """Refuse a Trainer that would train in a way that experts cannot follow.

    Args:
        model: The model that the trainer calls.
        gpus: GPUs that this process would use.
        args: The trainer's arguments.

    Raises:
        KTAMXConfigError: Naming what is refused, and what is to be done instead.
    """
    if gpus > 1:
        refuse_several_gpus(max(gpus, torch.cuda.device_count()))
    refuse_parallel(model)
    if args.world_size <= 1:
        return
    for name, why in _UNTRIED.items():
        if getattr(args, name, None):
            raise KTAMXConfigError(f"{name} does not go together with several processes: {why}. Leave it out.")
    if getattr(args, "save_on_each_node", False) and current_world().local_size < args.world_size:
        raise KTAMXConfigError(
            "save_on_each_node=True: rank 0 alone has the LoRA of all experts, and writes it. Leave it out, and give "
            "an output_dir that all hosts see."
        )
    asked = getattr(args, "fsdp", None) or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    if asked and not any(isinstance(p, DTensor) for p in model.parameters()):
        raise KTAMXConfigError(
            f"fsdp={getattr(args, 'fsdp', None) or True}: nothing of the model is sharded; accelerate shards on GPUs "
            "alone. Leave it out: DDP takes what is not experts, and each process holds its part of the experts."
        )
