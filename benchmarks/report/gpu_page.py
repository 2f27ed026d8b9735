"""Tables and plots of docs/gpu.md, of benchmarks/gpu_*.csv: `python benchmarks/report/gpu_page.py`.

Of rows that measured the same the last counts. Tables go between `<!-- table: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path

from picture import STYLE, plt, save

BENCHMARKS, DOCS = Path(__file__).parents[1], Path(__file__).parents[2] / "docs"
CSV, TIERS, FP8 = (BENCHMARKS / f"gpu_{name}.csv" for name in ("train", "tiers", "fp8"))
PAGE, PLOT, SWEEPS = DOCS / "gpu.md", DOCS / "plots/gpu_experts.png", DOCS / "plots/gpu_tiers.png"
KEY = ("case", "family", "layers", "sequence", "rank", "gpu_experts", "streamed_experts", "bus", "batch",
       "checkpointing", "lora_device")  # fmt: skip
Row = dict[str, str]


def rows(path: Path = CSV) -> list[Row]:
    """The latest row of each setting, in the order in which they were first measured."""
    with path.open(newline="") as file:
        return list({tuple(row[k] for k in KEY): row for row in csv.DictReader(file)}.values())


def on_gpu(row: Row) -> int:
    """Experts of a layer that the GPU computes, wherever their weights are."""
    return int(row["gpu_experts"]) + int(row["streamed_experts"])


def number(text: str, digits: int) -> str:
    return f"{float(text):,.{digits}f}" if text else "–"


def table(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def by_part(found: list[Row]) -> str:
    """Whole steps with every expert on the CPU, and how much of them the operators take."""
    head = ["tokens a step", "checkpointing", "LoRA", "s a step", "tokens/s", "operators forward", "backward",
            "step / operators", "wait", "optimizer", "refresh", "other", "GPU peak GB", "host peak GB"]  # fmt: skip
    body = []
    for r in found:
        if (r["case"], r["family"], r["layers"], on_gpu(r)) != ("kt", "deepseek_v2", "27", 0):
            continue
        inside = float(r["operator forward"]) + float(r["operator backward"])
        parts = [number(r[p], 2) for p in ("operator forward", "operator backward")]
        rest = [number(r[p], 2) for p in ("wait", "optimizer", "refresh", "other")]
        memory = [number(r[p], 1) for p in ("gpu_peak_gb", "host_peak_gb")]
        body.append(
            [
                f"{r['batch']} x {int(r['sequence']):,}",
                r["checkpointing"],
                r["lora_device"].upper(),
                number(r["step"], 2),
                number(r["tokens_per_second"], 0),
                *parts,
                f"{float(r['step']) / inside:.2f}",
                *rest,
                *memory,
            ]
        )
    return table(head, body)


def against(found: list[Row]) -> str:
    """Others with the experts in host memory, and stock on the GPU."""
    head = ["model", "layers", "tokens a step", "what", "s a step", "tokens/s", "GPU peak GB", "host peak GB"]
    body = []
    for family, layers in (("deepseek_v2", "27"), ("qwen3_moe", "27"), ("qwen3_moe", "6")):
        for r in found:
            if (r["family"], r["layers"], r["checkpointing"]) != (family, layers, "on"):
                continue
            tiers = f"{r['gpu_experts']} of 64 experts resident, {r['streamed_experts']} streamed"
            where = tiers if on_gpu(r) else "experts on the CPU"
            what = f"kt_hf, {where}, LoRA on the {r['lora_device'].upper()}" if r["case"] == "kt" else r["case"]
            memory = [number(r[p], 1) for p in ("gpu_peak_gb", "host_peak_gb")]
            tokens = f"{r['batch']} x {int(r['sequence']):,}"
            speed = [number(r["step"], 2), number(r["tokens_per_second"], 0)]
            body.append([family, layers, tokens, what, *speed, *memory])
    return table(head, body)


def placements(found: list[Row]) -> list[Row]:
    kept = [r for r in found if r["layers"] == "9" and r["lora_device"] == "gpu" and r["batch"] == "1"]
    return sorted((r for r in kept if r["case"] == "kt"), key=lambda r: int(r["gpu_experts"])) + [
        r for r in kept if r["case"] == "stock"
    ]


def split(found: list[Row]) -> str:
    head = ["experts on the GPU", "s a step", "tokens/s", "operators forward", "backward", "GPU peak GB"]
    body = []
    for r in placements(found):
        name = r["gpu_experts"] if r["case"] == "kt" else "stock, all"
        numbers = [number(r["step"], 2), number(r["tokens_per_second"], 0)]
        parts = [number(r[p], 2) for p in ("operator forward", "operator backward")]
        body.append([name, *numbers, *parts, number(r["gpu_peak_gb"], 1)])
    return table(head, body)


def plot(found: list[Row], path: Path = PLOT) -> None:
    plt.rcParams.update(STYLE)
    points = placements(found)
    ours = [r for r in points if r["case"] == "kt"]
    figure, axes = plt.subplots(figsize=(6, 3.6))
    x = [int(r["gpu_experts"]) for r in ours]
    axes.plot(x, [float(r["tokens_per_second"]) for r in ours], marker="o", label="kt_hf")
    for r in points[len(ours) :]:
        axes.axhline(float(r["tokens_per_second"]), color="gray", ls="--", label="transformers and PEFT on the GPU")
    axes.set(xlabel="experts of each layer on the GPU (of 64)", ylabel="tokens a second", yscale="log", xticks=x)
    axes.legend()
    axes.grid(alpha=0.3, which="both")
    figure.tight_layout()
    save(figure, path)


def sweeps(path: Path = TIERS) -> list[list[Row]]:
    """Of gpu_tiers.csv: the rows of each sweep, the latest of those that measured the same; one with a choice each."""
    found: dict[tuple[str, ...], list[Row]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            key = tuple(row[name] for name in ("bus", "tokens", "layers"))
            if (row["resident"], row["streamed"]) in {(r["resident"], r["streamed"]) for r in found.get(key, [])}:
                found[key] = []  # the next sweep begins
            found.setdefault(key, []).append(row)
    return [found[key] for key in sorted(found, key=lambda key: (key[0], int(key[1])))]


def chosen_and_best(sweep: list[Row]) -> tuple[Row, Row]:
    """The planner's split, and the fastest of those with no more experts resident."""
    (chosen,) = (r for r in sweep if r["chosen"] == "1")
    return chosen, min(
        (r for r in sweep if int(r["resident"]) <= int(chosen["resident"])), key=lambda r: float(r["step"])
    )


