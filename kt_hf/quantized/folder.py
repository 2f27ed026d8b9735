"""Opening saved experts, and refusing those that do not fit the model or the run."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from ..backends import QUANTIZED, PackedLayerFiles, kernel_availability
from ..checkpoint.fingerprint import combined, fingerprint_of
from ..discovery import FLOATING
from ..errors import KTAMXConfigError, KTAMXError
from ..shapes import ExpertShape
from ..system.files import as_path, sha256
from .manifest import MANIFEST, Fingerprint, Manifest, read_manifest

logger = logging.getLogger(__name__)

# What PEFT puts before and into names.
_WRAPPER, _WRAPPED = "base_model.model.", ".base_layer"


class PrequantizedExperts:
    """A folder of saved experts whose manifest and file sizes have been checked (`open_saved`).

    Args:
        path: The folder.
        manifest: What it says of itself.

    Attributes:
        path: The folder.
        manifest: What it says of itself.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest

    @property
    def backward(self) -> bool:
        """Whether the weights for backward are there; without them layers must share a buffer for them."""
        return self.manifest.backward

    def check(
        self,
        shapes: Mapping[str, ExpertShape],
        backend: str,
        pools: int,
        share_backward: bool | None = None,
        model_type: str | None = None,
    ) -> None:
        """Refuse to load this folder for these layers.

        Args:
            shapes: Layer -> sizes, by the names of the experts modules.
            backend: `kt_backend` of the run.
            pools: Of the thread plan.
            share_backward: `kt_share_backward_weights`.
            model_type: Of the model's configuration.

        Raises:
            KTAMXConfigError: The folder is another model's, or made for other settings, naming what and the fix.
        """
        m = self.manifest
        if backend != m.backend:
            raise self._error(f"holds weights for {m.backend}, and kt_backend={backend}: set kt_backend={m.backend}")
        if pools != m.pools:
            fix = "set kt_tp_enabled=False" if m.pools == 1 else f"run on {m.pools} NUMA nodes, kt_tp_enabled=True"
            raise self._error(
                f"was written for {_count(m.pools, 'pool')} of threads, and this run has {pools}: {fix}, or quantise "
                f"again with --pools {pools}"
            )
        if share_backward is False and not m.backward:
            raise self._error(
                "has no backward weights, which kt_share_backward_weights=False needs: leave that out, or quantise "
                "again without --no-backward"
            )
        if model_type is not None and model_type != m.model_type:
            raise self._error(f"was made of a model of type {m.model_type} ({m.model}), and this one is {model_type}")
        names = {name.removeprefix(_WRAPPER): shape for name, shape in shapes.items()}
        for name in [*names, *m.layers]:
            if (name in names) != (name in m.layers):
                who = "the model has none of that name" if name in m.layers else "it is not in the folder"
                raise self._error(f"was made of another model ({m.model}): layer {name}, {who}")
        for name, shape in names.items():
            expected = [shape.num_experts, shape.hidden_size, shape.intermediate_size]
            if m.layers[name].shape != expected:
                raise self._error(
                    f"was made of another model ({m.model}): the experts of {name}, their hidden and their "
                    f"intermediate size are {m.layers[name].shape} there, {expected} in the model"
                )

    def check_model(self, model: Any) -> None:
        """Refuse a model whose weights are not those the folder was made of, as far as samples tell.

        Compares rows of tensors outside the experts, and of the experts' where the model has them in memory.

        Args:
            model: A transformers model, or a PeftModel around one.

        Raises:
            KTAMXConfigError: A tensor differs, by name.
        """
        m, compared = self.manifest, 0
        tensors = {n.removeprefix(_WRAPPER).replace(_WRAPPED, ""): t for n, t in model.named_parameters()}
        for name, expected in [*m.marks.items(), *self._source()]:
            tensor = tensors.get(name)
            if tensor is None or tensor.is_meta or tensor.dtype not in FLOATING or list(tensor.shape) != expected.shape:
                continue
            if tensor.dtype is torch.float16 and expected.dtype != "float16":
                continue  # rounded before it is rounded to bf16
            compared += 1
            if fingerprint_of(tensor).sha256 != expected.sha256:
                raise self._error(
                    f"was made of other weights ({m.model}): {name} differs from the model's. Quantise this model"
                )
        if not compared:
            logger.warning("kt_weight_path=%s: it cannot be told whether it was made of this model (of %s it was).",
                           self.path, m.model)  # fmt: skip

    def layer(self, name: str) -> PackedLayerFiles:
        """The packed weights of a layer, once its files are read and compared with their checksums.

        Args:
            name: Of the experts module.

        Raises:
            KTAMXError: A file has changed, by name.
        """
        entry = self.manifest.layers[name.removeprefix(_WRAPPER)]
        folder = self.path / entry.folder
        sums = checksums(folder, entry.files)
        for file, (_, expected) in entry.files.items():
            if sums[file] != expected:
                raise KTAMXError(f"kt_weight_path: {folder / file} is not what was written. Quantise again.")
        return PackedLayerFiles(folder, self.manifest.backward, combined(entry.source))

    def layer_bytes(self, name: str) -> int:
        """Bytes of a layer's files; `name` is that of the experts module."""
        return sum(size for size, _ in self.manifest.layers[name.removeprefix(_WRAPPER)].files.values())

    def _source(self) -> Iterable[tuple[str, Fingerprint]]:
        for name, layer in self.manifest.layers.items():
            for part, fingerprint in layer.source.items():
                yield f"{name}.{part}", fingerprint

    def _error(self, problem: str) -> KTAMXConfigError:
        return KTAMXConfigError(f"kt_weight_path={self.path} {problem}.")


