"""Values out of range, and settings that do not go together, found before anything is loaded."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import KTAMXError
from ..checkpoints import files_in_the_way, numbered, would_be_rotated
from ..data.rows import mixing_problem
from ..data.sources import dataset_dir_problem, dataset_problem
from . import aliases as names
from .settings import BUILTIN_DATA, BUILTIN_MODEL, CHOICES, RunKeys
from .yaml_file import Problem, Setting, key_shown, shown

# Key -> smallest value, and whether it is allowed itself.
_FROM_ONE = (
    *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "lora_rank"),
    *("max_samples", "max_length", "dataset_num_proc", "save_total_limit", "eval_accumulation_steps"),
    "dataloader_prefetch_factor",
)
_ABOVE_ZERO = (
    *("learning_rate", "num_train_epochs", "lora_alpha", "save_steps", "logging_steps", "eval_steps"),
    "loraplus_lr_ratio",
)
_FROM_ZERO = (
    *("warmup_steps", "weight_decay", "max_grad_norm", "val_size", "lora_dropout", "seed", "data_seed"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "dataloader_num_workers"),
    *("neftune_noise_alpha", "label_smoothing_factor", "label_smoothing"),
)
_LEAST = dict.fromkeys(_FROM_ONE, (1, True)) | dict.fromkeys(_ABOVE_ZERO, (0, False))
_LEAST |= dict.fromkeys(_FROM_ZERO, (0, True))
# Key -> largest value: beyond it a run would never end, or a library would fail with it.
_MOST = {
    "lora_rank": 1024, "num_train_epochs": 1_000_000, "max_steps": 2**31, "max_length": 2**24, "seed": 2**32 - 1,
    "data_seed": 2**32 - 1, "per_device_train_batch_size": 2**20, "per_device_eval_batch_size": 2**20,
    "gradient_accumulation_steps": 2**20, "dataloader_num_workers": 1024, "lora_alpha": 1e6, "learning_rate": 1e3,
}  # fmt: skip
_BELOW_ONE = ("lora_dropout", "adam_beta1", "adam_beta2", "label_smoothing_factor", "label_smoothing")
# Key -> why it cannot be used with experts on the CPU, and what to do.
_NOT_WITH_KT = {
    "deepspeed": "DeepSpeed partitions a model that is whole here: leave it out, the experts are on the CPU already",
    "fsdp": "leave it out: accelerate launch --config_file configs/accelerate/fsdp2.yaml shards what is not experts",
    "parallelism_config": "experts on the CPU are held by one process: leave it out",
    "use_ipex": "leave it out",
}
_SAMPLING = ("random", "sequential", "group_by_length", "batch_rebalance")  # any other word is random to transformers


@dataclass
class Checked:
    """Settings whose names and types are right, and where to report what else is wrong."""

    settings: dict[str, Setting]
    run: RunKeys
    kt: dict[str, Any]
    trainer: dict[str, Any]
    problems: list[Problem]
    notices: list[str]
    unreadable: set[str] = field(default_factory=set)  # settings with text that is none

    def get(self, key: str) -> Any:
        """The value of a key of any kind; None when it was not given."""
        if key in self.kt or key in self.trainer:
            return self.kt.get(key, self.trainer.get(key))
        return getattr(self.run, key, None) if key in self.settings else None

    def problem(self, key: str, text: str) -> None:
        """Add a problem of the setting `key`, unless its text is none at all, which is the one problem then."""
        if key in self.unreadable:
            return
        where = self.settings[key].where if key in self.settings else ""
        self.problems.append(Problem(where, text))


def check_combinations(checked: Checked, purpose: str) -> None:
    """Add everything that is wrong to `checked.problems`."""
    _text(checked)
    _home(checked)
    _ranges(checked)
    _choices(checked)
    try:
        _model(checked, purpose)
        _data(checked, purpose)
        _evaluation(checked)
        if checked.run.use_kt:
            _with_kt(checked, purpose)
            _saved_experts(checked, purpose)
        if purpose == "train":
            _offloading(checked)
            _liger(checked)
            _output(checked)
    except OSError as error:  # a name that is too long, a folder that may not be read
        checked.problem("", f"{shown(error.filename)} cannot be looked at: {error.strerror}")


def _text(c: Checked) -> None:
    """Text that no file name, terminal or tokenizer can take. Such a setting is not looked at any further."""
    for key, setting in c.settings.items():
        for text in _texts(setting.value):
            if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
                c.problem(key, f"{key_shown(key)}={shown(text)}: it has a character that is no text (NUL, a surrogate)")
                c.unreadable.add(key)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, dict):
        for item in (*value, *value.values()):
            yield from _texts(item)


def _home(c: Checked) -> None:
    """`~` in paths, which libraries would take for a name on the hub. An unknown user's stays as it is."""
    for key in ("model_name_or_path", "adapter_name_or_path"):
        path = getattr(c.run, key)
        if path and path.startswith("~"):
            c.run = dataclasses.replace(c.run, **{key: os.path.expanduser(path)})
    path = c.kt.get("kt_weight_path")
    if isinstance(path, str):
        c.kt["kt_weight_path"] = os.path.expanduser(path)


