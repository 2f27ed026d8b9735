"""Where rows of data come from: files, folders, LLaMA-Factory's `dataset_info.json`, the hub, or Python itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ...errors import KTAMXConfigError
from ..config.aliases import KNOWN_DATASETS
from ..config.settings import BUILTIN_DATA
from ..config.stages import STAGES
from .dataset_info import FILE, Entry, entry_of, info_file
from .files import SUFFIXES, Unreadable, data_files, numbered, read_rows

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_PATIENCE = 10.0  # s until the hub counts as out of reach


@dataclass
class Source:
    """Rows of one file, or of one data set of another kind.

    Attributes:
        name: The file, or the data set's name.
        rows: (place, row) of each row that is an object.
        bad: (place, reason) of the others.
    """

    name: str
    rows: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)

    def columns(self) -> set[str]:
        """The columns of all rows together."""
        return {key for _, row in self.rows for key in row}


def dataset_dir_problem(dataset_dir: str | None) -> str | None:
    """Why `dataset_dir` cannot be a folder of data sets, or None."""
    try:
        exists = dataset_dir is None or Path(dataset_dir).expanduser().is_dir()
    except (OSError, RuntimeError) as error:  # a name too long, a ~user who is not there
        return f"it cannot be looked at: {error}"
    return None if exists else "there is no such folder"


def dataset_problem(spec: Any, dataset_dir: str | None = None) -> str | None:
    """Why `spec` cannot name a data set, or None. Looks at the file system only."""
    if not isinstance(spec, str):
        return f"it must be text, and is {type(spec).__name__}"
    if spec.startswith("builtin:"):
        return None if spec == BUILTIN_DATA else f"the built-in data set is {BUILTIN_DATA}"
    try:
        entry = entry_of(spec, dataset_dir)
        if entry:
            return _path_problem(entry.file) if entry.file else None
        path = _path(spec, dataset_dir)
        if path.exists() or path.suffix.lower() in SUFFIXES or spec.startswith((".", "/", "~")):
            return _path_problem(path)
    except KTAMXConfigError as error:
        return str(error).rstrip(".")
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, a NUL, a ~user who is not there
        return f"it cannot be looked at: {error}"
    if _HUB_NAME.fullmatch(spec) or spec in KNOWN_DATASETS:
        return None
    listed = info_file(dataset_dir)
    where = f"{listed} does not name it" if listed.is_file() else f"there is no {FILE} in {listed.parent}"
    return f"neither a file nor a name on the hub (owner/name), and {where} (set dataset_dir)"


def _path(spec: str, dataset_dir: str | None) -> Path:
    """`spec` as a path; below `dataset_dir` if it is there only."""
    path = Path(spec).expanduser()
    if dataset_dir and not path.exists():
        below = Path(dataset_dir).expanduser() / path
        return below if below.exists() else path
    return path


def _path_problem(path: Path) -> str | None:
    if path.is_dir():
        return None if data_files(path) else f"the folder holds no file that ends in {', '.join(SUFFIXES)}"
    if not path.exists():
        return "there is no such file or folder"
    if not path.is_file():
        return "it is neither a file nor a folder"
    return None if path.suffix.lower() in SUFFIXES else f"the file must end in {', '.join(SUFFIXES)}"


def read_source(
    spec: str, purpose: str, stage: str, most: int | None = None, dataset_dir: str | None = None
) -> list[Source]:
    """The rows of a data set, at most `most`, apart for each file.

    Args:
        spec: A file, a folder, a name in `dataset_info.json` or on the hub, or `builtin:pydoc`.
        purpose: `train` or `eval`: which split, where there are several.
        stage: For `builtin:pydoc`: which form its rows have.
        most: Rows to take at most.
        dataset_dir: The folder of `dataset_info.json`.

    Raises:
        KTAMXConfigError: Nothing can be read, and why.
    """
    problem = dataset_problem(spec, dataset_dir)
    if problem:
        raise KTAMXConfigError(f"dataset {spec}: {problem}.")
    entry = None if spec == BUILTIN_DATA else entry_of(spec, dataset_dir)
    if entry and entry.most is not None:
        most = min(entry.most, most or entry.most)
    sources: list[Source] = []
    for name, rows in _origins(spec, entry, purpose, stage, dataset_dir):
        taken = sum(len(source.rows) for source in sources)
        if most is not None and taken >= most:
            break
        sources.append(_take(name, rows(), None if most is None else most - taken, entry))
    return sources


def _origins(
    spec: str, entry: Entry | None, purpose: str, stage: str, dataset_dir: str | None
) -> Iterator[tuple[str, Callable[[], Iterator[tuple[str, Any]]]]]:
    """(name, function that reads the rows) of each file, or of what else there is."""
    if spec == BUILTIN_DATA:
        yield spec, lambda: numbered(_pydoc(purpose, stage), spec)
        return
    path = entry.file if entry else _path(spec, dataset_dir)
    if path is not None and path.exists():
        for file in data_files(path) if path.is_dir() else [path]:
            yield str(file), partial(read_rows, file)
        return
    yield spec, lambda: numbered(_hub(spec, entry, purpose), spec)


def _take(name: str, rows: Iterator[tuple[str, Any]], most: int | None, entry: Entry | None) -> Source:
    source = Source(name)
    for place, row in rows:
        if isinstance(row, dict):
            source.rows.append((place, entry.row(row) if entry else row))
        else:
            source.bad.append((place, row if isinstance(row, Unreadable) else f"not a row but {type(row).__name__}"))
        if most is not None and len(source.rows) >= most:
            break
    return source


def _hub(spec: str, entry: Entry | None, purpose: str) -> Iterator[Any]:
    """Rows of a data set on the hub, from the cache where it cannot be reached."""
    import datasets

    name = entry.hub if entry and entry.hub else KNOWN_DATASETS.get(spec, spec)
    options = {"name": entry.subset, "data_dir": entry.folder} if entry else {}
    unreachable = _unreachable(name)
    offline, datasets.config.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE, bool(unreachable)
    try:  # where it is out of reach, the library would try it for half a minute
        loaded = datasets.load_dataset(name, **options)
        names = ("train",) if purpose == "train" else ("validation", "test", "eval")
        names = (entry.split,) if entry and entry.split else names
        splits = [split for split in names if split in loaded] or list(loaded)[: 1 if len(loaded) == 1 else 0]
        if splits:
            yield from _as_stored(loaded[splits[0]])
            return
    except Exception as error:  # permission, no such name, damaged files: the library's own words
        words = " ".join(str(error).split()) or type(error).__name__
        why = f"{unreachable}, and it is not in the cache" if unreachable else words
        raise KTAMXConfigError(
            f"dataset {spec}: {name} cannot be had from the hub: {why.rstrip('.')}. Or give a file or a folder."
        ) from None
    finally:
        datasets.config.HF_HUB_OFFLINE = offline
    raise KTAMXConfigError(f"dataset {spec} has the splits {', '.join(loaded)}, none of them for {purpose}.")


def _as_stored(rows: Any) -> Any:
    """A data set that gives its images as files have them, for in memory they would be some twenty times that."""

    import datasets

    def keep(feature: Any) -> None:
        if isinstance(feature, datasets.Image):
            feature.decode = False
        for part in feature.values() if isinstance(feature, dict) else [getattr(feature, "feature", None)]:
            if part is not None:
                keep(part)

    keep(rows.info.features)
    return rows


def _unreachable(name: str) -> str | None:
    """Why the hub cannot be asked about a data set, or None; what it answers does not matter here."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        HfApi().dataset_info(name, timeout=_PATIENCE)
    except OfflineModeIsEnabled:
        return "HF_HUB_OFFLINE is set"
    except HfHubHTTPError:
        return None
    except Exception as error:  # of whichever HTTP library this version of huggingface_hub uses
        return f"there is no connection to it ({' '.join(str(error).split()) or type(error).__name__})"
    return None


def _pydoc(purpose: str, stage: str) -> list[dict[str, Any]]:
    """Questions on Python and their answers; where wrong ones are needed, the right one to another question."""
    from ...builtin.pydoc_rows import collect, import_modules, split

    train, held_out = split(collect(import_modules()[0]))
    items = train if purpose == "train" else held_out
    others = [*items[1:], *items[:1]]

    def says(role: str, content: str) -> list[dict[str, str]]:
        return [{"role": role, "content": content}]

    rows: list[dict[str, Any]] = []
    for number, (item, other) in enumerate(zip(items, others, strict=True)):
        prompt, right, wrong = says("user", item.question), item.answer, other.answer
        if stage == "pt":
            rows.append({"text": f"{item.question}\n{right}"})
        elif STAGES[stage].pairs:
            rows.append({"prompt": prompt, "chosen": says("assistant", right), "rejected": says("assistant", wrong)})
        elif stage == "kto":
            good = number % 2 == 0
            rows.append({"prompt": prompt, "completion": says("assistant", right if good else wrong), "label": good})
        elif STAGES[stage].generates:
            rows.append({"prompt": prompt, "answer": right})
        else:
            rows.append(dict(item.row()))
    return rows
