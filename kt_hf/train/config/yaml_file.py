"""A YAML file of settings, each with the line it stands in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ...errors import KTAMXConfigError


@dataclass(frozen=True)
class Setting:
    """A value as YAML reads it, and where it stands: `line 7`, or `command line`."""

    value: Any
    where: str


@dataclass(frozen=True)
class Problem:
    """What is wrong with a setting, in a sentence, and where it stands."""

    where: str
    text: str

    def __str__(self) -> str:
        return f"{self.where}: {self.text}" if self.where else self.text


class BadSettings(KTAMXConfigError):
    """All that is wrong with a configuration. `problems` has them one by one."""

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        self.source, self.problems = source, list(problems)
        count = f"{len(self.problems)} problem{'s' if len(self.problems) != 1 else ''}"
        super().__init__("\n".join([f"{source} has {count}:", *(f"  {problem}" for problem in self.problems)]))


def read_settings(file: Path, overrides: Sequence[str] = ()) -> tuple[dict[str, Setting], list[Problem]]:
    """The settings of `file`, with `key=value` overrides (values are YAML) put over them, and what was unreadable.

    Raises:
        BadSettings: There is no such file, or it is not a YAML mapping, so that nothing else can be said about it.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise BadSettings(str(file), [Problem("", f"cannot be read: {reason}")]) from None
    settings, problems = parse_settings(text, str(file))
    settings, more = read_overrides(settings, overrides)
    return settings, problems + more


def read_overrides(settings: dict[str, Setting], overrides: Sequence[str]) -> tuple[dict[str, Setting], list[Problem]]:
    """`settings` with `key=value` overrides put over them, and those that cannot be read."""
    settings, problems = dict(settings), list[Problem]()
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key.strip():
            problems.append(Problem("command line", f"{override!r} is not of the form key=value"))
            continue
        try:
            settings[key.strip()] = Setting(yaml.safe_load(value), "command line")
        except yaml.YAMLError:
            problems.append(Problem("command line", f"{key.strip()}: {value!r} cannot be read as YAML; quote it"))
    return settings, problems


def parse_settings(text: str, source: str) -> tuple[dict[str, Setting], list[Problem]]:
    """As `read_settings`, from text.

    Raises:
        BadSettings: It is not a YAML mapping.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return {}, []
        if not isinstance(node, yaml.MappingNode):
            raise BadSettings(source, [Problem(_line(node), "is not a list of settings, one `key: value` a line")])
        loader.flatten_mapping(node)
        return _entries(loader, node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise BadSettings(source, [Problem(where, f"is not YAML: {what}")]) from None
    finally:
        loader.dispose()


def _entries(loader: yaml.SafeLoader, node: yaml.MappingNode) -> tuple[dict[str, Setting], list[Problem]]:
    settings: dict[str, Setting] = {}
    problems: list[Problem] = []
    for key_node, value_node in node.value:
        key, where = loader.construct_object(key_node, deep=True), _line(key_node)
        if not isinstance(key, str):
            problems.append(Problem(where, f"the key {key!r} is not a name"))
            continue
        if key in settings:
            problems.append(Problem(where, f"{key} is set a second time; the first is at {settings[key].where}"))
            continue
        settings[key] = Setting(loader.construct_object(value_node, deep=True), where)
    return settings, problems


def _line(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}"
