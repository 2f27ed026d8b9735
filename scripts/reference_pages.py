"""The reference that is made from the code: settings, keys of a run, names of other programs, verbs.

The site's build puts each where a page says `<!-- generated: NAME -->`. To print one:

    python scripts/reference_pages.py NAME
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import griffe
import typer

import kt_hf
from kt_hf.cli import VERBS, app
from kt_hf.config import KTConfig
from kt_hf.train.config import aliases
from kt_hf.train.config.read import trainer_fields
from kt_hf.train.config.settings import CHOICES, RunKeys
from kt_hf.train.config.stages import STAGES

ROOT = Path(__file__).parents[1]
# Where the code names a page of this documentation, the reference links it. Its own pages are one folder down.
_PAGE = re.compile(r"docs/([\w/-]+\.md(?:#[\w-]+)?)")


def linked(text: str) -> str:
    """A docstring's text, as Markdown."""
    return _PAGE.sub(lambda page: f"[{page[1].partition('.md')[0]}](../{page[1]})", " ".join(text.split()))


def cell(text: str) -> str:
    return linked(text).replace("|", "\\|")


def table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def described(cls: Any, section: str) -> dict[str, str]:
    """Name -> what a section of the class's docstring (Google's `Args` or `Attributes`) says of it.

    Raises:
        KeyError: A field that the docstring leaves out, or a name in it that is no field.
    """
    parts = griffe.Docstring(inspect.getdoc(cls) or "").parse("google", warnings=False)
    items = [item for part in parts if part.kind.value == section for item in part.value]
    texts = {item.name: item.description for item in items}
    fields = {field.name for field in dataclasses.fields(cls)}
    if difference := (fields ^ texts.keys()) - {"kt_max_cache_depth"}:
        raise KeyError(f"{cls.__name__}: docstring and fields differ in {sorted(difference)}")
    return texts


def default_of(field: dataclasses.Field[Any]) -> str:
    value = field.default_factory() if field.default is dataclasses.MISSING else field.default  # type: ignore[misc]
    return "–" if value in (None, "", []) else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def type_of(field: dataclasses.Field[Any]) -> str:
    choices = CHOICES.get(field.name)
    if choices:
        return ", ".join(f"`{choice}`" for choice in choices if choice is not None)
    return f"`{field.type}`".replace(" | ", "` or `").replace(" or `None`", "")


def settings() -> str:
    """Every field of `KTConfig`."""
    texts = described(KTConfig, "parameters")
    parts = [
        f"## {field.name}\n\nType {type_of(field)}, default {default_of(field)}.\n\n{linked(texts[field.name])}"
        for field in dataclasses.fields(KTConfig)
    ]
    return "\n\n".join([*parts, f"## kt_max_cache_depth\n\n{linked(texts['kt_max_cache_depth'])}"])


def train_keys() -> str:
    """Every key of `kt-hf train` that is not TRL's, and the names of those."""
    texts = described(RunKeys, "attributes")
    rows = [
        (f"`{field.name}`", type_of(field), default_of(field), cell(texts[field.name]))
        for field in dataclasses.fields(RunKeys)
    ]
    return table(("key", "type", "default", "meaning"), rows)


def stages() -> str:
    """What each stage takes besides transformers' `TrainingArguments`: the fields of TRL's class."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from transformers import TrainingArguments

    common = {field.name for field in dataclasses.fields(TrainingArguments)}
    rows = []
    for name, stage in STAGES.items():
        own = ", ".join(f"`{key}`" for key in sorted(set(trainer_fields(name)) - common))
        rows.append((f"`{name}`", f"`{stage.module}.{stage.config}`", own))
    return table(("stage", "class", "fields besides those of `transformers.TrainingArguments`"), rows)


def names() -> str:
    """What became of the names of LLaMA-Factory, axolotl, Unsloth and TRL."""
    renamed = {**aliases.RENAMED, **{name: new for name, (new, _) in aliases.TRANSLATED.items()}}
    data = aliases.KNOWN_DATASETS

    def rows(names: dict[str, str], code: bool) -> list[tuple[str, ...]]:
        return [(f"`{name}`", f"`{text}`" if code else cell(text)) for name, text in sorted(names.items())]

    parts = [
        ("Translated", "Taken as the name on the right, the value turned round where that means its contrary.",
         table(("name", "here"), rows(renamed, True))),
        ("Taken without effect", "A notice says so.", table(("name", "why"), rows(aliases.IGNORED, False))),
        ("Refused", "Unless null or false; the error says what to write.",
         table(("name", "instead"), rows(aliases.REMOVED, False))),
        ("Answered with ours", "Not taken: the error names the key that is meant.",
         table(("name", "meant"), rows(aliases.MEANT, True))),
        ("Data sets", "Short names of LLaMA-Factory, which mean data sets of the hub.",
         table(("name", "on the hub"), rows(data, True))),
    ]  # fmt: skip
    return "\n\n".join(f"## {title}\n\n{text}\n\n{body}" for title, text, body in parts)


def verbs() -> str:
    """Every verb of `kt-hf`, with its arguments and options."""
    group: Any = typer.main.get_command(app)
    return "\n\n".join(_verb(name, group.commands[name]) for name in VERBS)


def _verb(name: str, command: Any) -> str:
    context = click.Context(command, info_name=f"kt-hf {name}")
    paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(command.help or ""))
    lines = [f"## kt-hf {name}"]
    for paragraph in paragraphs:
        example = re.match(r"Examples?:\s*(kt-hf .*)", paragraph, re.DOTALL)
        lines.append(f"```\n{inspect.cleandoc(example[1])}\n```" if example else linked(paragraph))
    rows = []
    for parameter in command.params:
        text, meaning = parameter.get_help_record(context) or ("", "")
        if parameter.param_type_name == "argument":
            text = parameter.metavar or str(parameter.name).upper()
        rows.append((f"`{text.replace('|', '/')}`", cell(meaning)))
    return "\n\n".join([*lines, table(("argument or option", "meaning"), rows)])


def changelog() -> str:
    """CHANGELOG.md without its title."""
    return (ROOT / "CHANGELOG.md").read_text().partition("\n")[2].replace("](docs/", "](")


def speed() -> str:
    """README's table of speed and memory, with what it says of it."""
    section = (ROOT / "README.md").read_text().split("## Speed and memory on one card")[1].split("\n## ")[0]
    return section.strip().replace("](docs/", "](").replace("[docs/", "[")


PARTS: dict[str, Callable[[], str]] = {
    "settings": settings, "train-keys": train_keys, "stages": stages, "names": names, "verbs": verbs,
    "changelog": changelog, "speed": speed,
}  # fmt: skip


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in PARTS:
        sys.exit(f"usage: python scripts/reference_pages.py {'|'.join(PARTS)} (kt_hf {kt_hf.__version__})")
    print(PARTS[sys.argv[1]]())
