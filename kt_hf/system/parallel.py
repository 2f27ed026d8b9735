"""Runs of several processes, or of several GPUs in one process, are refused: experts cannot be shared by them yet."""

from __future__ import annotations

import os

import torch
from torch import nn

from ..errors import KTAMXConfigError


def refuse_parallel(model: nn.Module | None) -> None:
    """Refuse a model inside `nn.DataParallel`, and a process that is one of several.

    Raises:
        KTAMXConfigError: The model is wrapped, or WORLD_SIZE or torch.distributed counts more than one process.
    """
    if isinstance(model, nn.DataParallel):
        raise KTAMXConfigError("nn.DataParallel cannot hold experts that live on the CPU: pass the model inside it.")
    world = int(os.environ.get("WORLD_SIZE") or 1)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        world = max(world, torch.distributed.get_world_size())
    if world > 1:
        raise KTAMXConfigError(
            f"WORLD_SIZE={world}: experts on the CPU cannot be shared by several processes yet. Start one process "
            "(accelerate launch --num_processes 1, or plain python)."
        )


def refuse_parallel_trainer(model: nn.Module, gpus: int, processes: int) -> None:
    """Refuse a Trainer that would train on several GPUs with `nn.DataParallel`, or in several processes.

    Args:
        model: The model that the trainer calls.
        gpus: `TrainingArguments.n_gpu`: GPUs that this process would use.
        processes: `TrainingArguments.world_size`.

    Raises:
        KTAMXConfigError: Naming the number of GPUs or processes, and how to start one.
    """
    if isinstance(model, nn.DataParallel) or gpus > 1:
        raise KTAMXConfigError(
            f"The trainer sees {max(gpus, torch.cuda.device_count())} GPUs and would use nn.DataParallel, "
            "which cannot hold experts on the CPU. Show it one: CUDA_VISIBLE_DEVICES=0."
        )
    if processes > 1:
        raise KTAMXConfigError(
            f"world size {processes} (WORLD_SIZE={os.environ.get('WORLD_SIZE')}): experts on the CPU cannot be "
            "shared by several processes yet. Start one process."
        )
