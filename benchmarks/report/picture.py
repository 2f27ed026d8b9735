"""Plots as small PNG files: the same numbers give the same bytes with the same matplotlib."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib
from PIL import Image

matplotlib.use("Agg")
import matplotlib.pyplot as plt

__all__ = ["STYLE", "plt", "save"]
STYLE = {"font.size": 8, "axes.grid": True, "grid.alpha": 0.3}
COLORS = 128  # of a picture: more than lines, text and their edges need, and a third of the size


def save(figure: Any, path: Path, dpi: int = 90) -> None:
    """Write the figure to `path`, whose folder is made if it is missing, and close it."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi, metadata={"Software": None})
    plt.close(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.open(drawn).convert("RGB").quantize(COLORS, dither=Image.Dither.NONE).save(path, optimize=True)
