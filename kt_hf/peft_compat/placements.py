"""Which experts an adapter was trained with on the GPU, and what becomes of that where it is loaded."""

from __future__ import annotations

import logging
from pathlib import Path

from torch import nn

from ..experts.layer import kt_layers
from ..placement import packer_of, read_placement
from ..placement.tiers import Tiers

logger = logging.getLogger(__name__)


def follow_placement(model: nn.Module, folder: str | Path) -> None:
    """Take over the placement of an adapter that is about to be loaded.

    A model that is packed, or has a placement, keeps its own, and a difference is logged.

    Args:
        model: Patched or not.
        folder: Of the adapter.

    Raises:
        KTAMXConfigError: The placement is another model's.
    """
    packer = packer_of(model)
    if packer is None or not (packer.tiers or Tiers()).on_gpu or not Path(folder).is_dir():
        return
    placement = read_placement(folder)
    if placement is None or (packer.placement is not None and placement.order == packer.placement.order):
        return
    layers = kt_layers(model)
    if packer.placement is None and not any(layer.packed for layer in layers):
        for layer in layers:  # refused before the first is packed
            placement.check(layer.layer_idx, layer.shape.num_experts)
        packer.placement = placement
        logger.info("kt_hf: experts on the GPU as in %s, by %s.", folder, placement.source)
        return
    logger.warning(
        "%s was trained with other experts on the GPU: it gives the same results within rounding. "
        "apply_kt_moe(model, cfg, placement=%r) would place them as they were.", folder, str(folder),
    )  # fmt: skip