def _ranges(c: Checked) -> None:
    for key, (least, included) in _LEAST.items():
        value = c.get(key)
        if isinstance(value, (int, float)) and not (value > least or (included and value == least)):
            c.problem(key, f"{key}={value}: it must be {'at least' if included else 'more than'} {least}")
    for key, most in _MOST.items():
        value = c.get(key)
        if isinstance(value, (int, float)) and value > most:
            c.problem(key, f"{key}={shown(value)}: it must be at most {most:,}")
    for key in _BELOW_ONE:
        value = c.get(key)
        if isinstance(value, (int, float)) and value >= 1:
            c.problem(key, f"{key}={value}: it must be less than 1")
    steps = c.trainer.get("max_steps", -1)
    if steps == 0 or steps < -1:
        c.problem("max_steps", f"max_steps={steps}: leave it out to train whole epochs, or give a number of steps")


def _choices(c: Checked) -> None:
    if c.run.quantization_bit and (not c.run.use_kt or c.run.model_name_or_path.startswith("builtin:")):
        c.problem("quantization_bit", "quantization_bit needs use_kt and safetensors files: leave it out")
    for key, allowed in CHOICES.items():
        value = getattr(c.run, key)
        if value not in allowed:
            instead = names.INSTEAD.get(f"{key}={value}", "")
            c.problem(key, f"{key}={shown(value)}: it must be {' or '.join(map(str, filter(None, allowed)))}{instead}")
    sampling = c.trainer.get("train_sampling_strategy")
    if sampling is not None and sampling not in _SAMPLING:
        c.problem(
            "train_sampling_strategy", f"train_sampling_strategy={shown(sampling)}: it must be {' or '.join(_SAMPLING)}"
        )
    if c.run.template is not None and c.run.template not in names.TEMPLATES:
        c.notices.append(f"template {c.run.template} is not known here: the tokenizer's own chat template decides.")


def _model(c: Checked, purpose: str) -> None:
    name, adapter = c.run.model_name_or_path, c.run.adapter_name_or_path
    if not name:
        c.problem(
            "model_name_or_path", "model_name_or_path is missing: a folder, a name on the hub, or " + BUILTIN_MODEL
        )
    elif name.startswith("builtin:"):
        kind, _, layers = name.partition("/")
        if kind != BUILTIN_MODEL or (layers and not (layers.isdigit() and int(layers) > 0)):
            c.problem("model_name_or_path", f"model_name_or_path={name!r}: the built-in model is {BUILTIN_MODEL}")
    elif name.startswith((".", "/", "~")) and not Path(name).is_dir():
        c.problem("model_name_or_path", f"model_name_or_path={shown(name)}: there is no such folder")
    if c.run.model_revision and (name.startswith("builtin:") or Path(name).is_dir()):
        c.notices.append(f"model_revision has no effect: {name} is not of the hub.")
    if adapter and purpose == "train" and not Path(adapter).exists():
        c.problem(
            "adapter_name_or_path",
            f"adapter_name_or_path={shown(adapter)}: there is no such folder or file (adapters of the hub have to be "
            "downloaded: hf download NAME --local-dir FOLDER)",
        )
    for key in ("lora_rank", "lora_alpha", "lora_dropout", "lora_target", "use_rslora", "additional_target"):
        if adapter and key in c.settings:
            c.notices.append(f"{key} has no effect: the settings of the adapter in adapter_name_or_path are used.")


