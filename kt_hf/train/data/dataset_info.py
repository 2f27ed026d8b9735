"""LLaMA-Factory's `dataset_info.json`: names of data sets, where their rows are, and what their columns are called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from ...errors import KTAMXConfigError
from .files import parse_json

FILE = "dataset_info.json"
DEFAULT_FOLDER = "data"  # LLaMA-Factory's own default of `dataset_dir`
_MOST_BYTES = 50_000_000  # theirs has about 20,000

# Its name of a column -> ours.
_COLUMNS = {
    "prompt": "instruction", "query": "input", "response": "output", "history": "history", "messages": "conversations",
    "system": "system", "tools": "tools", "images": "images", "videos": "videos", "audios": "audios",
    "chosen": "chosen", "rejected": "rejected", "kto_tag": "kto_tag",
}  # fmt: skip
# Its name of a speaker -> (ours, the word for it in the data unless the entry says otherwise).
_SPEAKERS = {
    "user_tag": ("user", "human"), "assistant_tag": ("assistant", "gpt"), "observation_tag": ("tool", "observation"),
    "function_tag": ("function_call", "function_call"), "system_tag": ("system", "system"),
}  # fmt: skip
_ELSEWHERE = ("ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
_TEXTS = ("file_name", "hf_hub_url", "formatting", "subset", "split", "folder", *_ELSEWHERE)


@dataclass(frozen=True)
class Entry:
    """A data set of `dataset_info.json`.

    Attributes:
        name: What it is called there.
        file: A file or folder; None for one of the hub.
        hub: Its name on the hub; None for one in a file.
        split, subset, folder: Of the one on the hub.
        most: Rows to take; None for all.
        columns: Ours -> the data's. Empty if the entry names none.
        tags: The keys and speakers of its messages; empty if the entry names none.
    """

    name: str
    file: Path | None
    hub: str | None
    split: str | None
    subset: str | None
    folder: str | None
    most: int | None
    columns: Mapping[str, str]
    tags: Mapping[str, str]

    def row(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row under our names.

        A column that `columns` does not name is not used, as in LLaMA-Factory: it is marked, so that it is taken for
        nothing and reported.
        """
        if self.columns:
            named = {ours: row[theirs] for ours, theirs in self.columns.items() if row.get(theirs) is not None}
            theirs = set(self.columns.values())
            row = named | {f"{key} (not in columns)": value for key, value in row.items() if key not in theirs}
        if self.tags:
            row = row | {column: self._retagged(row[column]) for column in _MESSAGES & row.keys()}
        return row

    def _retagged(self, value: Any) -> Any:
        if isinstance(value, dict):
            return self._retagged([value])[0]
        if not isinstance(value, list):
            return value
        return [self._message(message) if isinstance(message, dict) else message for message in value]

    def _message(self, message: dict[str, Any]) -> dict[str, Any]:
        """With role and content for its keys, and our words for the speakers that it knows."""
        role, content = self.tags.get("role_tag", "from"), self.tags.get("content_tag", "value")
        speakers = {self.tags.get(tag, word): ours for tag, (ours, word) in _SPEAKERS.items()}
        rest = {key: value for key, value in message.items() if key not in (role, content)}
        speaker = message.get(role)
        known = speakers.get(speaker, speaker) if isinstance(speaker, str) else speaker
        return rest | {"role": known, "content": message.get(content)}


_MESSAGES = frozenset({"conversations", "chosen", "rejected"})


def info_file(dataset_dir: str | None) -> Path:
    """Where `dataset_info.json` of a configuration is, if there is one: in `dataset_dir`, else in `data`."""
    return Path(dataset_dir or DEFAULT_FOLDER).expanduser() / FILE


def entry_of(name: str, dataset_dir: str | None) -> Entry | None:
    """What `dataset_info.json` says of a data set; None if there is no such file, or nothing of it there.

    Raises:
        KTAMXConfigError: The file or the entry is not as it should be.
    """
    file = info_file(dataset_dir)
    if not file.is_file():
        return None
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise ValueError("it is larger than any list of data sets")
        content = parse_json(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise KTAMXConfigError(f"{file} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise KTAMXConfigError(f"{file} is not an object of data sets.")
    if name not in content:
        return None
    return _entry(name, content[name], file)


def _entry(name: str, entry: Any, file: Path) -> Entry:
    def wrong(why: str) -> KTAMXConfigError:
        return KTAMXConfigError(f"{file}: {name}: {why}.")

    if not isinstance(entry, dict):
        raise wrong("it is not an object")
    for key in _TEXTS:
        if entry.get(key) is not None and not isinstance(entry[key], str):
            raise wrong(f"{key} must be text")
    if entry.get("formatting", "alpaca") not in ("alpaca", "sharegpt", "openai"):
        raise wrong(f"formatting {entry['formatting']!r} is not known: it must be alpaca or sharegpt")
    most = entry.get("num_samples")
    if most is not None and (type(most) is not int or most < 1):
        raise wrong(f"num_samples={most!r} must be a whole number from 1")
    columns, tags = (_names(entry, key, wrong) for key in ("columns", "tags"))
    path = _path(entry, file, wrong)
    if path is None and entry.get("hf_hub_url") is None:
        other = next((key for key in _ELSEWHERE if entry.get(key)), None)
        raise wrong(f"{other} cannot be read here: download the file and give file_name" if other else "no file_name")
    hub = entry.get("hf_hub_url") if path is None else None
    renamed = {_COLUMNS[key]: theirs for key, theirs in columns.items() if key in _COLUMNS}
    if renamed.keys() == {"instruction"}:  # plain text, as for pre-training
        renamed = {"text": renamed["instruction"]}
    elif renamed and entry.get("formatting", "alpaca") != "alpaca":
        renamed.setdefault("conversations", "conversations")
    elif renamed and not entry.get("ranking"):
        renamed = {"instruction": "instruction", "input": "input", "output": "output"} | renamed
    return Entry(name, path, hub, entry.get("split"), entry.get("subset"), entry.get("folder"), most, renamed, tags)


def _names(entry: dict[str, Any], key: str, wrong: Any) -> dict[str, str]:
    value = entry.get(key) or {}
    if not isinstance(value, dict) or not all(isinstance(name, str) or name is None for name in value.values()):
        raise wrong(f"{key} must be names")
    return {inner: name for inner, name in value.items() if name is not None}


def _path(entry: dict[str, Any], file: Path, wrong: Any) -> Path | None:
    """The file or folder of an entry; None if it is on the hub alone."""
    name = entry.get("file_name")
    if name is None:
        return None
    if PurePath(name).is_absolute() or ".." in PurePath(name).parts or "\0" in name:
        raise wrong(f"file_name={name!r} leads out of {file.parent}: give that file in dataset itself")
    path = file.parent / name
    if not path.exists():
        if entry.get("hf_hub_url"):
            return None
        raise wrong(f"there is no file {path}")
    return path
