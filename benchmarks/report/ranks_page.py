"""The plot of docs/ranks.md, of benchmarks/gpu_ranks.jsonl: `python benchmarks/report/ranks_page.py`.

Of rows that measured the same the last counts. Ratios are of rows of one date alone: machines differ.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from picture import STYLE, plt, save

ROWS = Path(__file__).parents[1] / "gpu_ranks.jsonl"
PLOT = Path(__file__).parents[2] / "docs/plots/gpu_ranks.png"
Case = tuple[str, str, int]  # tier, dtype of the experts, tokens of a rank
Rates = dict[int, tuple[float, str | None]]  # tokens/s and date, by number of GPUs


def measured(path: Path = ROWS) -> dict[Case, Rates]:
    """Of cases that more than one number of GPUs was measured in."""
    found: dict[Case, Rates] = {}
    for line in path.read_text().splitlines():
        row: dict[str, Any] = json.loads(line)
        if row.get("trouble") == "train":
            case = row["tier"], row["dtype"], row["tokens_a_rank"]
            found.setdefault(case, {})[row["gpus"]] = row["tokens_per_second"], row.get("date")
    return {case: dict(sorted(rates.items())) for case, rates in sorted(found.items()) if len(rates) > 1}


def ratio(rates: Rates, gpus: int) -> str:
    """Of one GPU's tokens/s, as a label."""
    (one, first), (several, date) = rates.get(1, (0.0, "")), rates.get(gpus, (0.0, None))
    return f"x{several / one:.2f}" if gpus > 1 and one and several and first == date else ""


def draw(cases: dict[Case, Rates], path: Path = PLOT) -> None:
    """A group of bars a case, a bar a number of GPUs, with what it is of one GPU's."""
    gpus = sorted({count for rates in cases.values() for count in rates})
    width = 0.8 / len(gpus)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
        for i, count in enumerate(gpus):
            places = [n + (i - (len(gpus) - 1) / 2) * width for n in range(len(cases))]
            heights = [rates.get(count, (0.0, None))[0] for rates in cases.values()]
            bars = axes.bar(places, heights, width, label=f"{count} GPU{'s' if count > 1 else ''}")
            axes.bar_label(bars, [ratio(rates, count) for rates in cases.values()], fontsize=7)
        names = [f"{tier}\n{dtype}\n{tokens:,}" for tier, dtype, tokens in cases]
        axes.set_xticks(range(len(cases)), names)
        axes.set_ylabel("tokens/s")
        axes.grid(axis="x", visible=False)
        axes.legend()
    save(figure, path)


if __name__ == "__main__":
    draw(measured())
