"""What a checkpoint records of where its run computed experts, so that a resume begins with it."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import KTAMXConfigError, KTAMXError
from ..ranks import of_all_ranks
from ..system.files import write_json
from ..system.json_fields import Field, read_json
from .packer import Packer
from .passes import Most, Seen, Taken
from .tiers import Tiers

logger = logging.getLogger(__name__)
RUN_PLACEMENT = "kt_run_placement.json"
_VERSION = 1


@dataclass(frozen=True)
class RunPlacement:
    """Where a run computed experts.

    Attributes:
        tiers: Experts by tier, as the run began.
        held: Indices of the layers whose weights had come to the GPU since.
        seen: What passes took, by kind; {} where layers stayed where they were.
        step: How the run's trainer computed its steps, by which what passes took is true.
        lora_layers: Layers whose experts' LoRA was on the GPU, the first ones; None if they had none.
    """

    tiers: Tiers
    held: tuple[int, ...]
    seen: dict[str, Seen]
    step: dict[str, Any]
    lora_layers: int | None = None


def write_run_placement(folder: Path, packer: Packer, step: Mapping[str, Any]) -> None:
    """Record in a checkpoint where its run computes experts.

    Args:
        folder: Of the checkpoint.
        packer: What built the model's backends.
        step: How the run's trainer computes its steps, in plain values.

    Raises:
        KTAMXError: The disk is full.
    """
    promotion = packer.promotion
    controller = promotion.controller if promotion else None
    content = {
        "writer": "kt_hf",
        "format_version": _VERSION,
        "tiers": asdict(packer.tiers or Tiers()),
        "held_layers": promotion.held if promotion else [],
        "seen": controller.as_json() if controller else {},
        "step": dict(step),
        "lora_layers_on_gpu": packer.lora.chosen.on_gpu if packer.lora.chosen else None,
    }
    write_json(folder / RUN_PLACEMENT, content)


def read_run_placement(folder: Path) -> RunPlacement | None:
    """The record of a checkpoint; None if it has none, as those of kt_hf 0.1.

    Raises:
        KTAMXConfigError: The file is damaged.
    """
    path = folder / RUN_PLACEMENT
    if not path.exists() and not path.is_symlink():
        return None
    try:
        content = read_json(path).object()
        if content["format_version"].value != _VERSION:
            content["format_version"].refuse(f"is not {_VERSION}, which this kt_hf reads")
        tiers = content["tiers"].object()
        numbers = {name.name: tiers[name.name].integer(least=0) for name in fields(Tiers)}
        held = tuple(layer.integer(least=0) for layer in content["held_layers"].entries())
        seen = {kind: _seen(values) for kind, values in content["seen"].object().items()}
        step, lora = content["step"].object(), content.get("lora_layers_on_gpu")
        plain = {name: field.value for name, field in step.items()}
        return RunPlacement(Tiers(**numbers), held, seen, plain, lora.integer(least=0) if lora else None)
    except KTAMXError as error:
        raise KTAMXConfigError(f"{error} Delete the file: the run then begins with all experts streamed.") from error


def _all_have(packer: Packer, recorded: RunPlacement | None, same: bool) -> bool:
    """Whether all ranks have the same record, and it is of a run like theirs."""
    digest = hashlib.sha256(repr(recorded).encode()).hexdigest() if same else ""
    every = of_all_ranks(packer.ranks, lambda: digest)
    return bool(digest) and len(set(every)) == 1


def _seen(values: Field) -> Seen:
    """What passes of a kind took."""
    given = values.object()
    since, passes, before = (given[name].integer(least=0) for name in ("since", "passes", "before"))
    streamed, held = (_taken(given[name]) for name in ("streamed", "held"))
    return Seen(since, passes, before, streamed, held, given["whole"].flag())


def _taken(values: Field) -> Taken:
    given = values.object()
    return Taken(*(_most(given[name].object()) for name in ("beyond", "cycle")))


def _most(given: Any) -> Most:
    tokens, gathered = given["tokens"].integer(least=0), given.get("gathered")  # which earlier records do not have
    return Most(tokens, given["size"].integer(least=0), gathered.integer(least=0) if gathered else tokens)


def begin_run(packer: Packer, step: Mapping[str, Any], fixed: bool) -> None:
    """Prepare a model's placement for a run of a trainer: it learns anew, or goes on as a checkpoint's run did.

    It goes on if steps are computed in the same way: what passes took is not true of others.

    Args:
        packer: What built the model's backends.
        step: How the trainer computes its steps, in plain values.
        fixed: Whether all experts stay streamed from now on.

    Raises:
        KTAMXConfigError: The checkpoint's record is damaged.
    """
    promotion = packer.promotion
    if promotion is None:
        return
    resumed = promotion.resumed
    recorded = read_run_placement(resumed) if resumed else None
    promotion.release()
    promotion.forget()
    promotion.fixed = fixed
    same = recorded is not None and recorded.tiers == packer.tiers and recorded.step == step and not fixed
    # A rank that cannot read the file learns anew, and so do all: what was learned is the same everywhere.
    if _all_have(packer, recorded, same) and recorded is not None:
        promotion.restore(list(recorded.held), recorded.seen)
        if recorded.held:
            held = promotion.held
            as_ = "as in" if held == sorted(recorded.held) else f"{len(recorded.held)} were in"
            logger.info("kt_hf: %d layers of experts are on the GPU, %s %s.", len(held), as_, resumed)
