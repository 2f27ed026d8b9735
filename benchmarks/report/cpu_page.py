"""Write the tables and plots of docs/performance.md from results.csv.

    python benchmarks/report/cpu_page.py [--csv FILE] [--page FILE]

Between `<!-- table: NAME -->` or `<!-- plot: NAME -->` and `<!-- end -->` the page is this script's: the same CSV gives
the same bytes. Plots are written to the folder `plots` beside the page.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from picture import STYLE, plt, save
from results import RESULTS_FILE, Results, latest, read
from tables import CASES, PARTS, TABLES

PAGE = Path(__file__).parents[2] / "docs/performance.md"
BLOCK = re.compile(r"<!-- (table|plot): ([\w-]+) -->\n.*?<!-- end -->", re.DOTALL)
COLORS = {case: f"C{index}" for index, case in enumerate(CASES)}


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
                axis.plot(tokens, times, marker=".", color=COLORS[case], label=case)
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


PLOTS = {"layer": layer, "step": step, "threads": threads}


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
        save(figure, folder / f"{name}.png")
    return f"![{name}](plots/{name}.png)"


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
