"""What every benchmark shares: alternating runs, medians, a description of the machine, one append-only CSV."""

from __future__ import annotations

import argparse
import csv
import gc
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

from kt_hf.system.cpu import affinity, physical_cores

RESULTS = Path(__file__).parent / "results.csv"
FIELDS = (
    "date", "commit", "cpu", "cores", "torch", "transformers", "peft", "kt_kernel", "benchmark", "case", "shape",
    "tokens", "threads", "part", "p20_ms", "p50_ms", "p80_ms", "runs", "peak_mib",
)  # fmt: skip


@dataclass
class Timing:
    """Seconds of each run by part, `forward` and `backward` for instance.

    Attributes:
        threads: Those that computed: the operators' workers, else PyTorch's; 0 where the benchmark has one number.
        peak_mib: The most memory its process had; 0 where it had none of its own.
    """

    parts: dict[str, list[float]] = field(default_factory=dict)
    threads: int = 0
    peak_mib: int = 0

    def add(self, run: dict[str, float]) -> None:
        for part, seconds in run.items():
            self.parts.setdefault(part, []).append(seconds)

    def median(self, part: str | None = None) -> float:
        """Median seconds of a part, or of the parts' sum."""
        runs = self.parts[part] if part else [sum(run) for run in zip(*self.parts.values(), strict=True)]
        return statistics.median(runs)


def alternate(cases: dict[str, Callable[[], dict[str, float]]], runs: int, warm_up: int = 2) -> dict[str, Timing]:
    """Run the cases in turn, so that a slow moment of the machine hits all; each returns seconds by part."""
    for case in cases.values():
        for _ in range(warm_up):
            case()
    timings = {name: Timing() for name in cases}
    for _ in range(runs):
        for name, case in cases.items():
            gc.collect()
            timings[name].add(case())
    return timings


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def with_pages(label: str) -> str:
    """The label of a shape or model, with `huge pages` where PyTorch's tensors on the CPU are in pages of 2 MB."""
    modes = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    mode = modes.read_text() if modes.exists() else ""
    asked = os.environ.get("THP_MEM_ALLOC_ENABLE") == "1"
    here = "[always]" in mode or (asked and "[madvise]" in mode)
    return label.replace(" r=", " huge pages r=") if here else label


def parser(description: str | None, runs: int) -> argparse.ArgumentParser:
    """Arguments that every benchmark has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--runs", type=int, default=runs, help="rounds; a case has at least one measured run in each")
    made.add_argument("--save", default=str(RESULTS), help="CSV to append to, or off")
    return made


def cores() -> int:
    """Physical cores of this process: PyTorch's threads where it computes alone."""
    return len(physical_cores(affinity()))


def append(
    benchmark: str, shape: str, tokens: int, threads: int, timings: dict[str, Timing], file: str | Path = RESULTS
) -> None:
    """Add rows to a CSV (nowhere, if it is `off`), with the machine and the versions they were measured with."""
    if str(file) == "off":
        return
    file = Path(file)
    new = not file.exists()
    if not new:
        with file.open(newline="") as old:
            header = next(csv.reader(old), [])
        if tuple(header) != FIELDS:
            raise SystemExit(f"{file} has other columns than this benchmark writes ({', '.join(FIELDS)}).")
    common = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": _commit(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        **{name: _version(name) for name in ("torch", "transformers", "peft")},
        "kt_kernel": _kernel(),
        "benchmark": benchmark,
        "shape": shape,
        "tokens": tokens,
    }
    with file.open("a", newline="") as out:
        writer = csv.DictWriter(out, FIELDS, lineterminator="\n")
        if new:
            writer.writeheader()
        for case, timing in timings.items():
            for part, seconds in timing.parts.items():
                # Inclusive: the other way goes beyond the least and the most of few runs, below zero at times.
                cuts = statistics.quantiles(seconds, n=10, method="inclusive") if len(seconds) > 1 else seconds * 9
                row = {"case": case, "part": part, "runs": len(seconds), "threads": timing.threads or threads}
                row |= {f"p{10 * (i + 1)}_ms": f"{cuts[i] * 1e3:.3f}" for i in (1, 4, 7)}
                row["peak_mib"] = timing.peak_mib or ""
                writer.writerow(common | row)


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def _cpu() -> str:
    from kt_hf.backends import describe_cpu

    return describe_cpu()


def _version(name: str) -> str:
    try:
        return version(name)
    except ImportError:
        return "none"


def _kernel() -> str:
    from kt_hf.backends import kernel_availability

    details = kernel_availability().details
    return f"{details['version']} {details['variant']}" if details else "none"


def describe() -> str:
    """A line about the machine for the terminal."""
    return f"{_cpu()}, {platform.platform(terse=True)}, torch {torch.__version__} on {torch.get_num_threads()} threads"
