"""A run: read data, load and patch the model, train with TRL's own trainer, evaluate, save, draw."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from ..errors import KTAMXConfigError
from ..placement.assembly import training_as
from ..ranks import current_world
from ..system.parallel import refuse_several_gpus
from ..system.text import printable
from .checkpoints import clear_earlier_run
from .compiled import asked, compile_around_experts, without
from .config.read import on_this_machine
from .config.settings import TrainSettings
from .config.stages import stage_of
from .data.reading import reading
from .data.rows import Rows, training_and_evaluation
from .data.tokens import IN_THE_LABELS, Prepared, prepare
from .data.vision import check_options, example, prepare_vision
from .dry_run import try_out
from .expert_profile import ProfileRun, as_before, with_lora_as_before
from .finish import finish
from .folding import Folding
from .folding_rules import recorded
from .full_disk import full_disks
from .lock import OutputLock
from .losses import check_loss
from .memory import check_gpu, estimate, in_words
from .memory_parts import PROGRAM, Estimate
from .model_sizes import model_sizes
from .models import check_weights, load_config, load_model, load_tokenizer, outline_of
from .owners import owners_of
from .processor import load_processor, sees
from .progress import ShowProgress, TokenCounter
from .report import show_example, show_result, show_start
from .resume import (
    KeepRecord,
    Resume,
    check_left,
    check_rows,
    check_settings,
    find_checkpoint,
    read_record,
    record,
    train,
    with_rows,
)
from .reward_model import check_head
from .rewards import reward_functions
from .start_adapter import check_start, put_adapter
from .stopping import Interrupted, StopOnSignal, checkpoint_of
from .targets import check_targets, lora_config
from .together import console_of_rank, first_of_host_first, is_first, told_once
from .trainers import loraplus, make_trainer


def run(settings: TrainSettings, console: Console) -> dict[str, Any]:
    """Train as `settings` say, telling about it on `console`, and return the summary that is written beside the
    adapter.

    Raises:
        KTAMXError: Something in the data, the model or the machine does not fit the settings.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint was saved if the run makes any.
    """
    console, first = console_of_rank(console), is_first()
    lock = OutputLock(Path(settings.output_dir).expanduser())
    try:
        if first:
            lock.take(create=False)
        with told_once(), first_of_host_first():
            ready = _prepare(settings, console)
        with told_once():
            _try_out(settings, ready, console)
        if first:
            lock.take()
        return _train(settings, ready, console)
    finally:
        lock.release()


@dataclass
class _Ready:
    """All that a run needs before its model is loaded."""

    config: Any
    tokenizer: Any
    train_data: Prepared
    eval_data: Prepared | None
    options: dict[str, Any]
    memory: Estimate
    resume: Resume | None
    record: dict[str, Any]
    expert_rank: int | None  # of the adapter to start from
    rewards: Sequence[Callable[..., Any]]  # of stage: grpo


def _prepare(settings: TrainSettings, console: Console) -> _Ready:
    """Everything that can be wrong is found before weights are loaded or anything is written."""
    keys = settings.run
    if keys.use_kt and current_world().size == 1 and not settings.trainer.get("use_cpu"):
        refuse_several_gpus(torch.cuda.device_count())
    _print_notes(console, settings.notices)
    resume, content = find_checkpoint(settings), record(settings)
    if resume:
        changes = check_settings(resume, content)
        _print_notes(console, [f"Resuming from {resume.folder}, after step {resume.step}.", *resume.notes, *changes])
    config, more = load_config(keys)
    train_rows, eval_rows = training_and_evaluation(settings, sees(config))
    content = with_rows(content, train_rows.rows)
    rewards = reward_functions(keys.reward_funcs, {column for row in train_rows.rows for column in row} - {"prompt"})
    if resume:
        check_rows(resume, content)
        resume = check_left(resume, settings)
    tokenizer, notes = load_tokenizer(keys, chat=train_rows.conversational)
    _print_notes(console, more + notes)
    _print_notes(console, [note for rows in (train_rows, eval_rows) if rows for note in rows.notes])
    outline = outline_of(keys, config)
    check_targets(outline, keys)
    check_loss(settings, outline)
    if stage_of(keys.stage).scores:
        check_head(keys)
    rank, notes = check_start(keys, outline)
    memory = _before_loading(settings, config, outline)
    check_gpu(memory)
    _print_notes(console, notes + check_weights(keys, config))
    options = _trainer_options(settings, len(train_rows.rows))
    vocabulary = getattr(config.get_text_config(), "vocab_size", None) or len(tokenizer)
    processor, prepared = _reader(settings, options, tokenizer, vocabulary, (train_rows, eval_rows))
    with _working(console, "Tokenizing"):
        train_data = prepared(train_rows, "train")
        eval_data = prepared(eval_rows, "eval") if eval_rows else None
    _print_notes(console, [note for data in (train_data, eval_data) if data for note in data.notes])
    options = {key: value for key, value in options.items() if key not in IN_THE_LABELS}
    _check_batch(options, len(train_data.dataset))
    return _Ready(
        config, processor or tokenizer, train_data, eval_data, options, memory, resume, content, rank, rewards
    )


def _try_out(settings: TrainSettings, ready: _Ready, console: Console) -> None:
    """What TRL refuses is refused before weights are loaded, too; all processes of a run try it together."""
    tokenizer, data, memory = getattr(ready.tokenizer, "tokenizer", None), ready.train_data, ready.memory
    one = data.dataset.select([0]) if tokenizer is None else example(data)
    options = without(ready.options) if settings.run.use_kt else ready.options
    try_out(settings, options, tokenizer or ready.tokenizer, one, ready.rewards)
    if not memory.fits:
        advice = "; ".join(memory.advice)
        _print_notes(console, [f"This may need more memory than there is ({in_words(memory)}). {advice}."])


def _train(settings: TrainSettings, ready: _Ready, console: Console) -> dict[str, Any]:
    from transformers import set_seed

    keys, train_data, eval_data = settings.run, ready.train_data, ready.eval_data
    if console.is_terminal:
        console.print("Loading the model")  # experts have a progress bar of their own
    placing = ProfileRun(settings, train_data.sequences, console, ready.resume.folder if ready.resume else None)
    kt, budget = settings.kt if keys.use_kt else None, ready.memory.budget
    if kt and ready.resume:
        kt, notes = as_before(kt, ready.resume.folder)
        budget = with_lora_as_before(budget, ready.resume.folder)
        _print_notes(console, notes)
    if stage_of(keys.stage).scores:
        set_seed(ready.options.get("seed", 42))  # the score head's start
    with training_as(budget):
        model = load_model(keys, ready.config, kt, console, placing, ready.memory.tokens, ready.expert_rank)
    peft_config = None
    if keys.adapter_name_or_path:
        model = put_adapter(model, keys)
    else:
        peft_config, notes = lora_config(model, keys)
        _print_notes(console, notes)
    counter = TokenCounter(model)
    stop, progress = StopOnSignal(console), ShowProgress(console, counter)
    with _working(console, "Packing the experts"):
        trainer = _make_trainer(settings, ready, model, peft_config)
    if keys.use_kt and (how := asked(ready.options)) is not None:
        count = compile_around_experts(trainer.model, **how)
        _print_notes(console, [f"torch_compile: {count} modules around the experts are compiled when they are called."])
    folding = Folding(trainer, lambda line: _print_notes(console, [line]), lambda: loraplus(settings, trainer))
    for callback in (folding, stop, progress, KeepRecord(ready.record)):
        trainer.add_callback(callback)
    rows = [len(data.dataset) if data else 0 for data in (train_data, eval_data)]
    show_start(console, settings, trainer, in_words(ready.memory), *rows)
    show_example(console, trainer, getattr(ready.tokenizer, "tokenizer", ready.tokenizer))
    if keys.overwrite_output_dir and not ready.resume and is_first():
        removed = clear_earlier_run(Path(trainer.args.output_dir))
        if removed:
            console.print(f"overwrite_output_dir: {removed} checkpoints of an earlier run are removed.")
    checkpoint = ready.resume.folder if ready.resume else None
    folding.decide(recorded(read_record(checkpoint)) if checkpoint else None, resuming=checkpoint is not None)
    try:
        with stop.listening(trainer), full_disks(trainer):
            train(trainer, ready.resume, folding.train)
            state = trainer.state
            if stop.number is not None and state.global_step < state.max_steps:
                raise Interrupted(_what_is_left(settings, trainer), stop.number)
            evaluated = any(row.get("step") == state.global_step for row in state.log_history if "eval_loss" in row)
            if eval_data and not evaluated and stop.number is None:
                trainer.evaluate()
    finally:
        progress.close()
        counter.close()
    with full_disks(trainer):
        summary = finish(settings, ready, trainer, progress)
    chats = getattr(ready.tokenizer, "chat_template", None) is not None
    show_result(console, settings, summary, ready.expert_rank or keys.lora_rank, chats)
    if stop.number is not None:
        raise Interrupted(f"Stopped after the last step. The adapter is in {summary['adapter']}.", stop.number)
    return summary


def _reader(
    settings: TrainSettings, options: dict[str, Any], tokenizer: Any, vocabulary: int, rows: Sequence[Rows | None]
) -> tuple[Any, Callable[[Rows, str], Prepared]]:
    """(the processor of a run that has images, None for one that has not; what makes data of rows)."""
    keys = settings.run
    if not any(part.pictured for part in rows if part):
        how = reading(keys, options, tokenizer, vocabulary)
        return None, lambda part, purpose: prepare(part, how, keys.stage, purpose)
    check_options(keys, options)
    processor = load_processor(keys, tokenizer)
    most = options.get("max_length", 1024)
    return processor, lambda part, purpose: prepare_vision(part, processor, most, vocabulary, purpose)


def _before_loading(settings: TrainSettings, config: Any, outline: Any) -> Estimate:
    """The memory the run will take; and what the experts cannot be computed with is refused before weights are loaded.

    Raises:
        KTAMXError: The model has no experts of a known kind, or the backend asked for does not run here.
    """

    from ..backends import choose_backend
    from ..shapes import ExpertShape
    from ..system.cpu import plan_threads
    from ..system.memory import available_memory

    sizes = model_sizes(config, settings.run, outline)
    if settings.run.use_kt:
        world = current_world()
        hosts = world.size // world.local_size
        free = available_memory() * world.local_size, _gpu_free(settings) * world.local_size
        sizes = sizes.of_rank(owners_of(settings, sizes, (hosts, world.local_size), free), world.local_size, hosts)
    kernel = False
    if settings.run.use_kt:
        shape = ExpertShape(sizes.experts, sizes.top_k, sizes.hidden, sizes.intermediate)
        workers = plan_threads().workers if settings.kt.kt_num_threads is None else None
        dtype = getattr(torch, settings.run.torch_dtype, None)
        kernel = choose_backend(settings.kt.kt_backend, shape, workers=workers, dtype=dtype)[0] != "torch"
    gpu_free = _gpu_free(settings) or None
    gpu = gpu_free is not None
    # The program's own part is in memory already.
    return estimate(settings, sizes, kernel, gpu, available_memory() + PROGRAM, gpu_free)


def _gpu_free(settings: TrainSettings) -> int:
    gpu = torch.cuda.is_available() and not settings.trainer.get("use_cpu")
    return int(torch.cuda.mem_get_info()[0]) if gpu else 0


def _make_trainer(settings: TrainSettings, ready: _Ready, model: Any, peft_config: Any) -> Any:
    """TRL's trainer of the stage, around the model."""
    from transformers import PrinterCallback

    from .. import KTMoECallback

    callbacks = [KTMoECallback()] if settings.run.use_kt else []
    for callback in callbacks:  # which would look for checkpoints that are not complete; `find_checkpoint` has done it
        callback.on_init_end = lambda *_, **__: None  # type: ignore[method-assign]
        callback.advises = False  # `Folding` does what it would advise
    evaluated = ready.eval_data.dataset if ready.eval_data else None
    options = without(ready.options) if settings.run.use_kt else ready.options
    trainer = make_trainer(
        settings, options, model, peft_config, ready.train_data.dataset, evaluated, ready.tokenizer, ready.rewards,
        callbacks,
    )  # fmt: skip
    for callback in callbacks:
        callback.lead(trainer)
    loraplus(settings, trainer)
    trainer.remove_callback(PrinterCallback)  # ours take its place
    return trainer


