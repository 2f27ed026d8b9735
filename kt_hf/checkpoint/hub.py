"""Where the files of a checkpoint are: a folder, or a model of the hub that is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import KTAMXConfigError
from .tensor_files import INDEX, SINGLE, read_index


def checkpoint_folder(path_or_name: str | Path, **hub: Any) -> Path:
    """The folder of a local checkpoint, or that of a model of the hub, downloaded if it is not in the cache.

    Args:
        path_or_name: A folder, or a name of the hub.
        **hub: revision, cache_dir, token and the like, as from_pretrained takes them.

    Raises:
        KTAMXConfigError: There is no such model, or none saved as safetensors.
    """
    name = str(path_or_name)
    if Path(name).is_dir():
        return Path(name) / (hub.get("subfolder") or "")
    from transformers.utils.hub import cached_file, cached_files

    try:
        try:
            return Path(str(cached_file(name, SINGLE, **hub))).parent
        except OSError:
            index = Path(str(cached_file(name, INDEX, **hub)))
        shards = sorted(set(read_index(index.parent).values()))
        cached_files(name, shards, **hub)
    except (OSError, ValueError, KeyError) as error:
        problem = " ".join(str(error).split())
        raise KTAMXConfigError(
            f"{name!r} is neither a folder nor a model of the hub with safetensors files: {problem}"
        ) from error
    return index.parent
