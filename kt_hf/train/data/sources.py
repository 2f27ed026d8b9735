"""Where rows of data come from: files, folders, the hub, or Python's own documentation."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import KTAMXConfigError
from ..config.aliases import KNOWN_DATASETS
from ..config.settings import BUILTIN_DATA

SUFFIXES = (".json", ".jsonl", ".parquet", ".csv")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass
class RawRows:
    """Rows as they were read. `bad` has (place, reason) of those that could not be read at all."""

    rows: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)

    def columns(self) -> set[str]:
        return {key for _, row in self.rows for key in row}


def dataset_problem(spec: str) -> str | None:
    """Why `spec` cannot name a data set, or None. Looks at the file system only."""
    if spec.startswith("builtin:"):
        return None if spec == BUILTIN_DATA else f"the built-in data set is {BUILTIN_DATA}"
    path = Path(spec).expanduser()
    if path.is_dir():
        return None if _files(path) else f"the folder holds no file that ends in {', '.join(SUFFIXES)}"
    if path.exists():
        return None if path.suffix in SUFFIXES else f"the file must end in {', '.join(SUFFIXES)}"
    if path.suffix in SUFFIXES or spec.startswith((".", "/", "~")):
        return "there is no such file or folder"
    return None if _HUB_NAME.fullmatch(spec) else "neither a file nor a name on the hub"


def read_source(spec: str, purpose: str, stage: str, most: int | None) -> RawRows:
    """Rows of a data set, at most `most`.

    Args:
        spec: A file, a folder, a name on the hub or `builtin:pydoc`.
        purpose: `train` or `eval`: which split, where there are several.
        stage: For `builtin:pydoc`: `sft` gives answers, `dpo` pairs of a right and a wrong one.

    Raises:
        KTAMXConfigError: Nothing can be read, and why.
    """
    problem = dataset_problem(spec)
    if problem:
        raise KTAMXConfigError(f"dataset {spec}: {problem}.")
    raw = RawRows()
    path = Path(spec).expanduser()
    if spec == BUILTIN_DATA:
        rows: Iterator[tuple[str, Any]] = enumerate_rows(_pydoc(purpose, stage), spec)
    elif path.exists():
        rows = (row for file in (_files(path) if path.is_dir() else [path]) for row in _read_file(file))
    else:
        rows = enumerate_rows(_hub(KNOWN_DATASETS.get(spec, spec), purpose), spec)
    for place, row in rows:
        if isinstance(row, dict):
            raw.rows.append((place, row))
        else:
            raw.bad.append((place, row if isinstance(row, _Unreadable) else f"not a row but {type(row).__name__}"))
        if most is not None and len(raw.rows) >= most:
            break
    return raw


class _Unreadable(str):
    """Why a row could not be read."""


def enumerate_rows(rows: Iterator[Any] | Sequence[Any], source: str) -> Iterator[tuple[str, Any]]:
    return ((f"{source} row {number}", row) for number, row in enumerate(rows, 1))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and path.is_file())


def _read_file(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        if file.suffix == ".jsonl":
            yield from _jsonl(file)
        elif file.suffix == ".csv":
            with file.open(encoding="utf-8-sig", newline="") as text:
                for row in csv.DictReader(text):
                    wrong = None in row or None in row.values()
                    yield f"{file} row", _Unreadable("it has another number of cells than the header") if wrong else row
        elif file.suffix == ".parquet":
            import pyarrow.parquet

            yield from enumerate_rows(pyarrow.parquet.read_table(file).to_pylist(), str(file))
        else:
            yield from _json(file)
    except (OSError, ValueError, csv.Error) as error:  # pyarrow's errors are ValueErrors
        raise KTAMXConfigError(f"{file} cannot be read: {error}") from None


def _jsonl(file: Path) -> Iterator[tuple[str, Any]]:
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"{file} line {number}", _parse(line)


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        return _Unreadable(f"not JSON: {error}")


def _json(file: Path) -> Iterator[tuple[str, Any]]:
    text = file.read_text(encoding="utf-8-sig")
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        first = text.lstrip().split("\n", 1)[0]
        if first.startswith("{") and not isinstance(_parse(first), _Unreadable):
            yield from _jsonl(file)  # one object a line, under another name
            return
        raise ValueError(f"not JSON: {error}") from None
    if isinstance(content, dict):  # {"data": [...]}, as some exports have it
        lists = [value for value in content.values() if isinstance(value, list)]
        content = lists[0] if len(lists) == 1 else [content]
    yield from enumerate_rows(content, str(file))


def _hub(name: str, purpose: str) -> Any:
    import datasets

    try:
        loaded = datasets.load_dataset(name)
    except Exception as error:  # network, permission, no such name: the library's own words
        raise KTAMXConfigError(f"dataset {name} cannot be had from the hub: {' '.join(str(error).split())}") from None
    wanted = ("train",) if purpose == "train" else ("validation", "test", "eval")
    splits = [split for split in wanted if split in loaded] or list(loaded)[: 1 if len(loaded) == 1 else 0]
    if not splits:
        raise KTAMXConfigError(f"dataset {name} has the splits {', '.join(loaded)}, none of them for {purpose}.")
    return loaded[splits[0]]


def _pydoc(purpose: str, stage: str) -> list[dict[str, Any]]:
    from ...builtin.pydoc_rows import collect, import_modules, split

    train, held_out = split(collect(import_modules()[0]))
    items = train if purpose == "train" else held_out
    if stage != "dpo":
        return [dict(item.row()) for item in items]
    # The wrong answer is the right one to another question.
    others = [*items[1:], *items[:1]]
    return [
        {
            "prompt": [{"role": "user", "content": item.question}],
            "chosen": [{"role": "assistant", "content": item.answer}],
            "rejected": [{"role": "assistant", "content": other.answer}],
        }
        for item, other in zip(items, others, strict=True)
    ]
