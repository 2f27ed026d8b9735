"""The tables of docs/performance.md, each a function from results to Markdown ("" if nothing of it was measured)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from results import Results

CASES = (
    "default", "kt", "kt-int8", "kt-int4", "torch", "bare", "peer", "peer-shared", "stock", "stock-eager",
    "kt-lora-gpu",
)  # fmt: skip
PARTS = ("forward", "backward", "optimizer", "refresh")


def number(value: float | None) -> str:
    """Three digits or so."""
    if value is None:
        return "–"
    size = abs(value)
    return f"{value:,.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.{2 if size >= 0.1 else 4}f}"


def ratio(one: float | None, other: float | None) -> str:
    return f"{one / other:.2f}" if one is not None and other else "–"


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def by_machine(results: Results, table: Callable[[Results], str]) -> str:
    return "\n\n".join(f"**{machine}**\n\n{table(found)}" for (machine,), found in results.split("machine"))


def machines(results: Results) -> str:
    rows = []
    for (machine,), found in results.split("machine"):
        versions = "; ".join(str(v) for v in found.each("versions"))
        rows.append([str(machine), versions, ", ".join(sorted(str(v) for v in found.each("benchmark")))])
    return markdown(("machine", "versions", "measured"), rows) if rows else ""


def layer(results: Results) -> str:
    """Forward + backward of each case, and how many times stock's speed kt_hf's default is."""

    def table(found: Results) -> str:
        cases = [case for case in CASES if found.of(case=case)]
        rows = []
        for (shape, tokens), at in found.split("shape", "tokens"):
            ours = at.ms(case="default") or at.ms(case="kt")
            cells = [
                f"{number(at.ms(case=case, part='forward'))} + {number(at.ms(case=case, part='backward'))}"
                if at.of(case=case)
                else "–"
                for case in cases
            ]
            rows.append([str(shape), f"{tokens:,}", *cells, ratio(at.ms(case="stock"), ours)])
        return markdown(("shape", "tokens", *cases, "stock / kt_hf"), rows)

    return by_machine(results.of(benchmark="layer"), table)


def lora(results: Results) -> str:
    """What LoRA adds to a forward: the same case and tokens with it and without, of runs of their own."""

    def table(found: Results) -> str:
        rows = []
        pairs = [(s, s.rsplit(" r=", 1)[0] + " r=0") for s in map(str, found.each("shape")) if not s.endswith(" r=0")]
        cases = [case for case in CASES if found.of(case=case)]
        for shape, without in pairs:
            for tokens in found.of(shape=without).each("tokens"):
                cells = []
                for case in cases:
                    one = found.ms(shape=shape, tokens=tokens, case=case, part="forward")
                    none = found.ms(shape=without, tokens=tokens, case=case, part="forward")
                    cells.append(f"{1 - none / one:.0%}" if one and none else "–")
                if any(cell != "–" for cell in cells):
                    rows.append([shape, f"{tokens:,}", *cells])
        return markdown(("shape", "tokens", *cases), rows) if rows else "Not measured without LoRA."

    return by_machine(results.of(benchmark="layer"), table)


def step(results: Results) -> str:
    def table(found: Results) -> str:
        rows = []
        for (shape, tokens, case), at in found.split("shape", "tokens", "case"):
            whole = at.ms()
            cells = [number(part / 1e3) if (part := at.ms(part=name)) is not None else "–" for name in PARTS]
            others = found.of(shape=shape, tokens=tokens)
            compared = [ratio(whole, others.ms(case=other)) for other in ("stock", "peer")]
            rate = number(int(str(tokens)) / whole * 1e3) if whole else "–"
            memory = f"{at.rows[0].peak_mib / 1024:.1f}" if at.rows[0].peak_mib else "–"
            cells += [number((whole or 0) / 1e3), rate, *compared, memory]
            rows.append([str(shape), f"{tokens:,}", str(case), *cells])
        parts = [f"{name} s" for name in PARTS]
        head = ("model", "tokens", "case", *parts, "step s", "tokens/s", "of stock", "of peer", "peak GiB")
        return markdown(head, rows)

    return by_machine(results.of(benchmark="step"), table)


def threads(results: Results) -> str:
    """The best number of workers and of PyTorch's threads, and how much longer the default takes."""

    def told(key: tuple[object, ...]) -> str:
        name = str(key[0]).removesuffix(", planned")
        return f"{key[1]}, {name}" if int(str(key[1])) else f"backend torch, {name}"

    def table(found: Results) -> str:
        rows = []
        for (shape, tokens), at in found.split("shape", "tokens"):
            times = {(case, count): held.ms() or 0.0 for (case, count), held in at.split("case", "threads")}
            best = min(times, key=lambda key: times[key])
            plan = next((key for key in times if "planned" in str(key[0])), None)
            rows.append([
                str(shape), f"{tokens:,}", told(best), number(times[best]),
                told(plan) if plan else "–", number(times[plan]) if plan else "–",
                f"{times[plan] / times[best] - 1:.1%}" if plan else "–",
            ])  # fmt: skip
        return markdown(
            ("shape", "tokens", "best: workers", "ms", "default: workers", "ms", "more than the best"), rows
        )

    return by_machine(results.of(benchmark="threads"), table)


def dpo(results: Results) -> str:
    def table(found: Results) -> str:
        rows = []
        for (shape, tokens), at in found.split("shape", "tokens"):
            least = next((at.ms(case=c) for c in at.each("case") if str(c).startswith("precomputed")), None)
            for (case,), held in at.split("case"):
                order, _, calls = str(case).partition(": ")
                parts = [number(held.ms(part=part)) for part in ("policy", "reference", "backward")]
                whole = held.ms()
                rows.append([str(shape), f"{tokens:,}", order, calls, *parts, number(whole), ratio(whole, least)])
        head = ("policy ms", "reference ms", "backward ms", "step ms", "of precomputed")
        return markdown(("model", "tokens", "order", "operators ran", *head), rows)

    return by_machine(results.of(benchmark="dpo"), table)


TABLES = {"machines": machines, "layer": layer, "lora": lora, "step": step, "threads": threads, "dpo": dpo}
