"""JSON files of others, read with care: each value is checked where it is taken, and an error names file and field.

    config = read_json(folder / "adapter_config.json").object()
    rank = config["r"].integer(least=1)             # KTAMXError: …/adapter_config.json: r='8' is not a whole number …
    names = config.get("target_modules")            # None where it is missing or null

Each method returns the type it is named for, numbers are finite, texts can be printed, and names of files stay in their
folder.
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
        file: The file it is read from, for messages.
        name: Its place in the file, such as "files.adapter_model.safetensors.size"; "" for the whole content.
        value: The value that the JSON reader gave.

    All methods but `refuse` return the value as the type they are named for, and raise KTAMXError, naming file, field
    and value, if it is not of that type.
    """

    file: Path
    name: str
    value: Any

    def refuse(self, why: str) -> NoReturn:
        """Raise KTAMXError with file, field and value."""
        shown = _SHORT.repr(self.value)
        raise KTAMXError(f"{self.file}: {f'{printable(self.name)}={shown}' if self.name else shown} {why}.")

    def object(self) -> Fields:
        """The object, to take values of it by name."""
        if not isinstance(self.value, dict):
            self.refuse("is no object" if self.name else "holds no object")
        return Fields(self)

    def entries(self) -> list[Field]:
        """The values of a list, as fields named `name[0]`, `name[1]`, ..."""
        if not isinstance(self.value, list):
            self.refuse("is not a list")
        return [Field(self.file, f"{self.name}[{index}]", value) for index, value in enumerate(self.value)]

    def text(self) -> str:
        """A string."""
        if not isinstance(self.value, str):
            self.refuse("is not a text")
        return self.value

    def texts(self) -> list[str]:
        """A list of strings."""
        return [item.text() for item in self.entries()]

    def flag(self) -> bool:
        """True or false."""
        if not isinstance(self.value, bool):
            self.refuse("is neither true nor false")
        return self.value

    def integer(self, least: int = -_WHOLE, most: int = _WHOLE) -> int:
        """A whole number from `least` to `most`."""
        if not isinstance(self.value, int) or isinstance(self.value, bool) or not least <= self.value <= most:
            kind = f"a positive number up to {most}" if least == 1 else f"a whole number from {least} to {most}"
            self.refuse(f"is not {kind}")
        return self.value

    def number(self, positive: bool = False) -> float:
        """A finite number, above 0 if `positive`: int or float, whichever the file has."""
        value = self.value
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) <= sys.float_info.max:
            self.refuse("is not a positive number" if positive else "is not a number")
        if positive and value <= 0:
            self.refuse("is not a positive number")
        return value

    def choice(self, *values: str) -> str:
        """One of the strings `values`."""
        if self.value not in values or not isinstance(self.value, str):
            self.refuse(f"is not one of {', '.join(values)}")
        return self.value

    def hexadecimal(self, length: int = 64) -> str:
        """A checksum of `length` lower-case hexadecimal digits."""
        text = self.text()
        if len(text) != length or not set(text) <= set("0123456789abcdef"):
            self.refuse(f"is no checksum of {length} hexadecimal digits")
        return text

    def file_name(self) -> str:
        """The name of a file or folder in the folder of this file, without any path."""
        name = self._name()
        if not name or "/" in name or "\\" in name or name in (".", "..") or len(name.encode()) > 255:
            self.refuse("is no file name: a file names only what is in its own folder")
        return name

    def path_below(self) -> str:
        """A path relative to the folder of this file, and not leading out of it."""
        name = self._name()
        parts = name.split("/")
        long = any(len(part.encode()) > 255 for part in parts) or len(name) > 1024
        if long or "\\" in name or set(parts) & {"", ".", ".."}:
            self.refuse("is no path below the folder of the file")
        return name

    def _name(self) -> str:
        """A text that can be printed, for every message about a file has its name in it."""
        name = self.text()
        if not name.isprintable():
            self.refuse("is no name of a file: it holds characters that cannot be printed")
        return name


class Fields:
    """The values of a JSON object; made by `Field.object`."""

    def __init__(self, field: Field) -> None:
        self._field = field

    def __getitem__(self, name: str) -> Field:
        """A value that must be in the object; KTAMXError if it is missing."""
        if name not in self._field.value:
            where = f" in {printable(self._field.name)}" if self._field.name else ""
            raise KTAMXError(f"{self._field.file}: {name} is missing{where}.")
        return self._at(name)

    def get(self, name: str) -> Field | None:
        """A value that may be missing or null: None then."""
        return None if self._field.value.get(name) is None else self._at(name)

    def __contains__(self, name: object) -> bool:
        return name in self._field.value

    def __iter__(self) -> Iterator[str]:
        return iter(self._field.value)

    def __len__(self) -> int:
        return len(self._field.value)

    def items(self) -> Iterator[tuple[str, Field]]:
        """Names and values."""
        return ((name, self._at(name)) for name in self._field.value)

    def values(self) -> Iterator[tuple[str, Any]]:
        """Names and values as the JSON reader gave them, unchecked."""
        return iter(self._field.value.items())

    def _at(self, name: str) -> Field:
        head = f"{self._field.name}." if self._field.name else ""
        return Field(self._field.file, f"{head}{name}", self._field.value[name])


def printable(text: str) -> str:
    """A text of a file for a message: on one line, and with everything that a terminal would act on escaped."""
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
    """The value of JSON in UTF-8.

    NaN passes, for a Trainer's log may have it; `Field.number` refuses it.

    Raises:
        ValueError: It is no JSON; or JSON that Python's reader takes and others do not: a name that comes twice, texts
            that are no Unicode, numbers of thousands of digits, 65 levels.
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
