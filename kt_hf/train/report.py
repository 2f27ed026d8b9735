"""What a run says before it starts and when it is done."""

from __future__ import annotations

import shlex
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from ..system.text import printable
from .config.settings import TrainSettings
from .config.stages import stage_of
from .models import load_config
from .together import ranks_in_words

# transformers' class that loads a model, by whether it has a score head.
_AUTO = {False: "AutoModelForCausalLM", True: "AutoModelForSequenceClassification"}


def show_start(console: Console, settings: TrainSettings, trainer: Any, memory: str, rows: int, eval_rows: int) -> None:
    """A table of what is about to happen."""
    from ..experts import kt_layers
    from ..placement import packer_of

    model, keys, args = trainer.model, settings.run, trainer.args
    table = _table()
    table.add_row(
        "Model",
        f"{escape(keys.model_name_or_path)} ({model.dtype}, the rest of it on {model.device.type})".replace(
            "torch.", ""
        ),
    )
    layers = kt_layers(model)
    if layers:
        packer, shape = packer_of(model), layers[0].shape
        assert packer is not None
        table.add_row(
            "Experts", f"{len(layers)} layers patched, {shape.num_experts} experts each, {shape.top_k} a token"
        )
        if words := ranks_in_words(model):
            table.add_row("Processes", words)
        threads = str(packer.threads) if packer.backend != "torch" else "PyTorch's threads"
        table.add_row("Backend", f"{packer.backend}, {threads} ({escape(packer.reason)})")
    else:
        table.add_row("Experts", "not patched (use_kt: false): transformers computes them")
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    in_experts = sum(count for name, count in trained.items() if ".experts." in name)
    table.add_row(
        "Trained",
        f"LoRA rank {keys.lora_rank}: {sum(trained.values()) / 1e6:.2f} million parameters, "
        f"{in_experts / 1e6:.2f} in experts",
    )
    batch = f"{args.per_device_train_batch_size} x {args.gradient_accumulation_steps}"
    length = getattr(args, "max_length", None) or "unlimited"
    table.add_row("Data", f"{rows} examples, {eval_rows} to evaluate; batch {batch}, at most {length} tokens each")
    table.add_row("Stage", f"{keys.stage}, learning rate {args.learning_rate:g}, {args.lr_scheduler_type.value}")
    table.add_row("Memory", memory)
    console.print(Panel(table, title="kt-hf train", title_align="left"))


def show_example(console: Console, trainer: Any, tokenizer: Any) -> None:
    """The first example as the model sees it; what is trained stands out."""
    row = trainer.train_dataset[0]
    if "input_ids" not in row and "images" not in row:
        _show_tokenized(console, tokenizer, row)
        return
    if "images" in row:
        console.print(f"The first example, with {len(row['images'])} images: question, then [green]answer[/green]")
        for column, style in (("prompt", "dim"), ("completion", "green")):
            console.print(_of_parts(row[column]), style=style, highlight=False, markup=False, soft_wrap=True)
        return
    ids = row["input_ids"]
    labels = row.get("labels") or ids
    trained = [label != -100 for label in labels]
    console.print(f"The first example, {len(ids)} tokens, {sum(trained)} of them [green]trained[/green]")
    start = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or trained[end] != trained[start]:
            style = "green" if trained[start] else "dim"
            console.print(_shown(tokenizer, ids[start:end]), style=style, end="", highlight=False, soft_wrap=True)
            start = end
    console.print()


def _show_tokenized(console: Console, tokenizer: Any, row: dict[str, Any]) -> None:
    """A pair, a marked answer or a prompt, under the names that TRL's trainers give their tokens."""
    ids = {name: row.get(f"{name}_ids", row.get(f"{name}_input_ids")) for name in ("prompt", "chosen", "rejected")}
    ids["completion"] = row.get("completion_ids")
    if "chosen_input_ids" in row:  # of ORPO's, which begin with the prompt
        start = len(ids["prompt"] or ())
        ids |= {name: row[f"{name}_input_ids"][start:] for name in ("chosen", "rejected")}
    if ids["chosen"]:
        console.print("The first pair: prompt, then [green]chosen[/green], then [red]rejected[/red]")
    elif ids["completion"]:
        good = bool(row["label"])
        console.print(
            f"The first example: prompt, then the answer, which is a {'[green]good' if good else '[red]bad'}[/] one"
        )
    else:
        console.print("The first prompt")
        prompt = row["prompt"]
        ids["prompt"] = (
            tokenizer(prompt)["input_ids"]
            if isinstance(prompt, str)
            else tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        )
    style = {
        "prompt": "dim",
        "chosen": "green",
        "rejected": "red",
        "completion": "green" if row.get("label") else "red",
    }
    for name, tokens in ids.items():
        if tokens:
            console.print(_shown(tokenizer, tokens), style=style[name], highlight=False, soft_wrap=True)


