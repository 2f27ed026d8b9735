"""From a YAML file to `TrainSettings`: names translated, all of it checked, all problems reported at once."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...config import KTConfig
from ...errors import KTAMXConfigError
from . import aliases as names
from .checks import Checked, check_combinations
from .convert import allows_none, convert
from .settings import RunKeys, TrainSettings
from .stage_checks import check_stage
from .stages import STAGES, in_words, stage_of
from .yaml_file import BadSettings, Problem, Setting, key_shown, read_settings, shown

_KT_KEYS = [*(field.name for field in dataclasses.fields(KTConfig)), "kt_max_cache_depth"]
_MOST_SUGGESTED = 20  # unknown settings of a file: looking for what was meant takes its time
# In transformers before these names came, they were called otherwise.
_CHECKPOINTING = {
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
}


def read_arguments(file: Path, overrides: Sequence[str] = (), purpose: str = "train") -> TrainSettings:
    """The checked settings of a YAML file. Loads, downloads and writes nothing.

    Args:
        file: The YAML file.
        overrides: `key=value`, put over the file's.
        purpose: `train` needs data and an output folder; `estimate` does not.

    Raises:
        BadSettings: Everything that is wrong with the file, each with its line.
    """
    settings, problems = read_settings(file, overrides)
    checked = check_settings(settings, problems, str(file), purpose)
    return dataclasses.replace(checked, overrides=tuple(overrides))


def check_settings(
    settings: dict[str, Setting], problems: list[Problem], source: str, purpose: str = "train"
) -> TrainSettings:
    """As `read_arguments`, for settings that have been read, with the problems found so far."""
    problems, notices = list(problems), list[str]()
    settings = _flatten_kt_config(settings, problems)
    settings = _of_stage(settings, notices)
    stage = settings["stage"].value if "stage" in settings else "sft"
    fields = trainer_fields(stage_of(stage).name)
    settings = _translate(settings, fields, problems, notices)
    run_fields = typing.get_type_hints(RunKeys)
    run: dict[str, Any] = {}
    kt: dict[str, Any] = {}
    trainer: dict[str, Any] = {}
    unknown = 0
    for key, setting in settings.items():
        if key in _KT_KEYS:
            _take_kt(key, setting, kt, problems)
        elif key in run_fields:
            _take(key, setting, run_fields[key], run, problems)
        elif key in fields:
            _take(key, setting, fields[key], trainer, problems)
        else:
            unknown += 1
            known = [*run_fields, *_KT_KEYS, *fields] if unknown <= _MOST_SUGGESTED else []
            problems.append(Problem(setting.where, _unknown(key, stage, known)))
    checked = Checked(settings, RunKeys(**run), kt, trainer, problems, notices)
    check_combinations(checked, purpose)
    check_stage(checked, purpose)
    if not problems:
        _ask_trl(checked)
    if problems:
        raise BadSettings(source, sorted(problems, key=_position))
    return TrainSettings(source, checked.run, KTConfig(**kt), trainer, tuple(notices), given=frozenset(settings))


@functools.cache
def trainer_fields(stage: str) -> dict[str, Any]:
    """Name -> type of each field of TRL's configuration of a stage."""
    config = trainer_config(stage)
    hints = typing.get_type_hints(config)
    return {field.name: hints[field.name] for field in dataclasses.fields(config) if field.init}


def trainer_config(stage: str) -> Any:
    """The class of TRL that a stage's settings make: `SFTConfig`, `DPOConfig` and so on."""
    return stage_of(stage).config_class()


def on_this_machine(trainer: dict[str, Any], keys: RunKeys) -> dict[str, Any]:
    """The keyword arguments of TRL's configuration, with what follows from the machine where the file is silent."""
    import torch

    cuda = torch.cuda.is_available() and not trainer.get("use_cpu")
    result = {"use_cpu": not cuda, "dataloader_pin_memory": cuda} | trainer
    if not trainer.get("fp16") and trainer.get("bf16") is None:
        result["bf16"] = keys.torch_dtype != "float32"
    whole_epochs = trainer.get("max_steps", -1) < 1 and trainer.get("num_train_epochs", 3) >= 1
    stage = stage_of(keys.stage)
    if stage.reference and keys.use_kt and whole_epochs and not trainer.get("sync_ref_model"):
        # The reference's forward spoils the policy's, which each step would compute once more.
        result.setdefault("precompute_ref_log_probs", True)
    if keys.stage == "pt":  # documents one after the other, cut into rows of max_length: no token is lost
        result = {"packing": True, "packing_strategy": "wrapped"} | result
    if stage.generates and keys.enable_thinking is not None:
        result["chat_template_kwargs"] = {"enable_thinking": keys.enable_thinking} | (
            result.get("chat_template_kwargs") or {}
        )
    return result


def _of_stage(settings: dict[str, Setting], notices: list[str]) -> dict[str, Setting]:
    """What LLaMA-Factory's files have in stages where TRL has it under another name, or not at all.

    It asks for ORPO by `stage: dpo` with `pref_loss: orpo`, and reads `pref_loss` in no other stage.
    """
    stage = settings.get("stage")
    name = stage.value if stage else None
    rest = dict(settings)
    if stage and name == "dpo" and "pref_loss" in rest and rest["pref_loss"].value == "orpo":
        del rest["pref_loss"]
        rest["stage"] = Setting("orpo", stage.where)
        notices.append("pref_loss: orpo is a trainer of its own in TRL: stage: orpo is used.")
    for key, why in names.NOT_IN_STAGE.get(name if isinstance(name, str) else "", {}).items():
        if key in rest:
            notices.append(f"{key} has no effect: {why}.")
            del rest[key]
    return rest