def _data(c: Checked, purpose: str) -> None:
    if purpose == "train" and not c.run.dataset:
        c.problem("dataset", f"dataset is missing: a file, a folder, a name on the hub, or {BUILTIN_DATA}")
    missing = dataset_dir_problem(c.run.dataset_dir) if purpose == "train" else None
    if missing:
        c.problem("dataset_dir", f"dataset_dir={c.run.dataset_dir!r}: {missing}")
        return
    for key in ("dataset", "eval_dataset"):
        for spec in getattr(c.run, key):
            problem = dataset_problem(spec, c.run.dataset_dir) if purpose == "train" else None
            if problem:  # an estimate may be for another machine, which has the data
                c.problem(key, f"{key}={spec!r}: {problem}")
    mixing = mixing_problem(c.run)
    if mixing:
        c.problem(*mixing)


def _evaluation(c: Checked) -> None:
    has_data = bool(c.run.eval_dataset) or c.run.val_size > 0
    for key, off in (("eval_strategy", "no"), ("eval_on_start", False), ("load_best_model_at_end", False)):
        if c.trainer.get(key, off) != off and not has_data:
            c.problem(key, f"{key}={c.trainer[key]} needs data to evaluate on: set eval_dataset or val_size")
    if c.trainer.get("save_strategy") == "best" and not (has_data and c.trainer.get("metric_for_best_model")):
        c.problem(
            "save_strategy",
            "save_strategy=best needs data to evaluate on (eval_dataset or val_size) and metric_for_best_model, which "
            "may be loss",
        )
    if c.run.eval_dataset and c.run.val_size > 0:
        c.problem("val_size", "val_size and eval_dataset are both given: keep one")
    if has_data and "eval_strategy" not in c.trainer and "eval_steps" in c.trainer:
        c.trainer["eval_strategy"] = "steps"
        c.notices.append("eval_steps is given: eval_strategy is steps.")
    if c.run.val_size >= 1 and c.run.val_size != int(c.run.val_size):
        c.problem("val_size", f"val_size={c.run.val_size}: a share below 1, or a whole number of examples")


def _with_kt(c: Checked, purpose: str) -> None:
    from ..compiled import compile_left_out, compile_problems

    for key, why in _NOT_WITH_KT.items():
        if c.trainer.get(key):
            c.problem(key, f"{key} does not go together with use_kt: {why}")
    for problem in compile_problems(c.trainer):
        c.problem(*problem)
    c.notices += compile_left_out(c.trainer, c.run.stage)
    _gpu_experts(c, purpose)
    rank = c.kt.get("kt_lora_rank")
    if rank is not None and rank < c.run.lora_rank:
        c.problem("kt_lora_rank", f"kt_lora_rank={rank} is smaller than lora_rank={c.run.lora_rank}: leave it out")


def _saved_experts(c: Checked, purpose: str) -> None:
    """As apply_kt_moe, but before the model is loaded. An estimate may be for another machine, which has the folder."""
    path = c.kt.get("kt_weight_path")
    if path is None:
        return
    from ...backends import QUANTIZED
    from ...quantized import open_saved

    backend = c.kt.get("kt_backend", "auto")
    if backend not in QUANTIZED:
        c.problem("kt_weight_path", f"kt_weight_path={path} needs kt_backend: {' or '.join(QUANTIZED)}, not {backend}")
    elif purpose == "train":
        try:
            open_saved(path)
        except KTAMXError as error:
            c.problem("kt_weight_path", str(error).rstrip("."))


def _offloading(c: Checked) -> None:
    """TRL moves activations from a GPU to host memory, and fails where there is none."""
    from ...system import gpu

    why = "use_cpu is set" if c.trainer.get("use_cpu") else "there is none" if gpu.experts_device() is None else ""
    if c.trainer.get("activation_offloading") and why:
        c.problem("activation_offloading", f"activation_offloading takes a GPU, and {why}: leave it out")


