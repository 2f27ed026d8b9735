"""Pictures of a run: the losses, and the load of the experts."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Points = list[tuple[int, float]]


def loss_points(log_history: Iterable[Mapping[str, Any]]) -> tuple[Points, Points]:
    """(training, held-out) losses as (step, loss), out of `trainer.state.log_history`; both ordered by step."""
    rows = list(log_history)
    train = [(int(row["step"]), float(row["loss"])) for row in rows if "loss" in row]
    held_out = {int(row["step"]): float(row["eval_loss"]) for row in rows if "eval_loss" in row}
    return sorted(train), sorted(held_out.items())


def series(log_history: Iterable[Mapping[str, Any]], key: str) -> Points:
    """(step, value) of one logged key, ordered by step."""
    return sorted((int(row["step"]), float(row[key])) for row in log_history if key in row)


def curves_svg(curves: Mapping[str, Points], label: str) -> str:
    """Curves over the steps as an inline SVG; "" if there is nothing to draw.

    Args:
        curves: Name -> points. Curves differ in line and marker, not in colour alone.
        label: Of the vertical axis.
    """
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return ""
    figure, axes = _axes((7.2, 3.0))
    styles = zip(("-", "--", ":"), ("#222222", "#c8502d", "#46628c"), ("", "o", "s"), strict=True)
    for (name, points), (line, color, marker) in zip(curves.items(), styles, strict=False):
        axes.plot(*zip(*points, strict=True), linestyle=line, color=color, marker=marker, label=name, markersize=4)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(curves) > 1:
        axes.legend(frameon=False)
    return _svg(figure)


def expert_load_svg(shares: Mapping[int, Sequence[float]]) -> str:
    """The heat map of `plot_expert_load` in shades of grey, as an inline SVG."""
    figure, axes = _axes((7.2, 3.6))
    width = max(map(len, shares.values()))
    rows = [[*row, *[float("nan")] * (width - len(row))] for row in shares.values()]
    image = axes.imshow(rows, aspect="auto", cmap="Greys", vmin=0, interpolation="nearest")
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    step = max(1, -(-len(rows) // 16))
    axes.set_yticks(range(0, len(rows), step), labels=[str(layer) for layer in list(shares)[::step]])
    figure.colorbar(image, label="load (1 = even)")
    return _svg(figure)


def _axes(size: tuple[float, float]) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, axes


def _svg(figure: Any) -> str:
    """A figure as an `svg` element, without the XML's head, which names a file on the network."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def plot_losses(log_history: Iterable[Mapping[str, Any]], path: Path, title: str = "") -> Path:
    """Draw the losses of `trainer.state.log_history` into the PNG `path` and return it.

    Raises:
        ValueError: There is no loss to draw.
    """
    # The object interface: no global state, no window, whatever backend the user has chosen.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    train, held_out = loss_points(log_history)
    if not train and not held_out:
        raise ValueError("The log has no losses to draw")
    figure = Figure(figsize=(7.2, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if train:
        axes.plot(*zip(*train, strict=True), color="#8aa4c8", linewidth=1.6, label="training batch")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color="#c8502d", linewidth=2, marker="o", label="held out")
        for step, loss in (held_out[0], held_out[-1]):
            axes.annotate(f"{loss:.2f}", (step, loss), textcoords="offset points", xytext=(0, 9), ha="center")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.12)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def plot_expert_load(shares: Mapping[int, Sequence[float]], path: Path, title: str = "") -> Path:
    """Draw how the tokens were spread over each layer's experts into the PNG `path`, and return it.

    Args:
        shares: Layer -> each expert's load; 1 is even.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    width = max(map(len, shares.values()))
    # Layers may have different counts.
    rows = [[*row, *[float("nan")] * (width - len(row))] for row in shares.values()]
    figure = Figure(figsize=(7.2, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(rows, aspect="auto", cmap="magma", vmin=0, interpolation="nearest")
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    layers = list(shares)
    step = max(1, -(-len(layers) // 16))
    axes.set_yticks(range(0, len(layers), step), labels=[str(layer) for layer in layers[::step]])
    axes.set_title(title)
    figure.colorbar(image, label="load (1 = even)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
