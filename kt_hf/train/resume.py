"""Going on with a run: from which checkpoint, and with which of the settings.

Each checkpoint of `kt-hf train` has a record of the settings it was trained with (`kt_hf_run.json`). What decides what
is trained, and on which rows, may not change in the middle of a run; of the rest it is said what a change does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from ..adapters import check_checkpoint, last_complete
from ..errors import KTAMXConfigError, KTAMXError
from ..system.files import write_json
from .checkpoints import STATE, SUMMARY, checkpoints, is_numbered, numbered, step_in_name
from .config.read import trainer_config
from .config.settings import RunKeys, TrainSettings
from .folding_rules import record_of
from .stopping import checkpoint_of

RECORD = "kt_hf_run.json"
# These decide what is trained and on which rows: they are refused.
_FIXED = (
    "stage", "model_name_or_path", "model_revision", "use_kt", "lora_rank", "lora_alpha", "use_rslora", "lora_target",
    "additional_target", "loraplus_lr_ratio", "dataset", "mix_strategy", "interleave_probs", "val_size", "max_samples",
    "template", "default_system", "enable_thinking", "mask_history", "packing", "packing_strategy",
    "completion_only_loss", "assistant_only_loss", "beta", "loss_type", "reward_funcs",
)  # fmt: skip
_ANEW = "To start a new run from its adapter, write adapter_name_or_path: {folder} and another output_dir."
_KEPT = "it has no effect: the optimizer goes on with the checkpoint's"
_EFFECT = {
    **dict.fromkeys(("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"), _KEPT),
    "optim": "it takes effect from here on, with the checkpoint's state of the other optimizer",
    "lr_scheduler_type": "it takes effect from here on, starting from the checkpoint's learning rate",
    "lr_scheduler_kwargs": "they take effect from here on, starting from the checkpoint's learning rate",
    "warmup_steps": "the schedule is computed with it from here on",
    "max_steps": "the run ends there, and the schedule is computed with it from here on",
    "num_train_epochs": "the run ends there, and the schedule is computed with it from here on",
    **dict.fromkeys(
        ("per_device_train_batch_size", "gradient_accumulation_steps"),
        "it takes effect from here on; rows are skipped as if the steps before had had it, so some may be trained "
        "twice or not at all",
    ),
    **dict.fromkeys(
        ("seed", "data_seed"), "the rows come in another order, so some may be trained twice or not at all"
    ),
    "max_length": "rows are cut by it from here on",
    "kt_backend": "experts are computed by it from here on, with its rounding",
}
_QUIET = {
    *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "adapter_name_or_path", "finetuning_type"),
    *("trust_remote_code", "plot_loss", "report_to", "run_name", "logging_steps", "logging_dir", "logging_strategy"),
    *("save_steps", "save_strategy", "save_total_limit", "eval_steps", "eval_strategy", "eval_dataset", "dataset_dir"),
    *("dataset_num_proc", "dataloader_num_workers"),
}
# Optimizers whose states are of one form.
_ADAMW = ("adamw_torch", "adamw_torch_fused")


@dataclass(frozen=True)
class Resume:
    """The checkpoint that a run goes on from.

    Attributes:
        folder: The checkpoint's.
        step: Optimizer steps done.
        notes: What to tell the user.
        steps_left: False where the run has done them all, and ended before its result was saved.
    """

    folder: Path
    step: int
    notes: tuple[str, ...] = ()
    steps_left: bool = True


def find_checkpoint(settings: TrainSettings) -> Resume | None:
    """The checkpoint to go on from, checked; None for a run that starts anew.

    With `resume_from_checkpoint: true` it is the last complete one, and a note says what is wrong with a later one.

    Raises:
        KTAMXError: The folder that was named is no checkpoint, or not complete.
        KTAMXConfigError: None in the output folder is.
    """
    given = settings.run.resume_from_checkpoint
    if not given:
        return None
    if isinstance(given, str):
        folder = Path(os.path.abspath(os.path.expanduser(given)))
        if not is_numbered(folder) or not (folder / STATE).is_file():
            inside = checkpoints(folder)
            hint = f"it holds checkpoints: give one of them, such as {inside[0]}" if inside else f"it has no {STATE}"
            if not inside and (folder / STATE).is_file():
                hint = "its name is not checkpoint-<step>"
            raise KTAMXConfigError(f"resume_from_checkpoint={given!r} is no checkpoint of a run: {hint}.")
        check_checkpoint(folder)
        return Resume(folder, _step_of(folder))
    output_dir = Path(settings.output_dir).expanduser()
    folders = numbered(output_dir)
    if not folders:
        raise KTAMXConfigError(f"resume_from_checkpoint=true: {output_dir} holds no checkpoint to go on from.")
    last = last_complete(output_dir)
    if last is None:
        raise KTAMXConfigError(
            f"resume_from_checkpoint=true: no checkpoint in {output_dir} is complete ({_why_not(folders[0])})"
        )
    later = [path for path in folders if step_in_name(path) > step_in_name(last)]
    notes = tuple(f"{path} is left out: {_why_not(path)}" for path in later)
    return Resume(last, _step_of(last), notes)


def _why_not(folder: Path) -> str:
    try:
        check_checkpoint(folder)
    except KTAMXError as error:
        text = str(error).removeprefix(f"{folder} cannot be resumed: ")
        return re.sub(r" (The last complete one is|There is no other).*$", "", text, flags=re.DOTALL)
    return "it is complete by now"


def _step_of(folder: Path) -> int:
    """Steps done, by the Trainer's state.

    Raises:
        KTAMXError: It does not say.
    """
    try:
        step = json.loads((folder / STATE).read_text(encoding="utf-8"))["global_step"]
        if not isinstance(step, int) or step < 0:
            raise ValueError(f"global_step is {step!r}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise KTAMXError(f"{folder / STATE} cannot be read: {error}. The checkpoint is damaged.") from None
    return step


def record(settings: TrainSettings) -> dict[str, Any]:
    """What a checkpoint remembers of the settings; `with_rows` adds the data."""
    run = {key: getattr(settings.run, key) for key in settings.run.__dataclass_fields__}
    run["lora_target"] = _targets(run["lora_target"])
    run["additional_target"] = sorted(run["additional_target"])
    name = run["model_name_or_path"]
    run["model_name_or_path"] = os.path.realpath(name) if os.path.isdir(name) else name
    for key in ("dataset", "eval_dataset"):
        run[key] = [os.path.realpath(spec) if os.path.exists(spec) else spec for spec in run[key]]
    kt = {"kt_backend": settings.kt.kt_backend}
    defaults = {field.name: field.default for field in dataclasses.fields(trainer_config(settings.run.stage))}
    trainer = {key: value for key, value in settings.trainer.items() if value != defaults.get(key)}
    return {"version": 1, "settings": run | kt | trainer}


def with_rows(content: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A record with the number of the training rows, and a hash of them in their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode("utf-8", "surrogatepass"))
    return content | {"rows": len(rows), "data": digest.hexdigest()}


def _targets(value: str | list[str]) -> list[str]:
    names = value.split(",") if isinstance(value, str) else value
    return sorted({name.strip() for name in names} - {""})


class KeepRecord(TrainerCallback):
    """Writes the record into each checkpoint as it is saved."""

    def __init__(self, content: dict[str, Any]) -> None:
        """Keep `content`, a `record` with the data's hash, to write it into checkpoints."""
        self.content = content

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the settings' own intervals and kind of optimizer in place of the checkpoint's."""
        # A resumed Trainer would go on with the checkpoint's logging_steps, eval_steps and save_steps.
        state.compute_steps(args, state.max_steps)
        if kwargs.get("optimizer") is not None:
            use_own_kind(kwargs["optimizer"])

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the record into the checkpoint that was just saved."""
        folder = checkpoint_of(args, state)
        if state.is_world_process_zero and folder.is_dir():
            write_json(folder / RECORD, json.loads(json.dumps(self.content | record_of(args), default=str)))


