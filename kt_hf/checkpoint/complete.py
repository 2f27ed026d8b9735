"""Whether a checkpoint's files hold every weight of the model, by their headers, before anything is loaded.

transformers fills a weight that is missing with random values and says so in a report only. Here its own loader is run
on tensors without memory (the meta device), with the names and shapes of the files' headers: what it would convert, tie
or leave out is decided by itself.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..discovery import skeleton
from ..errors import KTAMXError, KTAMXModelNotSupportedError
from .dense_rest import DenseRest
from .expert_index import ExpertCheckpoint
from .quantization import known_quantization, quantization_of, stored_config
from .tensor_files import INDEX, SINGLE, TensorFiles

_SHOWN = 3
_ROUTED = re.compile(r"\.experts\.")
# A score head is new where a language model becomes a reward model: training begins with random values there.
_NEW_HEAD = re.compile(r"^score\.weight$")
_ROUTED_OR_NEW = re.compile(rf"{_ROUTED.pattern}|{_NEW_HEAD.pattern}")


def check_complete(folder: Path, config: Any, trust_remote_code: bool = False) -> list[str]:
    """Check that a safetensors checkpoint has every weight of the model, in its shape.

    Args:
        folder: Of the checkpoint.
        config: The model's configuration.
        trust_remote_code: As transformers has it.

    Returns:
        Names of tensors that the model has no place for, sorted; parts of low-bit weights left out. Of a checkpoint
        quantized in another way only the files are checked.

    Raises:
        KTAMXError: A weight is missing and not tied to one that is there, or has another shape, or a file is missing or
            damaged; naming file and weight.
        KTAMXConfigError: The folder has no safetensors checkpoint.
    """
    files = TensorFiles(folder)
    if stored_config(config) is not None and not known_quantization(config):
        return []
    outline = skeleton(config, trust_remote_code)
    experts_checked = True
    try:  # it names an expert that is missing, where transformers' loader tells only that something is not converted
        ExpertCheckpoint(folder, config, model=outline).check_values(scales=False)
    except KTAMXModelNotSupportedError:
        experts_checked = False  # experts of another kind, which transformers alone may know how to load
    rest = DenseRest(files, quantization_of(config), outline._keys_to_ignore_on_load_unexpected or ())
    tensors = rest.outline()
    if not experts_checked:
        routed = {name: stored for name, stored in files.tensors.items() if _ROUTED.search(name)}
        tensors |= {name: torch.empty(s.shape, dtype=s.dtype, device="meta") for name, s in routed.items()}
    config = copy.deepcopy(outline.config)
    with _quiet() as report:
        try:
            _, info = type(outline).from_pretrained(
                None, config=config, state_dict=tensors, device_map="meta", dtype=torch.bfloat16,
                ignore_mismatched_sizes=True, output_loading_info=True,
            )  # fmt: skip
        except RuntimeError as error:
            text = report.getvalue().strip() or str(error)
            raise KTAMXError(f"{_where(files, folder)} cannot be loaded: {' '.join(text.split())[:600]}") from None
    mismatched = {entry[0]: entry[1:] for entry in info["mismatched_keys"]}
    if mismatched:
        name, shapes = next(iter(sorted(mismatched.items())))
        stored, expected = (list(shape) for shape in shapes)
        raise KTAMXError(
            f"{_where(files, folder)}: {name} has the shape {stored}, by the model's config it is {expected} "
            f"({len(mismatched)} weights differ). Are the weights and config.json of one model?"
        )
    read_apart = _NEW_HEAD if not experts_checked else _ROUTED_OR_NEW
    missing = sorted(name for name in info["missing_keys"] if not read_apart.search(name))
    if missing:
        shown = ", ".join(missing[:_SHOWN]) + (" …" if len(missing) > _SHOWN else "")
        raise KTAMXError(
            f"{_where(files, folder)} has no {shown} ({len(missing)} of the model's weights missing). Copy the "
            "checkpoint again: with random values in their place training would be worth nothing."
        )
    return sorted(info["unexpected_keys"])


def _where(files: TensorFiles, folder: Path) -> Path:
    """The file that says which weights there are."""
    return files.files[0] if len(files.files) == 1 else Path(folder) / (INDEX if len(files.files) > 1 else SINGLE)


@contextlib.contextmanager
def _quiet() -> Iterator[io.StringIO]:
    """Nothing of transformers' loading on the terminal; what its report says is kept."""
    kept = io.StringIO()
    handler = logging.StreamHandler(kept)
    logger = logging.getLogger("transformers")
    handlers, propagate, level = logger.handlers[:], logger.propagate, logger.level
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.WARNING)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield kept
    finally:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)
