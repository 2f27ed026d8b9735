"""`report.html`: a run on one page that needs no network. Plots are inline SVG, readable in black and white."""

from __future__ import annotations

import html
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..system.files import replacing
from ..system.text import printable
from .next_steps import commands
from .plots import curves_svg, expert_load_svg, loss_points, series

REPORT = "report.html"
_GIB = 2**30
_EXAMPLES, _NEW_TOKENS = 3, 48
_SECONDS = 3.0  # of an answer: a large model's tokens take a second each, and the run is over
_ASKED = ("learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "seed")
_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#111;background:#fff}
h1{font-size:1.6rem}h2{font-size:1.2rem;border-bottom:1px solid #999;margin-top:2.2rem}
table{border-collapse:collapse;width:100%}th,td{text-align:left;vertical-align:top;padding:.25rem .6rem;
border-bottom:1px solid #ddd;overflow-wrap:anywhere}.keys th{width:19rem}
pre{white-space:pre-wrap;margin:0;font-size:.85rem}svg{width:100%;height:auto}
@media print{body{max-width:none}}
"""


def write_report(folder: Path, settings: Any, ready: Any, trainer: Any, summary: Mapping[str, Any]) -> Path:
    """Write a run's report.

    Args:
        folder: The run's, for the file.
        settings: `TrainSettings` of the run.
        ready: What the run had before its model was loaded: data with their notes, and the memory's estimate.
        trainer: After the training.
        summary: What is written beside the adapter.

    Returns:
        The file.
    """
    history = trainer.state.log_history
    title = f"{settings.run.stage.upper()} of {settings.run.model_name_or_path}"
    rows = [len(data.dataset) if data else 0 for data in (ready.train_data, ready.eval_data)]
    notes = [note for data in (ready.train_data, ready.eval_data) if data for note in data.notes]
    parts = [
        f"<h1>{_text(title)}</h1>",
        _table(_result(summary, history) | _commands(settings, ready, summary)),
        "<h2>Loss</h2>", _losses(history),
        "<h2>Learning rate and speed</h2>",
        curves_svg({"learning rate": series(history, "learning_rate")}, "learning rate"),
        curves_svg({"tokens/s": series(history, "tokens_per_second")}, "tokens/s"),
        "<h2>Memory against the estimate</h2>", _memory(ready.memory, history),
        "<h2>Experts</h2>", _experts(trainer.model, history, summary["expert_load"]),
        "<h2>Examples, before and after</h2>", _examples(trainer, ready),
        "<h2>Data</h2>",
        _table({"trained on": f"{rows[0]} examples", "evaluated on": f"{rows[1]} examples"}),
        "".join(f"<p>{_text(note)}</p>" for note in notes),
        "<h2>Settings</h2>", _table(_settings(settings, trainer.args)),
    ]  # fmt: skip
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )
    path = folder / REPORT
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def _text(value: Any) -> str:
    return html.escape(printable(str(value)))


def _table(rows: Mapping[str, Any]) -> str:
    cells = "".join(f"<tr><th>{_text(name)}</th><td>{_text(_plain(value))}</td></tr>" for name, value in rows.items())
    return f'<table class="keys">{cells}</table>'


def _plain(value: Any) -> Any:
    """A setting as a configuration has it: true, and a list without its marks."""
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value


def _result(summary: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    train, held_out = loss_points(history)

    def change(points: Sequence[tuple[int, float]]) -> str:
        return f"{points[0][1]:.4f} at step {points[0][0]}, {points[-1][1]:.4f} at step {points[-1][0]}"

    rows: dict[str, Any] = {}
    if train:
        rows["training loss"] = change(train)
    if held_out:
        rows["evaluation loss"] = change(held_out)
    speed = f"{summary['tokens_per_second']:.0f} tokens/s over {summary['seconds']:.0f} s in {summary['steps']} steps"
    return rows | {"speed": speed, "adapter": summary["adapter"]}


def _commands(settings: Any, ready: Any, summary: Mapping[str, Any]) -> dict[str, str]:
    """What to do with the adapter: title -> command."""
    chats = getattr(ready.tokenizer, "chat_template", None) is not None
    return {title[0].lower() + title[1:]: command for title, command in commands(settings, summary["adapter"], chats)}


def _losses(history: Sequence[Mapping[str, Any]]) -> str:
    train, held_out = loss_points(history)
    return curves_svg({"training batch": train, "held out": held_out}, "loss (nats per token)")


def _memory(memory: Any, history: Sequence[Mapping[str, Any]]) -> str:
    rows = {}
    for name, key, total in (
        ("host", "host_memory_gib", memory.host_total),
        ("GPU", "gpu_memory_gib", memory.gpu_total),
    ):
        points = series(history, key)
        if points:
            most = max(value for _, value in points)
            rows[name] = f"{most:.2f} GiB at most when logged; estimated before the run: at most {total / _GIB:.2f} GiB"
    return _table(rows) if rows else "<p>Not logged (use_kt: false).</p>"


def _experts(model: Any, history: Sequence[Mapping[str, Any]], load: Mapping[int, Sequence[float]]) -> str:
    from ..placement import packer_of

    packer = packer_of(model)
    if packer is None:
        return "<p>Not patched (use_kt: false).</p>"
    tiers = packer.tiers
    rows = {"computed by": f"{packer.backend} ({packer.reason})"}
    if tiers is not None and tiers.need_gpu:
        rows["placement"] = f"of each layer {tiers.resident} experts resident on the GPU, {tiers.streamed} streamed"
    layers = series(history, "layers_on_gpu")
    if layers:
        rows["layers on the GPU"] = f"{layers[-1][1]:.0f} at the end"
    busiest = {
        "busiest expert, of an even share": series(history, "expert_load_max"),
        "evenness (entropy; 1 is even)": series(history, "expert_load_entropy"),
    }
    shown = curves_svg(busiest, "expert load over time")
    return _table(rows) + shown + (expert_load_svg(load) if load else "")


def _examples(trainer: Any, ready: Any) -> str:
    """What the model says to a few rows' questions without the adapter, which is what it was before, and with it."""
    import torch

    data = ready.eval_data or ready.train_data
    if "labels" not in (getattr(data.dataset, "column_names", None) or ()) or not hasattr(
        trainer.model, "disable_adapter"
    ):
        return "<p>None for this stage.</p>"
    if trainer.args.world_size > 1:
        return "<p>None with several processes: kt-hf chat shows them.</p>"
    model, tokenizer, rows = trainer.model, ready.tokenizer, []
    training = model.training
    model.eval()
    try:
        for row in data.dataset.select(range(min(_EXAMPLES, len(data.dataset)))):
            start = next(i for i, label in enumerate(row["labels"]) if label != -100)
            if start == 0:  # text without a question
                continue
            ids = torch.tensor([row["input_ids"][:start]], device=model.device)

            def answer(ids: Any = ids) -> str:
                out = model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=_NEW_TOKENS, do_sample=False,
                    pad_token_id=tokenizer.pad_token_id, max_time=_SECONDS,
                )  # fmt: skip
                return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)).strip()

            with model.disable_adapter():
                before = answer()
            question = str(tokenizer.decode(row["input_ids"][:start])).strip()
            reference = str(tokenizer.decode(row["input_ids"][start:], skip_special_tokens=True)).strip()
            rows.append([question, before, answer(), reference])
    finally:
        model.train(training)
    if not rows:
        return "<p>The rows are texts without a question.</p>"
    head = "".join(f"<th>{name}</th>" for name in ("question", "before", "after", "in the data"))
    body = "".join(f"<tr>{''.join(f'<td><pre>{_text(cell[:1500])}</pre></td>' for cell in row)}</tr>" for row in rows)
    where = "held out" if ready.eval_data else "of the training data"
    most = f"at most {_NEW_TOKENS} tokens and {_SECONDS:g} seconds"
    return f"<p>Rows {where}; {most}.</p><table><tr>{head}</tr>{body}</table>"


def _settings(settings: Any, args: Any) -> dict[str, Any]:
    """What the user set, and of the rest what a reader asks for first."""
    default = type(settings.run)()
    keys = {name: value for name, value in asdict(settings.run).items() if value != getattr(default, name)}
    asked = {name: getattr(args, name) for name in _ASKED if hasattr(args, name)}
    return keys | asked | dict(settings.trainer) | settings.kt.changed() | {"python": platform.python_version()}