def _translate(
    settings: dict[str, Setting], fields: dict[str, Any], problems: list[Problem], notices: list[str]
) -> dict[str, Setting]:
    """Settings under today's names; two that mean the same, removed and ignored ones are reported."""
    result: dict[str, Setting] = {}
    called: dict[str, str] = {}
    for key, setting in settings.items():
        name, value = key, setting.value
        if key in names.REMOVED:
            if value is not None and value is not False:
                problems.append(Problem(setting.where, f"{key} is no setting of kt_hf: {names.REMOVED[key]}"))
            continue
        if key in names.IGNORED:
            notices.append(f"{key} has no effect: {names.IGNORED[key]}.")
            continue
        if key in names.TRANSLATED:
            name, change = names.TRANSLATED[key]
            if value is None:
                continue
            if key in names.BOOLEANS and not isinstance(value, bool):
                problems.append(Problem(setting.where, f"{key}={shown(value)}: it must be true or false"))
                continue
            value = change(value)
        elif key in names.RENAMED:
            name = names.RENAMED[key]
        if key == "warmup_ratio" and isinstance(value, (int, float)) and not 0 <= value < 1:
            # As warmup_steps it would be that many steps.
            problems.append(Problem(setting.where, f"{key}={shown(value)}: it must be a share from 0 to below 1"))
            continue
        if name in _CHECKPOINTING and name not in fields:
            name = _CHECKPOINTING[name]
        if name in result:
            problems.append(
                Problem(setting.where, f"{key} means the same as {called[name]} at {result[name].where}: keep one")
            )
            continue
        result[name], called[name] = Setting(value, setting.where, setting.text), key
    return result


def _flatten_kt_config(settings: dict[str, Setting], problems: list[Problem]) -> dict[str, Setting]:
    """`settings` with the entries of LLaMA-Factory's mapping `kt_config` as settings of their own."""
    if "kt_config" not in settings:
        return settings
    result = {key: setting for key, setting in settings.items() if key != "kt_config"}
    nested, where = settings["kt_config"].value, settings["kt_config"].where
    if nested is None:
        return result
    if not isinstance(nested, dict) or not all(isinstance(key, str) for key in nested):
        problems.append(Problem(where, f"kt_config={shown(nested)}: it must be a mapping of kt_ settings"))
        return result
    for key, value in nested.items():
        if key == "kt_expert_weight_format":
            kind = str(value).lower()
            advice = names.EXPERT_FORMATS.get(kind, "experts of this format cannot be trained on")
            if value is not None and advice:
                problems.append(Problem(where, f"kt_config: {key}={shown(value)}: {advice}"))
        elif key in result:
            problems.append(Problem(where, f"kt_config: {key_shown(key)} is set at {result[key].where} too: keep one"))
        elif key != "enabled":
            result[key] = Setting(value, where)
    return result


def _take(key: str, setting: Setting, hint: Any, into: dict[str, Any], problems: list[Problem]) -> None:
    if setting.value is None and not allows_none(hint):
        return  # as if it were not there
    value = setting.value
    if setting.text and value is not None and str in _plain(hint):
        value = setting.text if not isinstance(value, (str, list, dict)) else value  # as it was typed
    try:
        into[key] = convert(value, hint)
    except ValueError as error:
        problems.append(Problem(setting.where, f"{key}={shown(value)}: {error}"))


def _plain(hint: Any) -> tuple[Any, ...]:
    """The types of a field that takes text or nothing."""
    members = typing.get_args(hint) or (hint,)
    return members if set(members) <= {str, type(None)} else ()


def _take_kt(key: str, setting: Setting, into: dict[str, Any], problems: list[Problem]) -> None:
    try:
        KTConfig(**{key: setting.value})
    except KTAMXConfigError as error:
        problems.append(Problem(setting.where, str(error).rstrip(".")))
        return
    into[key] = setting.value


def _unknown(key: str, stage: Any, known: Sequence[str]) -> str:
    others = [other for other in STAGES if key in trainer_fields(other)]
    if others:
        return f"{key} belongs to stage: {in_words(others)}, this is stage: {stage}"
    if key in names.MEANT:
        return f"{key} is no setting of kt_hf; did you mean {names.MEANT[key]}?"
    candidates = [*known, *names.RENAMED, *names.TRANSLATED, *names.IGNORED] if known and len(key) <= 64 else []
    close = difflib.get_close_matches(key, candidates, n=1, cutoff=0.75)
    return f"{key_shown(key)} is no known setting" + (f"; did you mean {close[0]}?" if close else "")


def _ask_trl(checked: Checked) -> None:
    """Let TRL and transformers check what they check when a configuration is made. It writes nothing."""
    import contextlib
    import io
    import warnings

    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            trainer_config(checked.run.stage)(**on_this_machine(checked.trainer, checked.run))
    except Exception as error:  # whatever it raises, the message is about a setting
        text = " ".join(str(error).split()) or type(error).__name__
        named = [key for key in checked.trainer if re.search(rf"\b{key}\b", text)]
        checked.problem(named[0] if named else "", text)


def _position(problem: Problem) -> tuple[int, int]:
    number = re.search(r"\d+", problem.where)
    return (0, int(number[0])) if number else (1, 0)