def predicted(row: Row) -> float:
    return float(row["rest"]) + float(row["predicted_experts"])


def plans(found: list[list[Row]]) -> str:
    """The planner's choices beside the best of the sweeps."""
    head = ["tokens a step", "bus", "chosen: resident, streamed, CPU", "s a step", "predicted", "bound", "step / bound",
            "best split", "its s", "chosen / best", "all on the CPU, s"]  # fmt: skip
    body = []
    for sweep in found:
        chosen, best = chosen_and_best(sweep)
        (cpu,) = (r for r in sweep if on_tiers(r) == (0, 0))
        body.append(
            [
                f"{int(chosen['tokens']):,}",
                f"{number(chosen['gb_per_s'], 0)} GB/s",
                ", ".join(map(str, (*on_tiers(chosen), 64 - sum(on_tiers(chosen))))),
                number(chosen["step"], 3),
                f"{predicted(chosen):.3f}",
                number(chosen["bound"], 3),
                f"{float(chosen['step']) / float(chosen['bound']):.2f}",
                ", ".join(map(str, (*on_tiers(best), 64 - sum(on_tiers(best))))),
                number(best["step"], 3),
                f"{float(chosen['step']) / float(best['step']):.2f}",
                number(cpu["step"], 3),
            ]
        )
    return table(head, body)


def on_tiers(row: Row) -> tuple[int, int]:
    return int(row["resident"]), int(row["streamed"])


def plot_sweeps(found: list[list[Row]], path: Path = SWEEPS) -> None:
    """Seconds a step over streamed experts, measured and predicted, a panel a sweep."""
    plt.rcParams.update(STYLE)
    columns = 4
    figure, panels = plt.subplots(-(-len(found) // columns), columns, figsize=(11, 5.4), squeeze=False)
    for axes, sweep in zip(panels.flat, found, strict=False):
        chosen, _ = chosen_and_best(sweep)
        line = sorted((r for r in sweep if r["resident"] == chosen["resident"]), key=lambda r: int(r["streamed"]))
        x = [int(r["streamed"]) for r in line]
        axes.plot(x, [float(r["step"]) for r in line], marker="o", ms=3, label="measured")
        axes.plot(x, [predicted(r) for r in line], ls="--", color="gray", label="predicted")
        axes.plot(int(chosen["streamed"]), float(chosen["step"]), "r*", ms=11, label="chosen")
        axes.set_title(f"{int(chosen['tokens']):,} tokens, {number(chosen['gb_per_s'], 0)} GB/s", fontsize=9)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    for axes in panels.flat[len(found) :]:
        axes.set_axis_off()
    panels[0, 0].legend(fontsize=7)
    figure.supxlabel("experts of each layer streamed", fontsize=9)
    figure.supylabel("seconds a step", fontsize=9)
    figure.tight_layout()
    save(figure, path)


def eight_bits(path: Path = FP8) -> list[tuple[Row, Row]]:
    """Of gpu_fp8.csv: (FP8, bf16) for each number of tokens, the latest."""
    with path.open(newline="") as file:
        latest = {(row["batch"], row["sequence"], row["source"]): row for row in csv.DictReader(file)}
    return [(row, latest[batch, length, "bf16"]) for (batch, length, source), row in latest.items() if source == "fp8"]


def keep_8bit(found: list[tuple[Row, Row]]) -> str:
    each = ["s a step", "tokens/s", "host GB"]
    head = ["tokens a step", *(f"{source}: {name}" for source in ("FP8", "bf16") for name in each), "FP8 / bf16"]
    body = []
    for pair in found:
        cells = [
            cell
            for r in pair
            for cell in (number(r["step"], 2), number(r["tokens_per_second"], 0), number(r["streamed_gb"], 1))
        ]
        ratio = float(pair[0]["step"]) / float(pair[1]["step"])
        body.append([f"{pair[0]['batch']} x {int(pair[0]['sequence']):,}", *cells, f"{ratio:.2f}"])
    return table(head, body)


TABLES: dict[str, Callable[[list[Row]], str]] = {
    "by part": by_part,
    "against": against,
    "split": split,
    "plans": lambda _: plans(sweeps()),
    "8 bits": lambda _: keep_8bit(eight_bits()),
}


def fill(page: str, found: list[Row]) -> str:
    """The page with its tables made anew.

    Raises:
        ValueError: A table's place is missing.
    """
    for name, make in TABLES.items():
        place = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not place.search(page):
            raise ValueError(f"the page has no '<!-- table: {name} -->' … '<!-- end -->'")
        made = make(found).replace("\\", r"\\")
        page = place.sub(rf"\g<1>{made}\n\g<2>", page)
    return page


def main() -> None:
    found = rows()
    PAGE.write_text(fill(PAGE.read_text(), found))
    plot(found)
    plot_sweeps(sweeps())


if __name__ == "__main__":
    main()
