"""A YAML file of settings, each with the line it stands in; and `key=value` overrides of the command line.

YAML 1.1 reads `010` as 8, `1:30` as 90, `2025-02-30` as a date that does not exist and `1e-4` as text. Settings mean
what they look like, so scalars are read by simpler rules here. A file is bounded before any of it is constructed: in
its size, its depth, and the size its aliases would give it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ...errors import KTAMXConfigError

_MOST_BYTES = 32_768  # of a file; PyYAML reads the worst of that size within two seconds
_MOST_BRACKETS = 1_000  # of a file: each nested one costs its scanner the square
_MOST_VALUES = 10_000  # of a file with its aliases written out
_MOST_DEPTH = 32
_MOST_DIGITS = 18  # more would not be a number of steps, tokens or seeds; and Python refuses some thousands
_SHOWN = 80  # characters of a value, in a message
_MOST_PROBLEMS = 50  # in a message


@dataclass(frozen=True)
class Setting:
    """A value, and where it stands.

    Attributes:
        value: As YAML reads it.
        where: `line 7`, or `command line`.
        text: An override as it was typed; None for a value of the file.
    """

    value: Any
    where: str
    text: str | None = None


@dataclass(frozen=True)
class Problem:
    """What is wrong with a setting, in a sentence, and where it stands."""

    where: str
    text: str

    def __str__(self) -> str:
        """The problem with its line, as it is printed."""
        return f"{self.where}: {self.text}" if self.where else self.text


class BadSettings(KTAMXConfigError):
    """All that is wrong with a configuration. `problems` has them one by one."""

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        """Make the message: the file `source` and the first of its problems, a line each."""
        self.source, self.problems = source, list(problems)
        count = f"{len(self.problems)} problem{'s' if len(self.problems) != 1 else ''}"
        lines = [f"  {problem}" for problem in self.problems[:_MOST_PROBLEMS]]
        if len(self.problems) > _MOST_PROBLEMS:
            lines.append(f"  and {len(self.problems) - _MOST_PROBLEMS} more")
        super().__init__("\n".join([f"{source} has {count}:", *lines]))


def shown(value: Any) -> str:
    """A value for a message: on one line, without control characters, and not longer than that."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def key_shown(key: str) -> str:
    """A setting's name for a message; quoted unless it is made of letters, digits and the like."""
    return key if re.fullmatch(r"[\w.-]{1,64}", key) else shown(key)


def read_settings(file: Path, overrides: Sequence[str] = ()) -> tuple[dict[str, Setting], list[Problem]]:
    """The settings of `file`, with `key=value` overrides put over them, and what was unreadable.

    Raises:
        BadSettings: There is no such file, or it is not a YAML mapping, so that nothing else can be said about it.
    """
    try:
        with open(file, "rb") as stream:
            content = stream.read(_MOST_BYTES + 1)
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise BadSettings(str(file), [Problem("", f"cannot be read: {error.strerror}")]) from None
    except UnicodeDecodeError:
        if len(content) <= _MOST_BYTES:
            raise BadSettings(str(file), [Problem("", "cannot be read: not UTF-8 text")]) from None
    if len(content) > _MOST_BYTES:
        raise BadSettings(str(file), [Problem("", f"is larger than {_MOST_BYTES:,} bytes: no file of settings")])
    settings, problems = parse_settings(text, str(file))
    settings, more = read_overrides(settings, overrides)
    return settings, problems + more


def read_overrides(settings: dict[str, Setting], overrides: Sequence[str]) -> tuple[dict[str, Setting], list[Problem]]:
    """`settings` with `key=value` overrides put over them, and those that cannot be read.

    A value is taken as typed: `#`, `:` and leading zeros mean nothing in it. Lists and mappings are written as in
    YAML, `[1, 2]`.
    """
    settings, problems = dict(settings), list[Problem]()
    for override in overrides:
        key, equals, text = override.partition("=")
        key, text = key.strip(), text.strip()
        if not equals or not key:
            problems.append(Problem("command line", f"{shown(override)} is not of the form key=value"))
            continue
        try:
            settings[key] = Setting(_typed(text), "command line", text)
        except KTAMXConfigError as error:
            problems.append(Problem("command line", f"{key_shown(key)}: {shown(text)} {error}"))
    return settings, problems


def _typed(text: str) -> Any:
    """A value of the command line."""
    if text[:1] in ("[", "{", "'", '"'):
        try:
            return _construct(text)
        except KTAMXConfigError:
            raise KTAMXConfigError("cannot be read as YAML; quote it") from None
    loader = _Loader("")
    try:
        tag = loader.resolve(yaml.ScalarNode, text, (True, False))
        return loader.construct_object(yaml.ScalarNode(tag, text))
    except _UNREADABLE as error:
        raise KTAMXConfigError(_reason(error)) from None
    finally:
        loader.dispose()


