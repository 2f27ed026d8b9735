"""Rows of a data file: JSON, JSON lines, CSV, TSV or parquet. An error names file and row."""

from __future__ import annotations

import csv
import json
import reprlib
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ...errors import KTAMXConfigError
from .stage_formats import recognize

SUFFIXES = (".json", ".jsonl", ".parquet", ".csv", ".tsv")
_PARQUET_BATCH = 256  # rows in memory in Arrow's form beside the ones already read


class Unreadable(str):
    """Why a row could not be read: stands in the row's place."""


def data_files(folder: Path) -> list[Path]:
    """The data files of a folder by name; its own folders are not entered."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())


def read_rows(file: Path) -> Iterator[tuple[str, Any]]:
    """(place, row) of each row of a file, such as `("data.jsonl line 3", {"text": "…"})`.

    A row that cannot be read is an `Unreadable`, one that is no object is given as it is.

    Raises:
        KTAMXConfigError: The file is not of the kind that its name says, or damaged.
    """
    read = {".json": _json, ".jsonl": _json_lines, ".parquet": _parquet, ".csv": _csv, ".tsv": _csv}[
        file.suffix.lower()
    ]
    try:
        yield from read(file)
    except UnicodeDecodeError as error:
        raise KTAMXConfigError(f"{file} cannot be read: it is not UTF-8 text (at byte {error.start}).") from None
    except OSError as error:
        raise KTAMXConfigError(f"{file} cannot be read: {error.strerror or _one_line(error)}") from None
    except ValueError as error:
        raise KTAMXConfigError(f"{file} cannot be read: {_one_line(error)}") from None


def numbered(rows: Iterable[Any], source: str) -> Iterator[tuple[str, Any]]:
    """Each row with its place, `SOURCE row 1` and so on."""
    return ((f"{source} row {number}", row) for number, row in enumerate(rows, 1))


def parse_json(text: str) -> Any:
    """As `json.loads`, but NaN is null, and what JSON does not know or says twice is refused.

    Raises:
        ValueError: It is no JSON, is nested too deep, or an object has a key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"the key {reprlib.repr(next(key for key in counts if counts[key] > 1))} is there twice")
    return result


def _constant(name: str) -> None:
    """pandas writes NaN for a cell that is empty."""
    if name != "NaN":
        raise ValueError(f"{name} is not a number of JSON")


def _json_lines(file: Path) -> Iterator[tuple[str, Any]]:
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"{file} line {number}", _parse_row(line)


def _parse_row(text: str) -> Any:
    try:
        return parse_json(text.lstrip("\ufeff"))
    except ValueError as error:
        return Unreadable(f"not JSON: {error}")


def _json(file: Path) -> Iterator[tuple[str, Any]]:
    text = file.read_text(encoding="utf-8-sig")
    if not text.strip():
        return
    try:
        content = parse_json(text)
    except ValueError as error:
        first = text.lstrip().split("\n", 1)[0]
        if first.startswith("{") and not isinstance(_parse_row(first), Unreadable):
            yield from _json_lines(file)  # one object a line, under another name
            return
        raise ValueError(f"not JSON: {error}") from None
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        one_row = recognize(set(content)) is not None or len(lists) != 1
        content = [content] if one_row else lists[0]  # {"data": [...]}, as some exports have it
    if not isinstance(content, list):
        raise ValueError(f"it is not a list of rows but {type(content).__name__}")
    yield from numbered(content, str(file))


def _csv(file: Path) -> Iterator[tuple[str, Any]]:
    limit = csv.field_size_limit(sys.maxsize)  # for all readers of the process: put back below
    try:
        with file.open(encoding="utf-8-sig", newline="") as text:
            reader = csv.reader(text, delimiter="\t" if file.suffix.lower() == ".tsv" else ",", strict=True)
            header = next(reader, [])
            if len(set(header)) < len(header):
                raise ValueError("two columns have the same name")
            for cells in reader:
                csv.field_size_limit(sys.maxsize)
                if cells:  # an empty line is none
                    same = len(cells) == len(header)
                    wrong = Unreadable(f"it has {len(cells)} cells, the header {len(header)}")
                    yield f"{file} line {reader.line_num}", dict(zip(header, cells, strict=True)) if same else wrong
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from None
    finally:
        csv.field_size_limit(limit)


def _parquet(file: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            if len(set(names)) < len(names):
                raise ValueError("two columns have the same name")
            # As datasets writes lists whose objects have different keys.
            texts = [field.name for field in table.schema_arrow if str(field.type) == "extension<arrow.json>"]
            rows = (row for batch in table.iter_batches(batch_size=_PARQUET_BATCH) for row in batch.to_pylist())
            yield from numbered((row | {name: _json_cell(row[name]) for name in texts} for row in rows), str(file))
    except (pyarrow.ArrowException, OSError, OverflowError) as error:
        raise ValueError(f"not parquet, or damaged: {_one_line(error)}") from None


def _json_cell(text: str | None) -> Any:
    return None if text is None else parse_json(text)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
