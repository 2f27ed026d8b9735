"""`kt-hf quantize`: a folder is written whole or not at all, and what cannot be is refused before work starts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from typer.testing import CliRunner

from kt_hf import KTAMXConfigError, KTAMXError, apply_kt_moe
from kt_hf.cli import app
from kt_hf.quantized import MANIFEST, bytes_on_disk, open_saved, worker, write
from kt_hf.shapes import ExpertShape
from kt_hf.tools import quantize as command
from tests.support.cases import KERNEL_MARKS
from tests.support.low_bit import wide
from tests.support.models import FAMILIES
from tests.support.quantized_folders import quantised, save_checkpoint, settings
from tests.support.tiny import ROOT, trained
from tests.support.tiny import save_model as save_trainable

pytestmark = list(KERNEL_MARKS)
FAMILY = wide()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model") / "wide", FAMILY)


def untouched(folder: Path) -> bool:
    """Nothing but the test's own files is in the folder."""
    return {path.name for path in folder.iterdir()} <= {"out", "mine"}


def test_command_writes_a_folder_and_train_uses_it(tmp_path: Path) -> None:
    model, out = save_trainable(tmp_path / "model"), tmp_path / "int8"
    result = CliRunner().invoke(app, ["quantize", str(model), str(out), "--no-backward"])
    assert result.exit_code == 0, result.output
    assert f"Written: {out}" in result.stdout
    assert f"kt_weight_path: {out}" in result.stdout
    assert not open_saved(out).backward
    rows = [{"instruction": "2+2?", "output": "four"}] * 4
    summary, _ = trained(tmp_path, model, rows, "kt_backend=AMXInt8", f"kt_weight_path={out}", "lora_rank=4")
    online, _ = trained(tmp_path, model, rows, "kt_backend=AMXInt8", "kt_share_backward_weights=true", "lora_rank=4",
                        f"output_dir={tmp_path / 'out2'}")  # fmt: skip
    assert summary["loss"] == online["loss"], (summary, online)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--to", "int2"], "--to=int2: it must be int4 or int8"),
        (
            ["--to", "AMXInt4"],
            "kt_backend=AMXInt4: the hidden size 64 is not a multiple of 128. kt_backend=AMXBF16 and",
        ),
        (["--pools", "2"], "64 does not split into 2 pools of multiples of 64"),
        (["somewhere"], "neither a folder nor a model of the hub"),
    ],
)
def test_command_refuses_in_words(arguments: list[str], words: str, tmp_path: Path, monkeypatch: Any) -> None:
    model = str(save_trainable(tmp_path / "model"))
    if arguments[0] == "somewhere":
        model, arguments = arguments[0], []
    result = CliRunner().invoke(app, ["quantize", model, str(tmp_path / "saved"), *arguments])
    assert result.exit_code == 2
    assert words in result.output
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


