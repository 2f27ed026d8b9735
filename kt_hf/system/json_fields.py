"""JSON files of others, read with care: each value is checked where it is taken, and an error names file and field.

    config = read_json(folder / "adapter_config.json").object()
    rank = config["r"].integer(least=1)             # KTAMXError: …/adapter_config.json: r='8' is not a whole number …
    names = config.get("target_modules")            # None where it is missing or null

What comes out has the type that it is asked for, numbers are finite, texts can be printed, and names of files stay in
their folder.
"""

from __future__ import annotations

import json
import reprlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ..errors import KTAMXError

_LARGEST = 40_000_000  # bytes; the index of a model of many experts has some ten million
_MOST_OBJECTS, _MOST_VALUES = 1_000_000, 5_000_000  # which take 50 times as much memory as in the file
_DEEPEST = 64
_SHORT = reprlib.Repr()  # a value may be a list of millions
_SHORT.maxstring = _SHORT.maxother = 80
_WHOLE = 2**53  # what JSON's readers agree on


@dataclass(frozen=True)
class Field:
    """A value in a JSON file.

    Attributes:
        file: Of which file, for messages.
        name: Where in it, "files.adapter_model.safetensors.size"; "" for the whole.
        value: As JSON has it.
    """

    file: Path
    name: str
    value: Any

    def refuse(self, why: str) -> NoReturn:
        """Raise KTAMXError with file, field and value."""
        shown = _SHORT.repr(self.value)
        raise KTAMXError(f"{self.file}: {f'{printable(self.name)}={shown}' if self.name else shown} {why}.")

    def object(self) -> Fields:
        """Name -> value."""
        if not isinstance(self.value, dict):
            self.refuse("is no object" if self.name else "holds no object")
        return Fields(self)

    def entries(self) -> list[Field]:
        if not isinstance(self.value, list):
            self.refuse("is not a list")
        return [Field(self.file, f"{self.name}[{index}]", value) for index, value in enumerate(self.value)]

    def text(self) -> str:
        if not isinstance(self.value, str):
            self.refuse("is not a text")
        return self.value

    def texts(self) -> list[str]:
        return [item.text() for item in self.entries()]

    def flag(self) -> bool:
        if not isinstance(self.value, bool):
            self.refuse("is neither true nor false")
        return self.value

    def integer(self, least: int = -_WHOLE, most: int = _WHOLE) -> int:
        if not isinstance(self.value, int) or isinstance(self.value, bool) or not least <= self.value <= most:
            kind = f"a positive number up to {most}" if least == 1 else f"a whole number from {least} to {most}"
            self.refuse(f"is not {kind}")
        return self.value

    def number(self, positive: bool = False) -> float:
        """A finite number, as it is in the file: int or float."""
        value = self.value
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) <= sys.float_info.max:
            self.refuse("is not a positive number" if positive else "is not a number")
        if positive and value <= 0:
            self.refuse("is not a positive number")
        return value

    def choice(self, *values: str) -> str:
        if self.value not in values or not isinstance(self.value, str):
            self.refuse(f"is not one of {', '.join(values)}")
        return self.value

    def hexadecimal(self, length: int = 64) -> str:
        text = self.text()
        if len(text) != length or not set(text) <= set("0123456789abcdef"):
            self.refuse(f"is no checksum of {length} hexadecimal digits")
        return text

    def file_name(self) -> str:
        """The name of a file or folder in the folder of this file, and of none elsewhere."""
        name = self.text()
        if not name or "/" in name or "\\" in name or "\0" in name or name in (".", "..") or len(name.encode()) > 255:
            self.refuse("is no file name: a file names only what is in its own folder")
        return name

    def path_below(self) -> str:
        """A path relative to the folder of this file, and not leading out of it."""
        name = self.text()
        parts = name.split("/")
        long = any(len(part.encode()) > 255 for part in parts) or len(name) > 1024
        if long or "\0" in name or "\\" in name or set(parts) & {"", ".", ".."}:
            self.refuse("is no path below the folder of the file")
        return name


class Fields:
    """The values of a JSON object; made by `Field.object`."""

    def __init__(self, field: Field) -> None:
        self._field = field

    def __getitem__(self, name: str) -> Field:
        """A value that must be there."""
        if name not in self._field.value:
            where = f" in {printable(self._field.name)}" if self._field.name else ""
            raise KTAMXError(f"{self._field.file}: {name} is missing{where}.")
        return self._at(name)

    def get(self, name: str) -> Field | None:
        """A value that may be missing, or null."""
        return None if self._field.value.get(name) is None else self._at(name)

    def __contains__(self, name: object) -> bool:
        return name in self._field.value

    def __iter__(self) -> Iterator[str]:
        return iter(self._field.value)

    def __len__(self) -> int:
        return len(self._field.value)

    def items(self) -> Iterator[tuple[str, Field]]:
        return ((name, self._at(name)) for name in self._field.value)

    def values(self) -> Iterator[tuple[str, Any]]:
        """Names and values as they are, unchecked."""
        return iter(self._field.value.items())

    def _at(self, name: str) -> Field:
        head = f"{self._field.name}." if self._field.name else ""
        return Field(self._field.file, f"{head}{name}", self._field.value[name])


def printable(text: str) -> str:
    """A text of a file as a message may show it: on one line, and nothing that a terminal would act on."""
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")


def read_json(path: Path) -> Field:
    """The contents of a JSON file.

    Raises:
        KTAMXError: It is missing, no file, too large, or no JSON by `parse_json`.
    """
    try:
        if not path.is_file() and (path.exists() or path.is_symlink()):
            raise KTAMXError(f"{path} cannot be read: it is no file.")
        if path.stat().st_size > _LARGEST:
            raise KTAMXError(f"{path} cannot be read: {path.stat().st_size} bytes are too many for such a file.")
        data = path.read_bytes()
    except FileNotFoundError:
        raise KTAMXError(f"{path} is missing.") from None
    except (OSError, ValueError) as error:
        raise KTAMXError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    try:
        return Field(path, "", parse_json(data))
    except ValueError as error:
        raise KTAMXError(f"{path} cannot be read: {error}.") from error


def parse_json(data: bytes) -> Any:
    """What JSON of UTF-8 says.

    Raises:
        ValueError: It is no JSON; or JSON that Python's reader takes and others do not: a name that comes twice, texts
            that are no Unicode, numbers of thousands of digits, 65 levels. NaN passes, for a Trainer's log may have it;
            `Field.number` refuses it.
    """
    try:
        if data.count(b"[") + data.count(b"{") > _MOST_OBJECTS or data.count(b",") > _MOST_VALUES:
            raise ValueError("it holds more values than any such file has")
        text = data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_no_doubles)
        if _depth(value) > _DEEPEST:
            raise ValueError(f"more than {_DEEPEST} levels deep")
        if "\\u" in text:  # half a surrogate pair is no text: it can be neither printed nor a file's name
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise ValueError(printable(" ".join(str(error).split())[:200])) from error
    return value


def _depth(value: Any) -> int:
    """Levels of objects and lists."""
    depth, level = 0, [value] if isinstance(value, (dict, list)) else []
    while level and depth <= _DEEPEST:
        depth += 1
        inside = (v.values() if isinstance(v, dict) else v for v in level)
        level = [child for children in inside for child in children if isinstance(child, (dict, list))]
    return depth


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"{name} is there twice")
        values[name] = value
    return values
