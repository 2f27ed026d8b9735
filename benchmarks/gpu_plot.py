"""Tables and the plot of docs/gpu.md, made of gpu_train.csv: `python benchmarks/gpu_plot.py`.

Of rows that measured the same the last counts. Tables go between `<!-- table: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
CSV, PAGE, PLOT = HERE / "gpu_train.csv", HERE.parent / "docs/gpu.md", HERE.parent / "docs/plots/gpu_experts.svg"
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
            all_here = r["case"] == "stock" or r["gpu_experts"] == "0"
            if (r["family"], r["layers"], r["checkpointing"]) != (family, layers, "on") or not all_here:
                continue
            where = f"{r['streamed_experts']} of 64 experts streamed" if on_gpu(r) else "experts on the CPU"
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
    mpl.rcParams["svg.hashsalt"] = "kt_hf"
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
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


TABLES: dict[str, Callable[[list[Row]], str]] = {"by part": by_part, "against": against, "split": split}


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


if __name__ == "__main__":
    main()