def use_own_kind(optimizer: Any) -> None:
    """Have an optimizer compute as it was made to (fused, foreach or neither), not as the state that was loaded was.

    Loading moves the moments to the devices of their parameters, and takes over the saved groups with these flags.

    Args:
        optimizer: PyTorch's, or accelerate's around it; one that has no such flags is left alone.
    """
    flags = {name: optimizer.defaults[name] for name in ("fused", "foreach") if name in optimizer.defaults}
    for group in optimizer.param_groups:
        if flags.items() <= group.items():
            continue
        group.update(flags)
        for parameter in group["params"]:
            step = optimizer.state.get(parameter, {}).get("step")
            if isinstance(step, torch.Tensor):  # fused ones count on the parameter's device, in fp32
                there = parameter.device if flags.get("fused") or group.get("capturable") else "cpu"
                optimizer.state[parameter]["step"] = step.to(there, torch.float32)


def check_settings(resume: Resume, now: dict[str, Any]) -> list[str]:
    """Compare the record of a checkpoint with that of the settings it is to go on with.

    Returns:
        What the settings that differ do, to tell the user.

    Raises:
        KTAMXConfigError: One differs that decides what is trained, naming it and both values.
    """
    before = read_record(resume.folder)
    anew = _ANEW.format(folder=resume.folder)
    old, new = before["settings"], json.loads(json.dumps(now["settings"], default=str))
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    if before.get("partial"):  # an adapter_config.json alone
        changed = [key for key in changed if key in old]
    # A setting that an earlier version of kt_hf did not have was at its default.
    defaults = dataclasses.asdict(RunKeys())
    changed = [key for key in changed if key in old or new[key] != defaults.get(key)]
    fixed = [key for key in _FIXED if key in changed]
    if fixed:
        key, more = fixed[0], f" So it is with {', '.join(fixed[1:])}." if fixed[1:] else ""
        raise KTAMXConfigError(
            f"{key}={_value(new, key)}: {resume.folder} was trained with {_value(old, key)}, and a run cannot change "
            f"it.{more} {anew}"
        )
    if "optim" in changed and any(each.get("optim", "adamw_torch") not in _ADAMW for each in (old, new)):
        raise KTAMXConfigError(
            f"optim={_value(new, 'optim')}: the state of the optimizer in {resume.folder} is that of "
            f"{_value(old, 'optim')}. {anew}"
        )
    return [
        f"{key} was {_value(old, key)} and is {_value(new, key)}: {_EFFECT.get(key, 'it takes effect from here on')}."
        for key in changed
        if key not in _QUIET
    ]


