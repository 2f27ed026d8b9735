"""The settings tried out before the model is loaded: what would fail after minutes of loading fails at once.

TRL's own trainer is built with the run's settings and tokenizer around a tiny model, on a few of its rows, and makes
one optimizer step: the reporters are imported, the rows templated and tokenized, optimizer and schedule built. What
they refuse is refused in a sentence.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import TrainerCallback

from ..errors import KTAMXConfigError, KTAMXError
from .config.read import trainer_config
from .config.settings import TrainSettings
from .config.stages import stage_of
from .config.yaml_file import shown
from .trainers import loraplus, make_trainer

_TOKENS = 32  # of a row in the step
_STEPS = 1000  # that the schedule is built for, where the run's number is not known yet
# What belongs to the run's own model, data or network, or would cost time for nothing.
_LEFT_OUT: dict[str, Any] = {
    "report_to": "none", "push_to_hub": False, "save_strategy": "no", "eval_strategy": "no", "eval_on_start": False,
    "load_best_model_at_end": False, "logging_strategy": "no", "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1, "dataloader_num_workers": 0, "dataloader_persistent_workers": False,
    "dataloader_prefetch_factor": None, "dataset_num_proc": None, "torch_compile": False, "use_liger_kernel": False,
    "precompute_ref_log_probs": False, "auto_find_batch_size": False, "torch_empty_cache_steps": None,
    "router_aux_loss_coef": None,  # the tiny model has no routers
}  # fmt: skip
# KTO refuses a batch of one row, GRPO one of less than two answers; and the tiny model writes nonsense, not much of it.
_OF_STAGE: dict[str, dict[str, Any]] = {
    "kto": {"per_device_train_batch_size": 2},
    "grpo": {
        "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "num_generations": 2,
        "num_generations_eval": 2, "generation_batch_size": None, "steps_per_generation": None,
        "max_completion_length": 4, "use_vllm": False, "log_completions": False, "log_completions_hub_repo": None,
    },
}  # fmt: skip


def try_out(
    settings: TrainSettings, options: dict[str, Any], tokenizer: Any, rows: Any, rewards: Sequence[Any] = ()
) -> None:
    """Train a tiny model for a step as the settings say.

    Args:
        settings: The run's.
        options: The keyword arguments of TRL's configuration.
        tokenizer: The run's.
        rows: A few of the run's, as a `Dataset` in TRL's format.
        rewards: Functions that judge what the model writes; they are called with what the tiny one does.

    Raises:
        KTAMXConfigError: What the libraries refuse, naming the setting where they do.
    """
    by_launcher = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    if by_launcher or settings.trainer.get("deepspeed") or settings.trainer.get("fsdp"):
        return  # they keep a state in the process, which only the run's own model may make
    named = [key for key in options if key in settings.trainer]
    try:
        with _quiet(), tempfile.TemporaryDirectory(prefix="kt-hf-try-") as folder:
            _report(settings, options)
            _hub(options)
            _step(settings, options, tokenizer, rows, folder, rewards)
    except KTAMXError:
        raise
    except MemoryError:
        raise
    except Exception as error:  # whatever a library raises, it is about a setting, the tokenizer or a row
        text = " ".join(str(error).split()) or type(error).__name__
        about = "".join(f"{key}={shown(options[key])}: " for key in _about_which(text, named, options)[:1])
        raise KTAMXConfigError(
            f"{about}{text[:600]} ({type(error).__name__}, when the settings were tried out on a tiny model)"
        ) from error


def _about_which(text: str, named: list[str], options: dict[str, Any]) -> list[str]:
    """Of the settings that were given, those that a library's message names; else those whose value it cites."""
    keys = [key for key in named if re.search(rf"\b{re.escape(key).replace('_', '[_ ]')}\b", text)]
    values = [
        key
        for key in named
        if isinstance(options[key], str) and re.search(rf"(?<!\w){re.escape(options[key])}(?!\w)", text, re.IGNORECASE)
    ]
    return keys or values


def _report(settings: TrainSettings, options: dict[str, Any]) -> None:
    """Make the reporters' callbacks, which import their packages; nothing is sent."""
    from transformers.integrations import get_reporting_integration_callbacks

    reporters = options.get("report_to")
    if not reporters or reporters == "none" or reporters == ["none"]:
        return
    names = trainer_config(settings.run.stage)(**options).report_to
    for name in [names] if isinstance(names, str) else names or []:
        try:
            for callback in get_reporting_integration_callbacks([name]):
                callback()
        except Exception as error:
            text = " ".join(str(error).split())
            raise KTAMXConfigError(f"report_to={name}: {text} Or leave it out (report_to: none).") from None


