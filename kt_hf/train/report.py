"""What a run says before it starts and when it is done."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from ..system.text import printable
from .config.settings import TrainSettings
from .next_steps import next_steps
from .together import ranks_in_words


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


def show_result(
    console: Console, settings: TrainSettings, summary: dict[str, Any], rank: int, chats: bool = True
) -> None:
    """A table of what came out, and what to do with it.

    Args:
        console: Where to.
        settings: Of the run.
        summary: Of the run, as `finish` returns it.
        rank: The adapter's on experts.
        chats: Whether the tokenizer has a chat template.
    """
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
    console.print(Panel(table, title="Done", title_align="left", border_style="green"))
    # Outside of the table, which would break their lines: they are to be copied.
    for title, lines in next_steps(settings, summary["adapter"], rank, chats):
        console.print(f"{title}:")
        for line in lines:
            console.print(f"  {escape(line)}", highlight=False, soft_wrap=True)


def _table() -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _shown(tokenizer: Any, ids: list[int], most: int = 1500) -> str:
    text = printable(str(tokenizer.decode(ids)))
    return escape(text if len(text) <= most else f"{text[:most]} …")