@pytest.mark.parametrize("kind", ["folder", "file", "partial"])
def test_what_is_there_is_kept(kind: str, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    mine = out / "mine" if kind == "folder" else out if kind == "file" else tmp_path / "out.partial" / "mine"
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    with pytest.raises(KTAMXConfigError, match=r"out(\.partial)? is there"):
        quantised(checkpoint, out)
    assert mine.read_text() == "mine"


def test_an_empty_folder_and_folders_that_are_not_there_will_do(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "not" / "there"):
        assert (quantised(checkpoint, out) / MANIFEST).is_file()
        assert [path.name for path in out.parent.iterdir() if path.name.endswith(".partial")] == []


def test_space_is_looked_for_first(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(write.shutil, "disk_usage", lambda path: usage(2**40, 2**40, 2**20))
    with pytest.raises(KTAMXConfigError, match=r"out needs 0\.0 GiB, and .* has 0\.0 GiB free. --no-backward"):
        quantised(checkpoint, tmp_path / "out")
    assert untouched(tmp_path)


@pytest.mark.parametrize("to", ["int8", "int4"])
@pytest.mark.parametrize("backward", [True, False])
def test_the_space_reckoned_is_what_is_used(to: str, backward: bool, checkpoint: Path, tmp_path: Path) -> None:
    out = quantised(checkpoint, tmp_path / "out", to, backward=backward)
    files = [file.stat().st_size for file in out.rglob("*.kt")]
    blocks = sum(-(-size // 4096) * 4096 for size in files)
    shape = ExpertShape(8, 2, 128, 128)
    reckoned = 2 * bytes_on_disk(shape, {"int8": "AMXInt8", "int4": "AMXInt4"}[to], 1, backward)
    assert blocks <= reckoned
    assert reckoned - sum(files) == 4096 * len(files)


@pytest.fixture
def a_process_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "_batches", lambda c, b: [{layer: f"layer_{i}"} for i, layer in enumerate(c.layers)])


def stopped(bytes_read: int) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("processes", [False, True])
def test_an_interrupted_run_leaves_nothing(
    processes: bool, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: Any
) -> None:
    """After its first layer; and its process ends."""
    if processes:
        request.getfixturevalue("a_process_a_layer")
    monkeypatch.setattr(command.LayersBar, "advance", lambda bar, size: stopped(size))
    with pytest.raises(KeyboardInterrupt):
        quantised(checkpoint, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    commands = [child.cmdline() for child in psutil.Process().children()]
    assert not any("kt_hf.quantized.worker" in command for command in commands)


@pytest.mark.usefixtures("a_process_a_layer")
@pytest.mark.parametrize("ends", ["os._exit(3)", "raise SystemExit('out of order')"])
def test_a_process_that_fails_is_told(
    ends: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = subprocess.Popen
    monkeypatch.setattr(
        worker.subprocess, "Popen", lambda line, **k: start([line[0], "-c", f"import os; {ends}"], **k)
    )  # fmt: skip
    with pytest.raises(KTAMXError, match=r"ended with status (3|1): (no message|out of order)"):
        quantised(checkpoint, tmp_path / "out")
    assert untouched(tmp_path)


def test_several_processes_write_what_one_writes(checkpoint: Path, tmp_path: Path, request: Any) -> None:
    """kt-kernel keeps a copy of each layer it has packed, until the process ends: a large model takes several."""
    one = quantised(checkpoint, tmp_path / "one")
    request.getfixturevalue("a_process_a_layer")
    several = quantised(checkpoint, tmp_path / "several")
    assert not {name for name in os.listdir(several) if name != MANIFEST} & set(os.listdir(one))
    assert [layer.files for layer in open_saved(several).manifest.layers.values()] == [
        layer.files for layer in open_saved(one).manifest.layers.values()
    ]


@pytest.mark.parametrize(
    ("backend", "layers", "sizes"), [("AMXInt8", 61, [3] * 20 + [1]), ("AMXInt4", 61, [5] * 12 + [1])]
)
def test_layers_of_a_process(backend: str, layers: int, sizes: list[int]) -> None:
    """DeepSeek-V3's are 22.5 GB each in bf16: a process keeps no more than about one of them."""
    names = [f"model.layers.{i}.mlp.experts" for i in range(layers)]
    shapes = dict.fromkeys(names, ExpertShape(256, 8, 7168, 2048))
    found = write._batches(SimpleNamespace(layers=names, shapes=shapes), backend)
    assert [len(some) for some in found] == sizes
    assert [name for some in found for name in some] == names
    assert len({folder for some in found for folder in some.values()}) == layers


FULL = """
import resource, sys
from kt_hf.tools.quantize import run
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    run(sys.argv[1], sys.argv[2], "AMXInt8")
except OSError as error:
    print("TOLD", error)
"""


def test_a_disk_that_fills_up_is_noticed(checkpoint: Path, tmp_path: Path) -> None:
    """The operators write on without a word. A limit on the size of files stands for the disk's."""
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(checkpoint), str(tmp_path / "out")],
        capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert "TOLD" in done.stdout, done.stderr[-1000:]
    assert "could not be written whole" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_dtypes_are_rounded_to_bf16_first(dtype: torch.dtype, checkpoint: Path, tmp_path: Path) -> None:
    """The values of the checkpoints are equal, so are the files."""
    source = save_checkpoint(tmp_path / "model", FAMILY, dtype)
    a, b = (open_saved(quantised(m, tmp_path / n)) for m, n in ((checkpoint, "a"), (source, "b")))
    for name, layer in a.manifest.layers.items():
        assert layer.files == b.manifest.layers[name].files


def test_other_pools_than_the_process_has_are_refused(tmp_path: Path) -> None:
    """A process has one set of pools, and the files would be for those."""
    family = wide(inner=256)
    source = save_checkpoint(tmp_path / "mine", family)
    alive = apply_kt_moe(family(torch.bfloat16), settings())
    with pytest.raises(KTAMXConfigError, match=r"on 1 pools of threads already, and the weights are to be saved for 2"):
        quantised(source, tmp_path / "out", pools=2)
    assert untouched(tmp_path)
    del alive


def test_sizes_that_cannot_be_are_refused(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "mine", FAMILIES["mixtral"])
    with pytest.raises(KTAMXConfigError, match="intermediate size 96 is not a multiple of 64"):
        quantised(source, tmp_path / "out")
    assert untouched(tmp_path)
    shutil.rmtree(source)