def _trainer_options(settings: TrainSettings, rows: int) -> dict[str, Any]:
    options = on_this_machine(settings.trainer, settings.run) | {"disable_tqdm": True}
    options["output_dir"] = str(Path(settings.output_dir).expanduser())
    processes = options.get("dataset_num_proc")
    if processes:  # a process costs more than a thousand short rows
        options["dataset_num_proc"] = min(processes, os.cpu_count() or 1, rows // 1000) or None
    return options


def _check_batch(options: dict[str, Any], rows: int) -> None:
    """Nothing would be trained where no batch is full and only full ones are taken."""
    batch = options.get("per_device_train_batch_size", 8)
    if options.get("dataloader_drop_last") and rows < batch:
        raise KTAMXConfigError(
            f"dataloader_drop_last=True drops what is less than a batch, and {rows} rows are less than "
            f"per_device_train_batch_size={batch}: nothing would be trained. Leave it out, or make the batch smaller."
        )


def _what_is_left(settings: TrainSettings, trainer: Any) -> str:
    step = trainer.state.global_step
    folder = checkpoint_of(trainer.args, trainer.state)
    if not folder.is_dir():
        why = "save_strategy: no" if step else "not one step was done"
        return f"Stopped after step {step} of {trainer.state.max_steps}. Nothing was saved ({why})."
    # As it was typed, so that the same run goes on.
    gone = ("resume_from_checkpoint", "overwrite_output_dir")
    overrides = [one for one in settings.overrides if one.partition("=")[0].strip() not in gone]
    command = shlex.join(["kt-hf", "train", settings.source, *overrides, "resume_from_checkpoint=true"])
    return f"Stopped after step {step} of {trainer.state.max_steps}. {folder} has it all; go on with:\n  {command}"


def _working(console: Console, words: str) -> contextlib.AbstractContextManager[Any]:
    """Says what takes its time, on terminals alone."""
    return console.status(words) if console.is_terminal else contextlib.nullcontext()


def _print_notes(console: Console, lines: Any) -> None:
    for line in lines:
        console.print(f"[dim]note:[/dim] {escape(printable(line))}")