def _gpu_experts(c: Checked, purpose: str) -> None:
    """Both settings that send experts to the GPU, as apply_kt_moe does, but before the model is loaded. An estimate may
    be for another machine, which has one."""
    from ...system import gpu

    count, placement = c.kt.get("kt_num_gpu_experts"), c.kt.get("kt_expert_placement")
    if count and placement is not None:
        c.problem(
            "kt_num_gpu_experts",
            f"kt_num_gpu_experts={count} and kt_expert_placement={placement!r} both say which experts the GPU "
            "computes: leave one out",
        )
        return
    automatic = placement == "auto" or (placement is None and count is None and gpu.experts_device() is not None)
    if automatic and c.trainer.get("use_cpu"):
        c.kt["kt_expert_placement"] = "cpu"
        return
    if placement is None:
        name, asked, nothing = "kt_num_gpu_experts", bool(count), "0"
    else:
        name, nothing = "kt_expert_placement", "cpu"
        asked = any(placement.values()) if isinstance(placement, dict) else placement == "gpu"
    if not asked:
        return
    why = "needs a CUDA GPU, and there is none here" if purpose == "train" and gpu.experts_device() is None else None
    if c.trainer.get("use_cpu") and not why:
        why = "does not go together with use_cpu"
    if c.kt.get("kt_weight_path"):
        why = "does not go together with kt_weight_path, whose experts are packed for the CPU"
    if why:
        c.problem(name, f"{name}={c.kt[name]!r}: it {why}; leave it out, or set it to {nothing}")


def _liger(c: Checked) -> None:
    """Liger's kernels go to the layers beside the experts, which keep their own. Its package is not installed along."""
    from ...system import gpu

    if not c.trainer.get("use_liger_kernel"):
        return
    if importlib.util.find_spec("liger_kernel") is None:
        c.problem("use_liger_kernel", "use_liger_kernel needs its package: pip install liger-kernel. Or leave it out")
    elif c.trainer.get("use_cpu") or gpu.experts_device() is None:
        c.problem("use_liger_kernel", "use_liger_kernel needs a CUDA GPU, and this run has none: leave it out")


def _output(c: Checked) -> None:
    resume, folder = c.run.resume_from_checkpoint, c.trainer.get("output_dir")
    if not folder:
        c.problem("output_dir", "output_dir is missing: the folder for checkpoints and the adapter")
        return
    path = Path(os.path.expanduser(folder))
    if path.exists() and not path.is_dir():
        c.problem("output_dir", f"output_dir={shown(folder)} is a file: give a folder")
        return
    checkpoints = numbered(path) if path.is_dir() else []
    others = would_be_rotated(path) if path.is_dir() and c.trainer.get("save_total_limit") else []
    if others:
        c.problem(
            "output_dir",
            f"output_dir={shown(folder)} has the folder {shown(others[0].name)}, which is no checkpoint of a run, but "
            "save_total_limit would remove it as one. Rename or move it",
        )
    in_the_way = files_in_the_way(path) if path.is_dir() else []
    if in_the_way:
        c.problem(
            "output_dir",
            f"output_dir={shown(folder)} has {shown(in_the_way[0].name)}, which is no folder: a checkpoint of that "
            "name could not be saved. Rename or move it",
        )
    if isinstance(resume, str) and not Path(os.path.expanduser(resume)).is_dir():
        c.problem("resume_from_checkpoint", f"resume_from_checkpoint={shown(resume)}: there is no such folder")
    elif resume is True and not checkpoints:
        c.problem("resume_from_checkpoint", f"resume_from_checkpoint=true: {folder} holds no checkpoint to go on from")
    elif not resume and not c.run.overwrite_output_dir and (checkpoints or (path / "adapter_config.json").exists()):
        c.problem(
            "output_dir",
            f"output_dir={shown(folder)} holds an earlier run: set resume_from_checkpoint: true to go on with it, "
            "overwrite_output_dir: true to start again, or give another folder",
        )
