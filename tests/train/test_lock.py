"""One run in an output folder at a time; a process that has died keeps nobody out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kt_hf.errors import KTAMXConfigError
from kt_hf.train.lock import LOCK, OutputLock
from tests.support.train_runs import forbid_loading, runs_in

HOLD = (
    "import sys; from pathlib import Path; from kt_hf.train.lock import OutputLock"
    "; lock = OutputLock(Path(sys.argv[1])); lock.take(); print('taken', flush=True); sys.stdin.read()"
)


def test_a_second_run_is_refused_until_the_first_is_dead(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = runs_in(tmp_path, tiny_model)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(runs.out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "taken\n"
        with monkeypatch.context() as patch:
            forbid_loading(patch)
            with pytest.raises(KTAMXConfigError, match=rf"another run is writing there \(process {holder.pid}\)"):
                runs.again()
        holder.kill()
        holder.wait()
        assert (runs.out / LOCK).exists()  # left behind, and held by nobody
        assert runs.again("max_steps=1", "save_strategy=no")["steps"] == 1
        assert not (runs.out / LOCK).exists()
    finally:
        holder.kill()
        holder.wait()


def test_the_lock_is_let_go_of(tmp_path: Path) -> None:
    first, second = OutputLock(tmp_path / "out"), OutputLock(tmp_path / "out")
    first.take(create=False)  # there is nothing to lock yet
    assert not (tmp_path / "out").exists()
    first.take()
    first.take()
    with pytest.raises(KTAMXConfigError, match="another run"):
        second.take()
    first.release()
    first.release()
    second.take()
    second.release()
    assert list((tmp_path / "out").iterdir()) == []


def test_a_file_that_was_removed_meanwhile_is_no_lock(tmp_path: Path) -> None:
    first, second = OutputLock(tmp_path), OutputLock(tmp_path)
    first.take()
    (tmp_path / LOCK).unlink()
    second.take()  # of the file that is there now
    assert (tmp_path / LOCK).exists()
    first.release()
    second.release()


def test_a_run_that_is_refused_makes_no_folder(tiny_model: Path, tmp_path: Path) -> None:
    runs = runs_in(tmp_path, tiny_model)
    with pytest.raises(KTAMXConfigError):
        runs.again("lora_target=nowhere")
    assert not runs.out.exists()
