"""A base checkpoint of low bits, as a merge sees it: the same files with its weights widened to bf16."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint.dense_rest import DenseRest, low_bit_matrix
from ..checkpoint.expert_names import expert_name, linear_name, of_activations
from ..checkpoint.expert_reader import Matrix, Wide, read_matrices
from ..checkpoint.quantization import quantization_of
from ..checkpoint.tensor_files import StoredTensor, TensorFiles
from ..discovery import FLOATING
from ..errors import KTAMXConfigError
from ..system.files import Lazy
from ..system.json_fields import read_json

logger = logging.getLogger(__name__)
Shards = Mapping[str, Mapping[str, Lazy]]


def widened(base: Path, shards: Shards) -> Shards | None:
    """The tensors of a base of low bits, widened to bf16 when they are read; each in the file of its first part.

    Args:
        base: Its folder.
        shards: File -> its tensors, as they are.

    Returns:
        File -> the tensors of a plain checkpoint; None if the base is one.

    Raises:
        KTAMXConfigError: Weights of low bits that are stored in a way that is not known, or stacked.
        KTAMXError: A part of one is missing or does not fit.
    """
    path = base / "config.json"
    if not path.is_file() or read_json(path).object().get("quantization_config") is None:
        return None
    from transformers import AutoConfig

    quantization, files = quantization_of(AutoConfig.from_pretrained(base)), TensorFiles(base)
    matrices = DenseRest(files, quantization).low_bit
    routed: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in files.tensors.items():
        known = expert_name(name)
        if known is not None and known.projection:
            if known.expert is None and tensor.dtype not in FLOATING:
                raise KTAMXConfigError(
                    f"base: {tensor} is a stack of experts of low bits, which is not merged. Merge into the model in "
                    "bfloat16."
                )
            routed.setdefault(name.removesuffix(f".{known.part}"), {})[known.part] = tensor
    for module, parts in routed.items():
        if set(parts) != {"weight"} or parts["weight"].dtype not in FLOATING:
            matrices[f"{module}.weight"] = low_bit_matrix(module, parts, quantization)
    used = {stored.name for matrix in matrices.values() for stored in matrix.parts.values()}
    found: dict[str, dict[str, Lazy]] = {
        shard: {name: tensor for name, tensor in content.items() if name not in used and not _spare(name)}
        for shard, content in shards.items()
    }
    for name, matrix in matrices.items():
        found[matrix.first.file.name][name] = _lazy(matrix)
    logger.warning(
        "%s: %d weights are of low bits (%s). They are widened, and the merged checkpoint is in bfloat16.",
        base, len(matrices), next(iter(matrices.values())).first.name if matrices else "none",
    )  # fmt: skip
    return found


def _spare(name: str) -> bool:
    """Whether a tensor says how activations are quantized."""
    linear = linear_name(name)
    return linear is not None and of_activations(linear[1])


def _lazy(matrix: Matrix) -> Lazy:
    def load() -> Tensor:
        out = torch.empty(matrix.shape, dtype=torch.bfloat16, device="cpu")
        read_matrices([(matrix, Wide(out))])
        return out

    return Lazy(torch.bfloat16, matrix.shape, load)
