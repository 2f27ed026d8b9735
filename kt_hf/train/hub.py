"""What can be known of a model without the hub, and whether the hub can be asked: in seconds, not in six retries."""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from ..builtin.known_models import known_config, known_models
from ..errors import KTAMXConfigError

_PATIENCE = 1.5  # s to look up the hub's address and connect to it


def sizes_of(name: str) -> Any:
    """The configuration that comes with kt_hf for a model of the hub, None if none does. For sizes alone."""
    from transformers import CONFIG_MAPPING

    content = None if Path(name).is_dir() else known_config(name)
    return CONFIG_MAPPING[content["model_type"]].from_dict(content) if content else None


def configuration_of(name: str, revision: str | None = None) -> str:
    """Where transformers is to read a model's configuration from: `name`, or its folder in the hub's cache.

    The cache is used where the hub cannot be reached, which transformers would try for a minute.

    Args:
        name: A folder, or a model's name on the hub.
        revision: Branch, tag or commit on the hub; None for main.

    Raises:
        KTAMXConfigError: There is no such folder, the cache does not have the model, and the hub cannot be reached.
    """
    if Path(name).exists() or reachable():
        return name
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:  # no name that the hub could have: transformers says so at once
        return name
    if isinstance(cached, str):
        return str(Path(cached).parent)
    raise KTAMXConfigError(
        f"model_name_or_path={name!r}: there is no such folder, the cache does not have the model, and {_host()[0]} "
        f"cannot be reached. Give the folder of a model. kt-hf estimate knows without a network: "
        f"{', '.join(known_models())}."
    )


def reachable() -> bool:
    """Whether the hub, or the proxy on the way to it, takes a connection within a second and a half."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    answers: list[bool] = []

    def connect() -> None:
        try:
            socket.create_connection(_host(), _PATIENCE).close()
            answers.append(True)
        except OSError:
            answers.append(False)

    # Looking up a name has no time limit of its own.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    return any(answers)


def _host() -> tuple[str, int]:
    from huggingface_hub import constants

    endpoint = urlsplit(constants.ENDPOINT)
    proxy = getproxies().get(endpoint.scheme)
    address = urlsplit(proxy if "://" in proxy else f"//{proxy}") if proxy else endpoint
    return address.hostname or "huggingface.co", address.port or (80 if address.scheme == "http" else 443)
