"""Pictures of a run: the losses, and the load of the experts."""

from __future__ import annotations

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
