"""Whether a value from YAML fits a field's type, as TRL's configurations and our own settings declare it."""

from __future__ import annotations

import enum
import math
import types
import typing
from typing import Any

_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a mapping",
}


def allows_none(hint: Any) -> bool:
    """Whether None is a value of the field, and not only the absence of one."""
    return hint is None or type(None) in _members(hint)


def convert(value: Any, hint: Any) -> Any:
    """`value` as the field's type; what YAML reads in an unexpected way is set right.

    YAML 1.1 reads `1e-4` as text and `no` as false: where a number or a choice with "no" in it is due, they are taken
    as meant. A list may be written `a,b,c`. Numbers are finite; a whole one may be written `1e3`.

    Raises:
        ValueError: It does not fit; the message says what would.
    """
    members = _members(hint)
    if value is None and type(None) in members:
        return None
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("it must be finite")
    enums = [member for member in members if isinstance(member, type) and issubclass(member, enum.Enum)]
    if enums:
        return _choice(value, enums[0])
    plain = [typing.get_origin(member) or member for member in members]
    for kind in plain:
        if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return value
        if isinstance(kind, type) and isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
            return _checked_items(value, members) if isinstance(value, list) else value
    if any(kind is typing.Literal and value in typing.get_args(m) for kind, m in zip(plain, members, strict=True)):
        return value
    if int in plain and isinstance(value, float) and value.is_integer():
        return int(value)
    if float in plain and isinstance(value, str):
        try:
            return convert(float(value), float)
        except ValueError:
            pass
    if list in plain and isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    raise ValueError(f"it must be {_expected(plain)}{_hint(value, plain)}")


def _members(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _checked_items(values: list[Any], members: tuple[Any, ...]) -> list[Any]:
    """A list, if its items are of a type that the field's list may have."""
    kinds = [kind for member in members if typing.get_origin(member) is list for kind in typing.get_args(member)]
    for value in values:
        if kinds and kinds != [Any] and not any(_fits(value, kind) for kind in kinds):
            raise ValueError(f"{value!r} in it must be {_expected([typing.get_origin(k) or k for k in kinds])}")
    return values


def _fits(value: Any, kind: Any) -> bool:
    try:
        convert(value, kind)
    except ValueError:
        return False
    return True


def _choice(value: Any, kind: type[enum.Enum]) -> str:
    values = [str(member.value) for member in kind]
    if value is False and "no" in values:
        return "no"
    if value in values:
        return str(value)
    import difflib

    close = difflib.get_close_matches(str(value), values, n=1)
    if close:
        raise ValueError(f"did you mean {close[0]}?")
    raise ValueError(f"it must be one of {', '.join(values)}")


def _expected(kinds: list[Any]) -> str:
    words = [_WORDS[kind] for kind in dict.fromkeys(kinds) if kind in _WORDS]
    return " or ".join(words) or "left out"


def _hint(value: Any, kinds: list[Any]) -> str:
    if isinstance(value, str) and bool in kinds and value.lower() in ("true", "false", "yes", "no", "1", "0"):
        return " without quotes"
    if isinstance(value, (bool, int, float)) and str in kinds:
        return f': put it in quotes, "{value}"'
    return ""