def _of_parts(messages: Any) -> str:
    parts = [part for message in messages for part in message["content"]]
    return printable("".join("<image>" if part["type"] == "image" else part["text"] for part in parts))


def show_result(console: Console, settings: TrainSettings, summary: dict[str, Any], rank: int) -> None:
    """A table of what came out, and what to do with it; `rank` is the adapter's on experts."""
    table = _table()
    if summary["loss"] is not None:
        table.add_row("Loss", f"{summary['loss']:.4f}")
    for name, value in summary["metrics"].items():
        table.add_row(name.capitalize(), f"{value:.4f}")
    if summary["eval_loss"] is not None:
        table.add_row("Evaluation loss", f"{summary['eval_loss']:.4f}")
    table.add_row(
        "Speed", f"{summary['tokens_per_second']:.0f} tokens/s, {summary['seconds']:.0f} s in {summary['steps']} steps"
    )
    table.add_row("Adapter", escape(summary["adapter"]))
    if summary["plots"]:
        table.add_row("Plots", escape(", ".join(summary["plots"])))
    if summary.get("report"):
        table.add_row("Report", escape(summary["report"]))
    if settings.run.use_kt:
        chat = shlex.join(["kt-hf", "chat", summary["adapter"]])
        if not stage_of(settings.run.stage).scores:
            table.add_row("Talk with it", escape(chat))
        export = shlex.join(["kt-hf", "export", summary["adapter"], "NEW_FOLDER", "--to", "peft"])
        table.add_row("Export it", escape(export))
    console.print(Panel(table, title="Done", title_align="left", border_style="green"))
    console.print("Load it, and ask it something:")
    for line in loading_lines(settings, summary["adapter"], rank):
        console.print(f"  {escape(line)}", highlight=False, soft_wrap=True)


def loading_lines(settings: TrainSettings, adapter: str, rank: int) -> list[str]:
    """A Python program, line by line, that loads the run's model with its adapter."""
    keys = settings.run
    name, dtype = keys.model_name_or_path, keys.torch_dtype
    lines = ["from peft import PeftModel"]
    if name.startswith("builtin:"):
        lines += ["from kt_hf.builtin.smollm2_moe import upcycle"]
        _, _, layers = name.partition("/")
        load = f"model, tokenizer = upcycle({f'num_layers={layers}' if layers else ''})"
    else:
        lines += [
            "from transformers import AutoTokenizer"
            + ("" if keys.use_kt else f", {_AUTO[stage_of(keys.stage).scores]}")
        ]
        more = f", revision={keys.model_revision!r}" if keys.model_revision else ""
        more += _score_head(settings)
        call = (
            f"load_kt_model({name!r}, {_kt_config(settings, rank)}"
            if keys.use_kt
            else f"{_AUTO[stage_of(keys.stage).scores]}.from_pretrained({name!r}"
        )
        load = f"model = {call}, dtype={dtype!r}{more})"
    if keys.use_kt:
        lines += ["from kt_hf import KTConfig, " + ("apply_kt_moe" if name.startswith("builtin:") else "load_kt_model")]
    lines += [load]
    if keys.use_kt and name.startswith("builtin:"):
        lines += [f"model = apply_kt_moe(model, {_kt_config(settings, rank)})"]
    lines += [f"model = PeftModel.from_pretrained(model, {adapter!r})"]
    if not name.startswith("builtin:"):
        lines += [f"tokenizer = AutoTokenizer.from_pretrained({adapter!r})"]
    if stage_of(keys.stage).scores:
        return [*lines, 'print(model.eval()(**tokenizer("An answer", return_tensors="pt")).logits)  # its score']
    return [
        *lines,
        'messages = [{"role": "user", "content": "Who are you?"}]',
        'inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", '
        "return_dict=True)",
        "output = model.eval().generate(**inputs, max_new_tokens=64)",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))',
    ]


def _kt_config(settings: TrainSettings, rank: int) -> str:
    """`KTConfig(...)` with the settings that differ from the defaults, packed for the adapter's rank."""
    given = settings.kt.changed()
    given.setdefault("kt_lora_rank", rank)
    return f"KTConfig({', '.join(f'{key}={value!r}' for key, value in given.items())})"


def _table() -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _shown(tokenizer: Any, ids: list[int], most: int = 1500) -> str:
    text = printable(str(tokenizer.decode(ids)))
    return escape(text if len(text) <= most else f"{text[:most]} …")


def _score_head(settings: TrainSettings) -> str:
    """The arguments that make a reward model of a language model's checkpoint; "" in other stages."""
    keys = settings.run
    if not stage_of(keys.stage).scores:
        return ""
    if not keys.use_kt:
        return ", num_labels=1"
    kind = load_config(keys)[0].architectures[0]
    return f", architectures=[{kind!r}], num_labels=1"