def check_left(resume: Resume, settings: TrainSettings) -> Resume:
    """Refuse to go on with a run that has done its steps and saved its result: the Trainer would make one step more.

    Returns:
        The checkpoint; without steps left where a full disk or a kill has come between the last one and the result.

    Raises:
        KTAMXConfigError: None of `max_steps` is left, naming the adapter that is the result.
    """
    max_steps, output_dir = settings.trainer.get("max_steps", -1), Path(settings.output_dir).expanduser()
    if not 0 < max_steps <= resume.step:  # -1: whole epochs, of which the Trainer makes no more
        return resume
    same_run = resume.folder.resolve().parent == output_dir.resolve() and max_steps == resume.step
    best = _best_checkpoint(resume.folder) if settings.trainer.get("load_best_model_at_end") else None
    if same_run and best is None and not _result_is_saved(output_dir, resume.step):
        return dataclasses.replace(resume, steps_left=False)
    raise KTAMXConfigError(
        f"max_steps={max_steps}: {resume.folder} has done {resume.step}, so nothing is left. Give a larger "
        f"max_steps, or use the adapter that is there{f' (the best one is in {best})' if best else ''}."
    )


def _best_checkpoint(folder: Path) -> str | None:
    """The checkpoint with the best metric, by the Trainer's state in a later one."""
    best = json.loads((folder / STATE).read_text(encoding="utf-8")).get("best_model_checkpoint")
    return best if isinstance(best, str) else None


def _result_is_saved(output_dir: Path, step: int) -> bool:
    """Whether a run has got as far as its summary, after this step; one that is damaged is not whole."""
    try:
        return bool(json.loads((output_dir / SUMMARY).read_text(encoding="utf-8"))["steps"] >= step)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def train(trainer: Any, resume: Resume | None, begin: Callable[[Path | None], None]) -> None:
    """Have a trainer train, from a checkpoint or anew.

    Args:
        trainer: The run's.
        resume: None for a new run. Without steps left the checkpoint is loaded, and no more.
        begin: Calls the trainer's `train`, with the folder of a checkpoint or None.
    """
    if resume is not None and not resume.steps_left:
        trainer.add_callback(_TrainNoStep())
    with contextlib.suppress(_Loaded):
        begin(resume.folder if resume else None)


class _Loaded(Exception):
    """Leaves a Trainer that has loaded a checkpoint."""


class _TrainNoStep(TrainerCallback):
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        raise _Loaded


def check_rows(resume: Resume, now: dict[str, Any]) -> None:
    """Compare the rows of a checkpoint with those it is to go on with.

    Raises:
        KTAMXConfigError: They are not the same, or come in another order.
    """
    before = read_record(resume.folder)
    if before.get("data") not in (None, now["data"]):
        raise KTAMXConfigError(
            f"dataset: its {now['rows']} rows are not the {before.get('rows')} that {resume.folder} was trained on, so "
            f"the rest of a run would not be the rest. {_ANEW.format(folder=resume.folder)}"
        )


def _value(settings: Mapping[str, Any], key: str) -> str:
    return "the default" if settings.get(key) is None else repr(settings[key])[:80]


def read_record(folder: Path) -> dict[str, Any]:
    """The record; what adapter_config.json tells for a checkpoint of another program, which has none."""
    path = folder / RECORD
    try:
        if path.exists():
            content = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(content, dict) or not isinstance(content.get("settings"), dict):
                raise ValueError("it holds no settings")
            return content
        path = folder / "adapter_config.json"
        adapter = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(adapter, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError, RecursionError) as error:
        raise KTAMXError(f"{path} cannot be read: {error}. The checkpoint is damaged.") from None
    names = {"r": "lora_rank", "lora_alpha": "lora_alpha", "use_rslora": "use_rslora"}
    known = {ours: adapter[theirs] for theirs, ours in names.items() if theirs in adapter}
    return {"settings": known, "partial": True}