def _hub(options: dict[str, Any]) -> None:
    """Whether the hub knows who pushes, and takes the name; the Trainer would ask after the model is loaded."""
    if not options.get("push_to_hub"):
        return
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    name = options.get("hub_model_id")
    try:
        if name:
            validate_repo_id(name)
        HfApi(token=options.get("hub_token")).whoami()
    except Exception as error:
        text = " ".join(str(error).split())
        about = f"hub_model_id={shown(name)}" if isinstance(error, ValueError) else "push_to_hub=True"
        raise KTAMXConfigError(f"{about} cannot be used: {text} Or leave push_to_hub out.") from None


def _step(
    settings: TrainSettings, options: dict[str, Any], tokenizer: Any, rows: Any, folder: str, rewards: Sequence[Any]
) -> None:
    from peft import LoraConfig

    stage = stage_of(settings.run.stage)
    more = _LEFT_OUT | _OF_STAGE.get(stage.name, {})
    steps = options.get("max_steps") or -1
    more["max_steps"] = steps if steps > 0 else _STEPS
    if options.get("optim_target_modules"):
        more["optim_target_modules"] = "all-linear"  # the names are those of the run's model
    fields = stage.config_class().__dataclass_fields__
    tried = options | {key: value for key, value in more.items() if key in fields} | {"output_dir": folder}
    task = "SEQ_CLS" if stage.scores else "CAUSAL_LM"
    trainer = make_trainer(
        settings, tried, _tiny_model(settings, tokenizer), LoraConfig(r=1, target_modules=["q_proj"], task_type=task),
        rows, None, _copy(tokenizer), rewards, [_OneStep()],
    )  # fmt: skip
    trainer.train_dataset = trainer.train_dataset.select([0])
    if not stage.generates:
        trainer.train_dataset = trainer.train_dataset.map(_shortened)
    with _about(("optim_args", "optim_target_modules", "loraplus_lr_ratio", "optim"), options):
        loraplus(settings, trainer)
        trainer.create_optimizer()
    with _about(("lr_scheduler_kwargs", "lr_scheduler_type"), options):
        trainer.create_scheduler(trainer.args.max_steps, trainer.optimizer)
    trainer.train()
    if settings.run.eval_dataset or settings.run.val_size:
        trainer.eval_dataset = trainer.train_dataset
        _check_metric(trainer.evaluate(), options.get("metric_for_best_model"))


@contextlib.contextmanager
def _about(keys: tuple[str, ...], options: dict[str, Any]) -> Iterator[None]:
    """What goes wrong in it is about these settings, as far as they are given."""
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split())
        settings = ", ".join(f"{key}={shown(options[key])}" for key in keys if options.get(key) is not None)
        raise KTAMXConfigError(f"{settings or keys[-1]} cannot be used: {text}") from error


def _check_metric(metrics: dict[str, float], metric: str | None) -> None:
    if metric and f"eval_{metric.removeprefix('eval_')}" not in metrics:
        measured = ", ".join(sorted(name for name in metrics if isinstance(metrics[name], float)))
        raise KTAMXConfigError(f"metric_for_best_model={metric!r} is not measured. There are: {measured}.")


def _tiny_model(settings: TrainSettings, tokenizer: Any) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    vocabulary = max([len(tokenizer), *tokenizer.get_vocab().values()]) + 1
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    if settings.run.attn_implementation:
        config._attn_implementation = settings.run.attn_implementation
    dtype = (
        torch.float32 if settings.run.torch_dtype in ("float32", "auto") else getattr(torch, settings.run.torch_dtype)
    )
    kind: Any = LlamaForCausalLM
    if stage_of(settings.run.stage).scores:
        kind, config.num_labels = LlamaForSequenceClassification, 1
    with torch.random.fork_rng(devices=[]):
        return kind(config).to(dtype)


def _copy(tokenizer: Any) -> Any:
    """TRL sets tokens and templates of the tokenizer it is given; the run's own trainer is to do that itself."""
    import copy

    return copy.deepcopy(tokenizer)


def _shortened(row: dict[str, Any]) -> dict[str, Any]:
    """The end of a tokenized row, where the answer is."""
    short = {key: value[-_TOKENS:] for key, value in row.items() if isinstance(value, list) and _numbers(value)}
    if "seq_lengths" in short:
        short["seq_lengths"] = [min(_TOKENS, sum(row["seq_lengths"]))]
    return row | short


def _numbers(values: list[Any]) -> bool:
    return bool(values) and isinstance(values[0], int)


class _OneStep(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = True


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing of the trial on the terminal: the run itself says it once more."""
    import datasets

    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        if not bars:
            datasets.enable_progress_bars()
