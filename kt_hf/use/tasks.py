"""Tasks of lm-eval (EleutherAI's evaluation harness), run on the patched model by its own Hugging Face class."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import KTAMXConfigError, KTAMXNotAvailableError
from .opening import Opened


def check_tasks(tasks: Sequence[str], include: Path | None) -> None:
    """Refuse tasks that lm-eval does not know, before a model is loaded.

    Args:
        tasks: Their names.
        include: A folder of the user's own tasks, YAML files; None for lm-eval's alone.

    Raises:
        KTAMXNotAvailableError: lm-eval is not installed.
        KTAMXConfigError: No such task, or no such folder.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise KTAMXNotAvailableError("--tasks needs the package lm-eval, which is not installed: pip install lm-eval")
    try:
        from lm_eval.models.huggingface import HFLM  # noqa: F401 - what is imported later, tried out
    except ImportError as error:
        raise KTAMXNotAvailableError(
            f"--tasks: lm-eval is not installed whole: {error}. pip install 'lm-eval[hf]'"
        ) from None
    if include is not None and not include.is_dir():
        raise KTAMXConfigError(f"--include-path {include}: there is no such folder.")
    unknown = [task for task in tasks if task not in _manager(include).all_tasks]
    if unknown:
        raise KTAMXConfigError(f"--tasks {unknown[0]}: lm-eval knows no such task; --include-path names a folder.")


def run_tasks(
    opened: Opened, tasks: Sequence[str], include: Path | None, limit: int | None, batch: int
) -> dict[str, float]:
    """Task and metric -> value, as lm-eval reports them.

    Args:
        opened: The model; an adapter is evaluated as it is active.
        tasks: Names of tasks.
        include: A folder of the user's own tasks.
        limit: Rows of each task, None for all.
        batch: Rows of a batch.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=opened.model, tokenizer=opened.tokenizer, batch_size=batch)
    answer: Any = simple_evaluate(
        model=model, tasks=list(tasks), task_manager=_manager(include), limit=limit, bootstrap_iters=0
    )
    return {
        f"{task} {name.removesuffix(',none')}": float(value)
        for task, values in answer["results"].items()
        for name, value in values.items()
        if isinstance(value, (int, float))
    }


def _manager(include: Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(include) if include else None)
