"""Which experts are computed on the GPU: the most used of each layer, by a profile of the data, kept with the adapter.

    counts = count_experts(model, batches)                      # of the unpatched model, or of the patched one
    apply_kt_moe(model, KTConfig(kt_num_gpu_experts=16), placement=counts)
    apply_kt_moe(model, KTConfig(kt_num_gpu_experts=16), placement="out/checkpoint-100")    # the same again

A placement changes where an expert is computed and nothing else: adapters are the same whatever it was.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import KTAMXConfigError, KTAMXError
from ..ranks import Ranks, of_all_ranks
from ..system.files import as_path
from ..system.json_fields import Field, read_json
from .tiers import Tiers

logger = logging.getLogger(__name__)
PLACEMENT = "kt_placement.json"
"""The file beside an adapter with the order of its experts and the numbers of its tiers."""
_VERSION = 1


@dataclass(frozen=True)
class Placement:
    """The experts of each layer in the order in which they go to the GPU.

    The first ones are resident on the GPU, the next ones streamed to it, and the CPU computes the others. How many go
    where is not said here, but by `kt_num_gpu_experts` or `kt_expert_placement`.

    Attributes:
        order: Layer index -> ids of all its experts, the most used first.
        source: Where the order comes from, in words.
        share: Share of the routers' choices that the first expert of the order gets, the second and so on, the mean
            over layers; () if unknown.
    """

    order: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    source: str = ""
    share: tuple[float, ...] = ()

    @classmethod
    def by_use(cls, counts: Mapping[int, Tensor]) -> Placement:
        """A placement by how often each expert is used; of equals, the lower id goes first.

        Args:
            counts: Layer index -> [E] tokens of each expert, as `count_experts` gives them.
        """
        order = {
            int(layer): tuple(torch.as_tensor(c).cpu().double().argsort(descending=True, stable=True).tolist())
            for layer, c in counts.items()
        }
        choices = sum(int(torch.as_tensor(c).sum()) for c in counts.values())
        return cls(order, f"a profile of {choices} choices of the routers", _share(counts))

    def check(self, layer: int, total: int) -> None:
        """Refuse this placement for a model whose layer has other experts.

        Args:
            layer: Index of the layer.
            total: Experts of the model's layer.

        Raises:
            KTAMXConfigError: The placement is another model's.
        """
        order = self.order.get(layer)
        if order is None or sorted(order) != list(range(total)):
            content = f"{len(order)} experts for layer {layer}" if order else f"nothing for layer {layer}"
            raise KTAMXConfigError(
                f"placement: it has {content}, the model has {total} there. Is it another model's? Leave it out."
            )


def _share(counts: Mapping[int, Tensor]) -> tuple[float, ...]:
    sorted_ = [torch.as_tensor(c).cpu().double().sort(descending=True).values for c in counts.values()]
    sorted_ = [c / c.sum() for c in sorted_ if c.sum() > 0]
    if not sorted_ or len({len(c) for c in sorted_}) != 1:
        return ()
    return tuple(torch.stack(sorted_).mean(0).tolist())


def as_placement(given: Placement | Mapping[int, Tensor] | str | Path | None) -> Placement | None:
    """A placement from what a user may give.

    Args:
        given: A `Placement`, which is returned; counts, as `count_experts` gives them; the folder of an adapter that
            has one; or None.

    Returns:
        The placement; None for None.

    Raises:
        KTAMXConfigError: The folder has none, or the counts are none.
    """
    if given is None or isinstance(given, Placement):
        return given
    if isinstance(given, Mapping):
        _check_counts(given)
        return Placement.by_use(given)
    placement = read_placement(as_path(given, "placement"))
    if placement is None:
        raise KTAMXConfigError(
            f"placement={str(given)!r}: there is no {PLACEMENT}. Give the folder of an adapter that was trained with "
            "experts on the GPU, or leave it out."
        )
    return placement


def placement_of_first(ranks: Ranks | None, given: Placement | None) -> Placement | None:
    """The placement that rank 0 was given, on every rank: experts go to GPUs in one order.

    Args:
        ranks: The processes, which call this together; None in a run of one.
        given: On this rank.

    Raises:
        KTAMXError: Another rank has failed, or has ended.
    """
    if ranks is None:
        return given
    content: Any = None if given is None or ranks.rank else [list(given.order.items()), given.source, given.share]
    first: Any = of_all_ranks(ranks, lambda: content)[0]
    if first is None:
        return None
    order, source, share = first
    return Placement({layer: tuple(experts) for layer, experts in order}, source, tuple(share))


def _check_counts(counts: Mapping[Any, Any]) -> None:
    for layer, values in counts.items():
        try:
            good = int(layer) >= 0 and torch.as_tensor(values).dim() == 1
        except (TypeError, ValueError, RuntimeError):
            good = False
        if not good:
            raise KTAMXConfigError(
                f"placement: {str(layer)[:40]!r} -> a {type(values).__name__} is no layer's number with a count for "
                "each of its experts. Give what count_experts returns, or the folder of an adapter."
            )


def read_placement(folder: str | Path) -> Placement | None:
    """The placement saved in an adapter's folder; None if there is none.

    Args:
        folder: The adapter's folder, or a checkpoint's that holds it.

    Raises:
        KTAMXConfigError: The file is damaged.
    """
    path = as_path(folder, "folder") / PLACEMENT
    if not path.exists() and not path.is_symlink():
        return None
    try:
        content = read_json(path).object()
        if content["format_version"].value != _VERSION:
            content["format_version"].refuse(f"is not {_VERSION}, which this kt_hf reads")
        order = {_layer(experts): _order(experts) for _, experts in content["layers"].object().items()}
        share = content.get("share")
        shares = tuple(float(part.number()) for part in share.entries()) if share else ()
        return Placement(order, content["source"].text(), shares)
    except KTAMXError as error:
        raise KTAMXConfigError(f"{error} Delete the file, or save the adapter again: it cannot be read.") from error


def _layer(experts: Field) -> int:
    name = experts.name.rpartition(".")[2]
    if not re.fullmatch(r"\d{1,6}", name):
        experts.refuse(f"is said of {name[:20]!r}, which is no number of a layer")
    return int(name)


def _order(experts: Field) -> tuple[int, ...]:
    """All experts of a layer, each once."""
    ids = [expert.integer(least=0) for expert in experts.entries()]
    if sorted(ids) != list(range(len(ids))):
        experts.refuse("is not an order of all experts, each once")
    return tuple(ids)


def write_placement(folder: Path, placement: Placement | None, tiers: Tiers) -> bool:
    """Write a placement and the numbers of its tiers into an adapter's folder.

    Args:
        folder: Of the adapter.
        placement: Which experts go to the GPU first; None removes an older file.
        tiers: How many experts of each layer do.

    Returns:
        Whether there is a placement now.
    """
    path = folder / PLACEMENT
    if placement is None:
        path.unlink(missing_ok=True)
        return False
    content = {
        "writer": "kt_hf",
        "format_version": _VERSION,
        "source": placement.source,
        "resident": tiers.resident,
        "streamed": tiers.streamed,
        "share": [round(x, 6) for x in placement.share],
        "layers": {str(layer): list(experts) for layer, experts in sorted(placement.order.items())},
    }
    path.write_text(json.dumps(content) + "\n")
    return True
