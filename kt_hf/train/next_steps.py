"""What to do with a run's adapter: the commands and the Python program that a run prints, which run as they are."""

from __future__ import annotations

import shlex

from .config.settings import RunKeys, TrainSettings
from .config.stages import stage_of
from .models import builtin_dtype, builtin_layers, is_builtin, load_config

_QUESTION = {"role": "user", "content": "Who are you?"}
_ANSWER = {"role": "assistant", "content": "A language model."}


def next_steps(settings: TrainSettings, adapter: str, rank: int, chats: bool) -> list[tuple[str, list[str]]]:
    """Titles, each with a command of a shell or a program's lines.

    Args:
        settings: Of the run.
        adapter: The adapter's folder.
        rank: The adapter's on experts.
        chats: Whether the tokenizer has a chat template.
    """
    shell = [(title, [command]) for title, command in commands(settings, adapter, chats)]
    scores = stage_of(settings.run.stage).scores
    title = "Load it, and score an answer" if scores else "Load it, and ask it something"
    return [*shell, (title, loading_lines(settings, adapter, rank, chats))]


def commands(settings: TrainSettings, adapter: str, chats: bool) -> list[tuple[str, str]]:
    """The commands of a shell, each with its title. Arguments as of `next_steps`."""
    if not settings.run.use_kt:
        return []
    export = ["kt-hf", "export", adapter, f"{adapter.rstrip('/')}_peft", "--to", "peft"]
    chat = [("Talk with it", shlex.join(["kt-hf", "chat", adapter]))]
    talks = chats and not stage_of(settings.run.stage).scores
    return [*(chat if talks else []), ("Export it for stock PEFT", shlex.join(export))]


def loading_lines(settings: TrainSettings, adapter: str, rank: int, chats: bool) -> list[str]:
    """A Python program, line by line, that loads the run's model with its adapter, and calls it once.

    Args:
        settings: Of the run.
        adapter: The adapter's folder.
        rank: The adapter's on experts.
        chats: Whether the tokenizer has a chat template; else the model continues a plain text.
    """
    keys, scores = settings.run, stage_of(settings.run.stage).scores
    load = _builtin(settings, rank) if is_builtin(keys.model_name_or_path) else _from_files(settings, adapter, rank)
    lines = ["from peft import PeftModel", *load, f"model = PeftModel.from_pretrained(model, {adapter!r}).eval()"]
    if chats:
        messages, more = ([_QUESTION, _ANSWER], "") if scores else ([_QUESTION], "add_generation_prompt=True, ")
        lines += [
            f"messages = {messages!r}",
            f'inputs = tokenizer.apply_chat_template(messages, {more}return_tensors="pt", return_dict=True)',
        ]
    else:
        lines += ['inputs = tokenizer("Once upon a time", return_tensors="pt")']
    if scores:
        return [*lines, "print(model(**inputs).logits.item())  # its score"]
    return [
        *lines,
        "output = model.generate(**inputs, max_new_tokens=64)",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))',
    ]


def _builtin(settings: TrainSettings, rank: int) -> list[str]:
    """The lines that make `model` and `tokenizer` of the built-in model."""
    keys = settings.run
    layers, scores = builtin_layers(keys.model_name_or_path), stage_of(keys.stage).scores
    some = "" if layers is None else f"num_layers={layers}, "
    lines = ["from kt_hf.builtin.smollm2_moe import upcycle"]
    lines += ["from kt_hf.train.reward_model import with_score_head"] if scores else []
    lines += ["from kt_hf import KTConfig, apply_kt_moe"] if keys.use_kt else []
    lines += [f"model, tokenizer = upcycle({some}dtype={builtin_dtype(keys)!r})"]
    lines += ["model = with_score_head(model)"] if scores else []
    return lines + ([f"model = apply_kt_moe(model, {_kt_config(settings, rank)})"] if keys.use_kt else [])


def _from_files(settings: TrainSettings, adapter: str, rank: int) -> list[str]:
    """The lines that make `model` of a folder or a name of the hub, and `tokenizer` of the adapter's folder."""
    keys = settings.run
    name, auto = keys.model_name_or_path, "" if keys.use_kt else _auto_class(keys)
    trusted = ", trust_remote_code=True" if keys.trust_remote_code else ""
    more = f", revision={keys.model_revision!r}" if keys.model_revision else ""
    more += trusted + _score_head(keys)
    lines = ["from transformers import AutoTokenizer" + ("" if keys.use_kt else f", {auto}")]
    lines += ["from kt_hf import KTConfig, load_kt_model"] if keys.use_kt else []
    call = (
        f"load_kt_model({name!r}, {_kt_config(settings, rank)}" if keys.use_kt else f"{auto}.from_pretrained({name!r}"
    )
    lines += [f"model = {call}, dtype={keys.torch_dtype!r}{more})"]
    return [*lines, f"tokenizer = AutoTokenizer.from_pretrained({adapter!r}{trusted})"]


def _auto_class(keys: RunKeys) -> str:
    """transformers' class that loads the model as the run did."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    if stage_of(keys.stage).scores:
        return "AutoModelForSequenceClassification"
    config = load_config(keys)[0]
    named = (getattr(config, "architectures", None) or [None])[0]
    seeing = named is not None and named == MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type)
    return "AutoModelForImageTextToText" if seeing else "AutoModelForCausalLM"


def _kt_config(settings: TrainSettings, rank: int) -> str:
    """`KTConfig(...)` with the settings that differ from the defaults, packed for the adapter's rank."""
    given = settings.kt.changed()
    given.setdefault("kt_lora_rank", rank)
    return f"KTConfig({', '.join(f'{key}={value!r}' for key, value in given.items())})"


def _score_head(keys: RunKeys) -> str:
    """The arguments that make a reward model of a language model's checkpoint; "" in other stages."""
    if not stage_of(keys.stage).scores:
        return ""
    if not keys.use_kt:
        return ", num_labels=1"
    kind = load_config(keys)[0].architectures[0]
    return f", architectures=[{kind!r}], num_labels=1"
