"""Configurations of models of the hub that come with kt_hf: enough to count parameters and memory, not to load one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "model_configs"


def known_models() -> list[str]:
    """Names on the hub of the models whose configuration comes with kt_hf."""
    return sorted(str(path.relative_to(FOLDER).with_suffix("")) for path in FOLDER.glob("*/*.json"))


def known_config(name: str) -> dict[str, Any] | None:
    """The `config.json` of a model of the hub as far as sizes go, None if it does not come with kt_hf."""
    if name not in known_models():
        return None
    content: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return content
