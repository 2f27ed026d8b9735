"""How PEFT decides by a module's name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def of_pattern(pattern: Mapping[str, Any] | None, name: str, otherwise: Any) -> Any:
    """A module's value in `rank_pattern` or `alpha_pattern`, or the config's own value."""
    from peft.utils.other import get_pattern_key

    pattern = pattern or {}
    return pattern.get(get_pattern_key(pattern.keys(), name), otherwise)


def targets(config: Any, name: str) -> bool:
    """Whether a `LoraConfig` adapts the module of this name."""
    from peft.tuners.tuners_utils import check_target_module_exists

    return bool(check_target_module_exists(config, name))
