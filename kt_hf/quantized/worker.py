"""Quantizes some layers in a process of its own and prints what it has written, a line of JSON a layer.

kt-kernel 0.7.2 never frees the packed weights of the forward. Only the end of a process gives them back, so a long
checkpoint takes several, one after the other.

python -m kt_hf.quantized.worker '{"folder": ..., "out": ..., "layers": [...], ...}'
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import KTAMXError
from ..system.child import last_line
from ..system.json_fields import Field
from .manifest import Fingerprint, LayerEntry, read_layer

_LINE = "kt_hf: "  # before each answer, for a library may print too


@dataclass(frozen=True)
class Job:
    """Which layers one process quantizes, and how.

    Attributes:
        folder: The checkpoint.
        trust_remote_code: As transformers has it.
        out: Where the layers' folders are made.
        layers: Names of experts modules -> their folders' names.
        backend: AMXInt8 or AMXInt4.
        pools: (node, threads) of each pool.
        backward: With the weights for backward.
    """

    folder: str
    trust_remote_code: bool
    out: str
    layers: dict[str, str]
    backend: str
    pools: list[tuple[int, int]]
    backward: bool


def in_new_process(job: Job) -> Iterator[tuple[str, LayerEntry]]:
    """Have a job done by another process.

    Yields:
        Name and files of each layer, once they are written.

    Raises:
        KTAMXError, OSError: As in the process, or it ended without an answer.
    """
    command = [sys.executable, "-m", "kt_hf.quantized.worker", json.dumps(asdict(job))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        # Read all the time: a full pipe would stop the process.
        with ThreadPoolExecutor(1) as reader:
            errors = reader.submit(process.stderr.read)
            try:
                for line in process.stdout:
                    if line.startswith(_LINE):
                        yield _answer(json.loads(line.removeprefix(_LINE)))
            except BaseException:
                process.kill()
                raise
            if process.wait():
                raise KTAMXError(f"Quantizing ended with status {process.returncode}: {last_line(errors.result())}")


def _answer(answer: dict[str, Any]) -> tuple[str, LayerEntry]:
    if "error" in answer:
        raise (OSError if answer["system"] else KTAMXError)(answer["error"])
    return answer["name"], read_layer(Field(Path("the worker"), answer["name"], answer["layer"]))


def work(job: Job) -> Iterator[tuple[str, LayerEntry]]:
    """Quantize the layers in this process; the next one is read while one is packed.

    Yields:
        Name and files of each layer, once they are written.

    Raises:
        KTAMXError, OSError: The checkpoint is damaged, or the files cannot be written.
    """
    import torch
    from transformers import AutoConfig

    from ..backends import quantize_layer
    from ..checkpoint.expert_index import ExpertCheckpoint
    from ..checkpoint.fingerprint import fingerprints_of_weights
    from ..checkpoint.read_ahead import read_ahead
    from ..system.cpu import ThreadPlan
    from ..system.memory import return_freed_memory

    config = AutoConfig.from_pretrained(job.folder, trust_remote_code=job.trust_remote_code)
    checkpoint = ExpertCheckpoint(job.folder, config, job.trust_remote_code)
    plan, names = ThreadPlan(tuple((node, threads) for node, threads in job.pools)), list(job.layers)
    with closing(read_ahead(names, lambda name: checkpoint.read(name, torch.bfloat16))) as stream:
        for name in names:
            weights, shape = next(stream), checkpoint.shapes[name]
            folder, source = Path(job.out) / job.layers[name], fingerprints_of_weights(weights)
            quantize_layer(job.backend, weights, shape, plan, folder, job.backward, name)
            del weights
            return_freed_memory()
            yield name, _entry(folder, [shape.num_experts, shape.hidden_size, shape.intermediate_size], source)


def _entry(folder: Path, shape: list[int], source: dict[str, Fingerprint]) -> LayerEntry:
    """What the manifest says of a layer whose files are in `folder`."""
    from .folder import checksums

    sizes = {file.relative_to(folder).as_posix(): file.stat().st_size for file in sorted(folder.rglob("*.kt"))}
    sums = checksums(folder, sizes)
    return LayerEntry(folder.name, shape, source, {file: (size, sums[file]) for file, size in sizes.items()})


def main(text: str) -> None:
    """Do a job, and print its answers or its error, a line of JSON each.

    Args:
        text: The fields of a `Job` as JSON.
    """
    import torch

    torch.set_num_threads(1)  # the operators' threads need the cores
    try:
        for name, layer in work(Job(**json.loads(text))):
            print(_LINE + json.dumps({"name": name, "layer": asdict(layer)}), flush=True)
    except (KTAMXError, OSError) as error:
        print(_LINE + json.dumps({"error": str(error), "system": isinstance(error, OSError)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
