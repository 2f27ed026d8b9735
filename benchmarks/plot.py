"""Write the tables and plots of docs/performance.md from results.csv.

    python benchmarks/plot.py [--csv FILE] [--page FILE]

Between `<!-- table: NAME -->` or `<!-- plot: NAME -->` and `<!-- end -->` the page is this script's: the same CSV gives
the same bytes. Plots are written to the folder `plots` beside the page.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import matplotlib
from results import RESULTS_FILE, Results, latest, read
from tables import CASES, PARTS, TABLES, roofline_rows, size

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PAGE = Path(__file__).parents[1] / "docs/performance.md"
BLOCK = re.compile(r"<!-- (table|plot): ([\w-]+) -->\n.*?<!-- end -->", re.DOTALL)
# The same bytes each time: no random ids, no date.
STYLE = {"svg.hashsalt": "kt_hf", "svg.fonttype": "none", "font.size": 8, "axes.grid": True, "grid.alpha": 0.3}
COLOURS = {case: f"C{index}" for index, case in enumerate(CASES)}


def grid(rows: int, columns: int, height: float = 2.4) -> tuple[Any, Any]:
    figure, axes = plt.subplots(rows, columns, figsize=(4.5 * columns, height * rows), squeeze=False)
    return figure, axes


def layer(results: Results) -> Any:
    """Milliseconds a token of each case against tokens: a row a shape, a column a machine."""
    found = results.of(benchmark="layer")
    shapes, machines = [s for s in found.each("shape") if not str(s).endswith(" r=0")], found.each("machine")
    if not shapes:
        return None
    figure, axes = grid(len(shapes), len(machines))
    for row, shape in zip(axes, shapes, strict=True):
        for axis, machine in zip(row, machines, strict=True):
            at = found.of(shape=shape, machine=machine)
            for case in [case for case in CASES if at.of(case=case)]:
                held = at.of(case=case)
                tokens = [int(str(t)) for t in held.each("tokens")]
                times = [(held.ms(tokens=t) or 0.0) / max(t, 1) for t in tokens]
                axis.plot(tokens, times, marker=".", color=COLOURS[case], label=case)
            axis.set(xscale="log", yscale="log", title=f"{shape}\n{machine}", xlabel="tokens", ylabel="ms a token")
            if at:
                axis.legend(fontsize=6)
            else:
                axis.set_visible(False)
    return figure


def step(results: Results) -> Any:
    """Seconds of a step by part, a panel a machine and model."""
    panels = results.of(benchmark="step").split("machine", "shape", "tokens")
    if not panels:
        return None
    figure, axes = grid(len(panels), 1, 2.2)
    for (axis,), ((machine, shape, tokens), at) in zip(axes, panels, strict=True):
        cases = [str(case) for case in at.each("case")][::-1]
        left = [0.0] * len(cases)
        for part in PARTS:
            widths = [(at.ms(case=case, part=part) or 0.0) / 1e3 for case in cases]
            axis.barh(cases, widths, left=left, label=part)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axis.set(title=f"{shape}, {tokens:,} tokens\n{machine}", xlabel="seconds a step")
        axis.legend(fontsize=6)
    return figure


def threads(results: Results) -> Any:
    """Forward + backward against workers, relative to the best of that number of tokens; PyTorch on the best number of
    threads."""
    panels = results.of(benchmark="threads").split("machine", "shape")
    if not panels:
        return None
    figure, axes = grid(1, len(panels))
    for axis, ((machine, shape), at) in zip(axes[0], panels, strict=True):
        for (tokens,), held in at.split("tokens"):
            counts = held.each("threads")
            times = [min(one.ms() or 0.0 for _, one in held.of(threads=n).split("case")) for n in counts]
            axis.plot(counts, [time / min(times) for time in times], marker=".", label=f"{tokens:,}")
        axis.set(title=f"{shape}\n{machine}", xlabel="workers", ylabel="time / best", ylim=(0, None))
        axis.legend(title="tokens", fontsize=6)
    return figure


def growth(results: Results) -> Any:
    found = results.of(benchmark="growth")
    if not found:
        return None
    names = ("T", "E", "r", "L")
    figure, axes = grid(len(found.each("machine")), len(names))
    for row, ((machine,), at) in zip(axes, found.split("machine"), strict=True):
        for axis, name in zip(row, names, strict=True):
            varied = Results(r for r in at.rows if r.case.endswith(f", {name} varied"))
            for (case, part), held in varied.split("case", "part"):
                points = sorted((r.tokens if name == "T" else size(r.shape, name), r.ms) for r in held.rows)
                axis.plot(*zip(*points, strict=True), marker=".", label=f"{str(case).split(',')[0]} {part}")
            axis.set(title=str(machine), xlabel=name, ylabel="ms", xlim=(0, None), ylim=(0, None))
            if varied:
                axis.legend(fontsize=6)
    return figure


def roofline(results: Results) -> Any:
    """The least time as a share of the measured, against tokens."""
    panels = results.of(benchmark="roofline").split("machine")
    if not panels:
        return None
    figure, axes = grid(1, len(panels))
    for axis, ((machine,), at) in zip(axes[0], panels, strict=True):
        curves: dict[str, list[tuple[int, float]]] = {}
        for shape, tokens, part, ms, least, *_ in roofline_rows(at):
            curves.setdefault(f"{shape} {part}", []).append((tokens, least / ms))
        for name, points in curves.items():
            axis.plot(*zip(*points, strict=True), marker=".", label=name)
        axis.set(xscale="log", ylim=(0, 1), title=str(machine), xlabel="tokens", ylabel="least / measured")
        axis.legend(fontsize=6)
    return figure


PLOTS = {"layer": layer, "step": step, "threads": threads, "growth": growth, "roofline": roofline}


def filled(page: str, results: Results, folder: Path) -> str:
    """The page with its blocks made anew; plots are written to `folder`."""

    def block(match: re.Match[str]) -> str:
        kind, name = match.groups()
        known = TABLES if kind == "table" else PLOTS
        if name not in known:
            raise SystemExit(f"The page asks for the {kind} {name}; there are {', '.join(known)}.")
        text = TABLES[name](results) if kind == "table" else _drawn(name, results, folder)
        return f"<!-- {kind}: {name} -->\n{text or 'Not measured yet.'}\n<!-- end -->"

    return BLOCK.sub(block, page)


def _drawn(name: str, results: Results, folder: Path) -> str:
    with plt.rc_context(STYLE):
        figure = PLOTS[name](results)
        if figure is None:
            return ""
        figure.tight_layout()
        folder.mkdir(exist_ok=True)
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
        plt.close(figure)
    return f"![{name}](plots/{name}.svg)"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--csv", type=Path, default=RESULTS_FILE)
    arguments.add_argument("--page", type=Path, default=PAGE)
    given = arguments.parse_args()
    results = Results(latest(read(given.csv)))
    text = given.page.read_text()
    given.page.write_text(filled(text, results, given.page.parent / "plots"))


if __name__ == "__main__":
    main()
