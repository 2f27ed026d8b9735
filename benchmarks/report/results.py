"""Reading results.csv: of each thing that was measured, the rows of the last run on each machine."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

NEEDED = (
    "date", "commit", "cpu", "cores", "torch", "transformers", "peft", "kt_kernel", "benchmark", "case", "shape",
    "tokens", "threads", "part", "p50_ms", "peak_mib",
)  # fmt: skip
RESULTS_FILE = Path(__file__).parents[1] / "results.csv"
VARIANTS = {"amx": "AMX", "avx512_bf16": "AVX512-BF16"}


@dataclass(frozen=True)
class Row:
    """One part of one case; milliseconds are the median's."""

    machine: str
    versions: str
    day: str
    benchmark: str
    case: str
    shape: str
    tokens: int
    threads: int
    part: str
    ms: float
    peak_mib: int


def read(file: Path) -> list[Row]:
    """All rows of a CSV in their order.

    Raises:
        SystemExit: Columns are missing, or a row has no number where one belongs; in words.
    """
    with file.open(newline="") as lines:
        reader = csv.DictReader(lines)
        missing = [name for name in NEEDED if name not in (reader.fieldnames or ())]
        if missing:
            raise SystemExit(f"{file} lacks the columns {', '.join(missing)}: it is no file of these benchmarks.")
        rows = []
        for raw in reader:
            try:
                rows.append(_row(raw))
            except (TypeError, ValueError, AttributeError) as error:
                raise SystemExit(f"{file}, line {reader.line_num}: not a row of these benchmarks ({error}).") from None
    return rows


def _row(raw: dict[str, str]) -> Row:
    cpu = raw["cpu"].split(" (")[0].replace("(R)", "").replace(" Processor", "").strip()
    version, _, variant = raw["kt_kernel"].partition(" ")
    has = VARIANTS.get(variant, "no operators")
    others = ", ".join(f"{name} {raw[name]}" for name in ("torch", "transformers", "peft"))
    return Row(
        machine=f"{cpu}, {raw['cores']} cores, {has}",
        versions=f"{others}, kt-kernel {version}",
        day=f"{raw['date']} {raw['commit']}",
        benchmark=raw["benchmark"], case=raw["case"], shape=raw["shape"], tokens=int(raw["tokens"]),
        threads=int(raw["threads"]), part=raw["part"], ms=float(raw["p50_ms"]), peak_mib=int(raw["peak_mib"] or 0),
    )  # fmt: skip


def latest(rows: Iterable[Row]) -> list[Row]:
    """Of each machine, benchmark, shape and number of tokens the last run alone, so that what is compared was measured
    together: the rows with the day and commit of the last of them, the later where a case was measured twice.
    """
    rows = list(rows)
    last = {(r.machine, r.benchmark, r.shape, r.tokens): r.day for r in rows}
    kept = {
        (r.machine, r.benchmark, r.shape, r.tokens, r.case, r.threads, r.part): r
        for r in rows
        if last[r.machine, r.benchmark, r.shape, r.tokens] == r.day
    }
    return list(kept.values())


class Results:
    """Rows to look things up in."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = list(rows)

    def of(self, **wanted: object) -> Results:
        """The rows whose fields have these values."""
        return Results(r for r in self.rows if all(getattr(r, name) == value for name, value in wanted.items()))

    def each(self, name: str) -> list[object]:
        """Distinct values of a field: numbers sorted, words in the order of their first row."""
        values = list(dict.fromkeys(getattr(r, name) for r in self.rows))
        return sorted(values) if values and isinstance(values[0], int) else values

    def split(self, *names: str) -> list[tuple[tuple[object, ...], Results]]:
        """The rows by the values of some fields."""
        if not names:
            return [((), self)]
        return [
            ((value, *rest), found)
            for value in self.each(names[0])
            for rest, found in self.of(**{names[0]: value}).split(*names[1:])
        ]

    def ms(self, **wanted: object) -> float | None:
        """Milliseconds of the one case meant, its parts added up; None if it was not measured."""
        found = self.of(**wanted).rows
        return sum(r.ms for r in found) if found else None

    def __bool__(self) -> bool:
        return bool(self.rows)
