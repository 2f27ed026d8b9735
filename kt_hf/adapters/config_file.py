"""`adapter_config.json`, every setting of it that decides something checked for its type and bounds.

PEFT takes what it reads: a rank of "8", a pattern that is no regular expression or one that would run for hours,
modules_to_save given as one text (of which it takes the letters). Here each is refused by name, before PEFT reads it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..system.json_fields import Field, Fields, read_json

_LARGEST_RANK = 2**20
_MOST_PATTERNS = 1000  # that each module's name is compared with
_MOST_REPEATS = 6  # of any length, one after the other: the time to match grows with this power of the name's length
_MANY = 16
_LONGEST_NAME = 1000
_TOKENS = 2**31
_OF_BIAS = ("none", "all", "lora_only")


def read_config(path: Path) -> dict[str, Any]:
    """adapter_config.json of a LoRA adapter.

    Raises:
        KTAMXError: It is missing, no JSON, of another method, or a setting is of the wrong type or out of bounds.
    """
    return check_config(read_json(path))


def check_config(config: Field) -> dict[str, Any]:
    """The contents of adapter_config.json, checked; keys that are not known here are left as they are.

    Raises:
        KTAMXError: Naming file, setting and value.
    """
    fields = config.object()
    kind = fields.get("peft_type")
    if kind is None or kind.value != "LORA":
        Field(config.file, "peft_type", fields["peft_type"].value if "peft_type" in fields else None).refuse(
            "is not LORA"
        )
    for name, check in _SETTINGS.items():
        field = fields.get(name)
        if field is not None:
            check(field)
        elif name in ("r", "lora_alpha"):
            Field(config.file, name, None).refuse("is not a positive number")
    return dict(config.value)


def as_saved(config: Any) -> dict[str, Any]:
    """What PEFT will write of a `LoraConfig`: sets as sorted lists, enumerations by their values."""

    def plain(value: Any) -> Any:
        return sorted(value) if isinstance(value, (set, frozenset)) else getattr(value, "value", str(value))

    saved: dict[str, Any] = json.loads(json.dumps(config.to_dict(), default=plain))
    return saved


def _flag(field: Field) -> None:
    field.flag()


def _name(field: Field) -> None:
    if not field.text() or len(field.value) > _LONGEST_NAME or not field.value.isprintable():
        field.refuse("is no name")


def _names(field: Field) -> None:
    for one in field.entries():
        _name(one)


def _pattern(field: Field) -> None:
    problem = pattern_problem(field.text())
    if problem:
        field.refuse(problem)


def _pattern_or_names(field: Field) -> None:
    (_pattern if isinstance(field.value, str) else _names)(field)


def _patterns(field: Field) -> None:
    for one in [field] if isinstance(field.value, str) else field.entries():
        _pattern(one)


def _by_pattern(check: Callable[[Field], object]) -> Callable[[Field], None]:
    def do(field: Field) -> None:
        values: Fields = field.object()
        if len(values) > _MOST_PATTERNS:
            Field(field.file, field.name, len(values)).refuse(f"patterns are more than {_MOST_PATTERNS}")
        for name, one in values.items():
            problem = pattern_problem(name)
            if problem:
                Field(field.file, field.name, name).refuse(problem)
            check(one)

    return do


def _whole_numbers(field: Field) -> None:
    for one in field.entries() if isinstance(field.value, list) else [field]:
        one.integer(least=0, most=_TOKENS)


def _tokens(field: Field) -> None:
    for one in field.object().items() if isinstance(field.value, dict) else [("", field)]:
        for index in one[1].entries():
            index.integer(least=0, most=_TOKENS)


def _fraction(field: Field) -> None:
    if not 0 <= field.number() <= 1:
        field.refuse("is not between 0 and 1")


def _init(field: Field) -> None:
    if not isinstance(field.value, bool):
        _name(field)


_SETTINGS: dict[str, Callable[[Field], object]] = {
    "r": lambda field: field.integer(1, _LARGEST_RANK),
    "lora_alpha": lambda field: field.number(positive=True),
    "lora_dropout": _fraction,
    "rank_pattern": _by_pattern(lambda field: field.integer(1, _LARGEST_RANK)),
    "alpha_pattern": _by_pattern(lambda field: field.number(positive=True)),
    "target_modules": _pattern_or_names,
    "exclude_modules": _pattern_or_names,
    "modules_to_save": _patterns,
    "target_parameters": _names,
    "layers_to_transform": _whole_numbers,
    "layers_pattern": _patterns,
    "trainable_token_indices": _tokens,
    "bias": lambda field: field.choice(*_OF_BIAS),
    "init_lora_weights": _init,
    "base_model_name_or_path": lambda field: field.text(),
    "revision": lambda field: field.text(),
    "task_type": lambda field: field.text(),
    "auto_mapping": lambda field: field.object(),
    **dict.fromkeys(
        ("use_rslora", "use_dora", "use_qalora", "use_bdlora", "lora_bias", "fan_in_fan_out", "inference_mode",
         "ensure_weight_tying"),
        _flag,
    ),
}  # fmt: skip


@lru_cache(maxsize=4096)
def pattern_problem(pattern: str) -> str | None:
    """Why a regular expression for names of modules is not taken, or None.

    One that repeats what itself repeats or has alternatives, `(a+)+`, may take years for a name that does not match.
    """
    if not pattern or len(pattern) > _LONGEST_NAME * 10 or not pattern.isprintable():
        return "is no pattern of names"
    parser: Any = re._parser  # type: ignore[attr-defined]
    try:
        re.compile(rf"(.*\.)?({pattern})$")
        repeats = _repeats(parser.parse(pattern))
    except (re.error, RecursionError, OverflowError, MemoryError) as error:
        return f"is no regular expression ({error})"
    if repeats is None:
        return "repeats what repeats or has alternatives, which could take for ever to match"
    if repeats > _MOST_REPEATS:
        return f"has more than {_MOST_REPEATS} parts of any length, which could take for ever to match"
    return None


def _repeats(items: Any) -> int | None:
    """Parts of any length one after the other in a parsed expression; None where one has another in it."""
    count = 0
    for kind, value in items:
        name = str(kind)
        if name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            inside = _repeats(value[2])
            if value[1] > _MANY and (inside != 0 or _has_choice(value[2])):
                return None
            count += 1 if value[1] > _MANY else (inside or 0) * value[1]
            parts: list[int | None] = [inside]
        elif name == "BRANCH":
            parts = [_repeats(branch) for branch in value[1]]
            count += max((part or 0 for part in parts), default=0)
        elif name in ("SUBPATTERN", "ATOMIC_GROUP", "ASSERT", "ASSERT_NOT"):
            parts = [_repeats(value if name == "ATOMIC_GROUP" else value[-1])]
            count += parts[0] or 0
        elif name == "GROUPREF_EXISTS":
            parts = [_repeats(branch) for branch in value[1:] if branch]
            count += max((part or 0 for part in parts), default=0)
        else:
            parts = []
        if None in parts:
            return None
    return count


def _has_choice(items: Any) -> bool:
    return any(
        str(kind) == "BRANCH" or (str(kind) == "SUBPATTERN" and _has_choice(value[-1])) or "REPEAT" in str(kind)
        for kind, value in items
    )