def parse_settings(text: str, source: str) -> tuple[dict[str, Setting], list[Problem]]:
    """As `read_settings`, from text.

    Raises:
        BadSettings: It is not a YAML mapping.
    """
    loader = None
    try:
        if len(text) > _MOST_BYTES:
            raise yaml.YAMLError(f"it is larger than {_MOST_BYTES:,} bytes")
        if sum(text.count(bracket) for bracket in "[{") > _MOST_BRACKETS:
            raise yaml.YAMLError(f"it has more than {_MOST_BRACKETS:,} brackets")
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return {}, []
        if not isinstance(node, yaml.MappingNode):
            raise BadSettings(source, [Problem(_line(node), "is not a list of settings, one `key: value` a line")])
        _check_size(node, {}, 0)
        loader.flatten_mapping(node)
        return _entries(loader, node)
    except BadSettings:
        raise
    except _UNREADABLE as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}" if mark else ""
        raise BadSettings(source, [Problem(where, f"is not YAML: {_reason(error)}")]) from None
    finally:
        if loader is not None:
            loader.dispose()


def _construct(text: str) -> Any:
    """The value of a small YAML text."""
    settings, problems = parse_settings(f"value: {text}", "")
    if problems or list(settings) != ["value"]:
        raise KTAMXConfigError("more than a value")
    return settings["value"].value


def _entries(loader: _Loader, node: yaml.MappingNode) -> tuple[dict[str, Setting], list[Problem]]:
    settings: dict[str, Setting] = {}
    problems: list[Problem] = []
    for key_node, value_node in node.value:
        where = _line(key_node)
        try:
            key = loader.construct_object(key_node, deep=True)
        except _UNREADABLE as error:
            problems.append(Problem(where, f"a key cannot be read: {_reason(error)}"))
            continue
        if not isinstance(key, str):
            problems.append(Problem(where, f"the key {shown(key)} is not a name"))
            continue
        if key in settings:
            first = settings[key].where
            problems.append(Problem(where, f"{key_shown(key)} is set a second time; the first is at {first}"))
            continue
        try:
            settings[key] = Setting(loader.construct_object(value_node, deep=True), where)
        except _UNREADABLE as error:
            problems.append(Problem(where, f"{key_shown(key)}: {_reason(error)}"))
    return settings, problems


def _check_size(node: yaml.Node, sizes: dict[int, int], depth: int) -> int:
    """Values below a node with aliases written out; refuses what is too many, too deep, or contains itself.

    Raises:
        yaml.YAMLError: In words.
    """
    if depth > _MOST_DEPTH:
        raise yaml.YAMLError(f"it is nested more than {_MOST_DEPTH} deep, or contains itself")
    if id(node) not in sizes:
        parts = node.value if isinstance(node, yaml.CollectionNode) else ()
        children = [child for part in parts for child in (part if isinstance(part, tuple) else (part,))]
        sizes[id(node)] = 1 + sum(_check_size(child, sizes, depth + 1) for child in children)
    if sizes[id(node)] > _MOST_VALUES:
        raise yaml.YAMLError(f"it has more than {_MOST_VALUES:,} values")
    return sizes[id(node)]


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with whole numbers and decimal ones only: no octal, no base 60, no dates. A mapping in a
    setting has each key once."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        written = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        keys = [self.construct_object(key, deep=True) for key in written]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                raise yaml.constructor.ConstructorError(None, None, f"{shown(key)} is set twice in it")
        return super().construct_mapping(node, deep=deep)

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's own name)
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rsplit(":", 1)[-1] in ("bool", "null", "merge")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def _whole(loader: _Loader, node: yaml.ScalarNode) -> int:
    digits = str(node.value).replace("_", "")
    if len(digits.lstrip("+-")) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(digits.lstrip('+-'))} digits")
    return int(digits)


def _decimal(loader: _Loader, node: yaml.ScalarNode) -> float:
    text = str(node.value).replace("_", "").lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


_NUMBER_STARTS = list("-+.0123456789")
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?[0-9][0-9_]*$"), _NUMBER_STARTS)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"(?:[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    _NUMBER_STARTS,
)
_Loader.add_constructor("tag:yaml.org,2002:int", _whole)
_Loader.add_constructor("tag:yaml.org,2002:float", _decimal)
# What PyYAML and its constructors raise of a text that is no YAML, or of a value that is none of its tag.
_UNREADABLE = (
    yaml.YAMLError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    OverflowError,
    RecursionError,
)


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    problem = getattr(error, "problem", None) or str(error).split("\n", 1)[0] or type(error).__name__
    return "".join(character if character.isprintable() else " " for character in str(problem))[:200]


def _line(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}"
