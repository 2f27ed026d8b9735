"""`reward_funcs`: the functions that judge what a model writes in `stage: grpo`, found before a model is loaded."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import KTAMXConfigError

# What TRL gives every reward function; the columns of the data come along.
_GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
_OF_TRL = "trl.rewards"


def reward_functions(specs: Sequence[str], columns: set[str]) -> list[Callable[..., Any]]:
    """The functions that a configuration names, as TRL's GRPOTrainer takes them.

    Args:
        specs: Each `PATH.py:FUNCTION`, `package.module:function`, or the name of one of TRL's own, such as
            `accuracy_reward`.
        columns: Of the data, beside `prompt`: each function gets them by keyword.

    Returns:
        The functions, each refusing results that are not a number, or None, for every answer.

    Raises:
        KTAMXConfigError: There is no such file or function, it fails to be imported, or it cannot be called so.
    """
    functions = [_function(spec) for spec in specs]
    for spec, function in zip(specs, functions, strict=True):
        _check_arguments(spec, function, columns)
    return [_checked(spec, function) for spec, function in zip(specs, functions, strict=True)]


def _function(spec: str) -> Any:
    where, colon, name = spec.rpartition(":")
    if spec.endswith(".py") or (not colon and "/" in spec):
        raise KTAMXConfigError(f"reward_funcs={spec!r}: say which of its functions: {spec}:FUNCTION.")
    if where.endswith(".py"):
        module = _imported(spec, Path(where).expanduser())
    else:
        if not colon:  # trl.rewards.accuracy_reward, or accuracy_reward alone
            where, _, name = spec.rpartition(".")
        module = _module(spec, where or _OF_TRL)
    function = getattr(module, name, None)
    if not callable(function):
        there = ", ".join(n for n, v in sorted(vars(module).items()) if inspect.isfunction(v) and not n.startswith("_"))
        if module.__name__ == _OF_TRL:
            there = ", ".join(sorted(n for n in module.__all__ if n.endswith("_reward")))
        raise KTAMXConfigError(
            f"reward_funcs={spec!r}: {module.__name__} has no function {name!r}. It has: {there or 'none'}."
        )
    return function


def _imported(spec: str, file: Path) -> ModuleType:
    """The module of a file, which may import what stands beside it."""
    if not file.is_file():
        raise KTAMXConfigError(f"reward_funcs={spec!r}: there is no file {file}.")
    name = f"kt_hf_rewards_{file.stem}"
    made = importlib.util.spec_from_file_location(name, file.resolve())
    assert made is not None  # the name ends in .py
    assert made.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(made)
    folder = str(file.resolve().parent)
    sys.path.insert(0, folder)
    try:
        made.loader.exec_module(module)
    except BaseException as error:  # it is the user's program: it may do anything, sys.exit too
        del sys.modules[name]
        if isinstance(error, KeyboardInterrupt):
            raise
        raise KTAMXConfigError(f"reward_funcs={spec!r} cannot be imported: {_in_words(error)}") from error
    finally:
        sys.path.remove(folder)
    return module


def _module(spec: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise KTAMXConfigError(
            f"reward_funcs={spec!r} cannot be imported: {_in_words(error)} A function of a file is PATH.py:FUNCTION."
        ) from error


def _check_arguments(spec: str, function: Any, columns: set[str]) -> None:
    """Refuse a function that cannot be called as TRL calls it: all by keyword."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # of C code, which does not tell
        return
    given = {*_GIVEN, *columns}
    kinds = inspect.Parameter
    by_position = [p.name for p in parameters if p.kind is kinds.POSITIONAL_ONLY]
    missing = [
        p.name
        for p in parameters
        if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY) and p.default is kinds.empty
        if p.name not in given
    ]
    if by_position or missing:
        what = ", ".join(by_position or missing)
        raise KTAMXConfigError(
            f"reward_funcs={spec!r} needs {what}, and TRL calls it with {', '.join(_GIVEN[:3])} and the data's columns "
            f"({', '.join(sorted(columns)) or 'none'}), by keyword."
        )
    if not any(p.kind is kinds.VAR_KEYWORD for p in parameters):
        raise KTAMXConfigError(
            f"reward_funcs={spec!r} has no **kwargs: TRL gives it more than it names (prompts, completions, "
            "completion_ids, the data's columns). Write def f(completions, **kwargs)."
        )


def _checked(spec: str, function: Any) -> Any:
    """The function, whose results are looked at; a coroutine's are TRL's business."""
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
        return function

    @functools.wraps(function)
    def judged(*args: Any, completions: list[Any], **kwargs: Any) -> list[float | None]:
        rewards = function(*args, completions=completions, **kwargs)
        try:
            result = [None if reward is None else float(reward) for reward in rewards]
        except (TypeError, ValueError):
            raise KTAMXConfigError(
                f"reward_funcs={spec!r} returned a {type(rewards).__name__} that is no list of numbers: return a "
                "number for each of completions, or None for one that it does not judge."
            ) from None
        if len(result) != len(completions):
            raise KTAMXConfigError(
                f"reward_funcs={spec!r} returned {len(result)} rewards for {len(completions)} completions: return one "
                "for each."
            )
        return result

    return judged


def _in_words(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()) or 'without a word'}."