def for_run(path: str | Path, backend: str, lora_rank: int | None) -> PrequantizedExperts:
    """Open the folder of `kt_weight_path`, once the settings that go with it are checked.

    Args:
        path: `kt_weight_path`.
        backend: `kt_backend`.
        lora_rank: `kt_lora_rank`.

    Raises:
        KTAMXConfigError: kt_backend cannot use saved weights, kt_lora_rank is not given, or as `open_saved`.
        KTAMXError: As `open_saved`.
    """
    if backend not in QUANTIZED:
        raise KTAMXConfigError(
            f"kt_weight_path={path} needs kt_backend={' or '.join(QUANTIZED)}, and kt_backend={backend}."
        )
    saved = open_saved(path)
    if lora_rank is None:
        raise KTAMXConfigError(
            f"kt_weight_path={path} needs kt_lora_rank, for saved experts are packed at once: set it to the adapter's "
            "rank (0 for inference)."
        )
    return saved


def open_saved(path: str | Path) -> PrequantizedExperts:
    """Open a folder that `kt-hf quantize` wrote, and check that its files are there, no others, and of their sizes.

    Args:
        path: The folder.

    Returns:
        The folder, of which nothing but the manifest is read yet.

    Raises:
        KTAMXConfigError: There is no such folder, or it is none of saved experts, or another kt-kernel's.
        KTAMXError: A file is missing, truncated or does not belong there, naming it.
    """
    path = as_path(path, "kt_weight_path")
    if not path.is_dir():
        raise KTAMXConfigError(f"kt_weight_path={path} is not a folder. `kt-hf quantize` writes one.")
    if not (path / MANIFEST).is_file():
        raise KTAMXConfigError(
            f"kt_weight_path={path} has no {MANIFEST}: it was not written by `kt-hf quantize`, or not to its end."
        )
    manifest = read_manifest(path / MANIFEST)
    version = kernel_availability().details.get("version")
    if version is not None and manifest.kt_kernel != version:
        raise KTAMXConfigError(
            f"kt_weight_path={path} was written by kt-kernel {manifest.kt_kernel}, and this is {version}: quantise "
            "again."
        )
    for layer in manifest.layers.values():
        _check_files(path / layer.folder, {file: size for file, (size, _) in layer.files.items()})
    return PrequantizedExperts(path, manifest)


def _check_files(folder: Path, expected: dict[str, int]) -> None:
    present = {f.relative_to(folder).as_posix(): f.stat().st_size for f in folder.rglob("*") if f.is_file()}
    for file, size in expected.items():
        if file not in present:
            raise KTAMXError(f"kt_weight_path: {folder / file} is missing. Quantise again.")
        if present[file] != size:
            raise KTAMXError(
                f"kt_weight_path: {folder / file} has {present[file]} bytes, {size} were written. Quantise again."
            )
    for file in present:
        if file not in expected and file.endswith(".kt"):  # then the others may be of two writings too
            raise KTAMXError(f"kt_weight_path: {folder / file} does not belong there: remove it.")


def checksums(folder: Path, files: Iterable[str]) -> dict[str, str]:
    """Checksums of files, several computed at a time.

    Args:
        folder: That holds them.
        files: Their paths, relative to `folder`.

    Returns:
        File -> sha256 of its contents, hexadecimal.
    """
    names = list(files)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(lambda name: sha256(folder / name), names), strict=True))


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
