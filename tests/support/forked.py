"""Scripts that may end their process, each in a fork of one that has imported the heavy libraries."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

PATIENCE = 120.0  # seconds until a script is killed


@dataclass
class Ended:
    """How a script ended.

    Attributes:
        code: Its exit code, -N for signal N; None if it was killed for not ending.
        out: Its standard output.
        err: Its standard error.
    """

    code: int | None
    out: str
    err: str


def forked(prelude: str, scripts: dict[str, str], folder: Path) -> dict[str, Ended]:
    """Run the prelude once, then each script with its names in a process of its own.

    Args:
        prelude: Must start no threads, which a fork would not have.
        scripts: Python by name.
        folder: For what they print.
    """
    (folder / "scripts.json").write_text(json.dumps([prelude, scripts]))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.support.forked", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    codes = json.loads((folder / "codes.json").read_text())
    texts = [[(folder / f"{n}.{kind}").read_text() for kind in ("out", "err")] for n in range(len(scripts))]
    return {name: Ended(codes[n], *texts[n]) for n, name in enumerate(scripts)}


def _fork(script: str, names: dict[str, object], files: list[Path]) -> int:
    child = os.fork()
    if child:
        return child
    for descriptor, file in enumerate(files, start=1):
        opened = os.open(file, os.O_WRONLY | os.O_CREAT)
        os.dup2(opened, descriptor)
        os.close(opened)
    code = 1
    try:
        exec(compile(script, "script", "exec"), names)
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _wait(child: int) -> int | None:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return None


if __name__ == "__main__":
    _folder = Path(sys.argv[1])
    _prelude, _scripts = json.loads((_folder / "scripts.json").read_text())
    _names: dict[str, object] = {}
    exec(compile(_prelude, "prelude", "exec"), _names)
    _codes = []
    for _n, _script in enumerate(_scripts.values()):
        sys.stdout.flush()
        _files = [_folder / f"{_n}.{_kind}" for _kind in ("out", "err")]
        _codes.append(_wait(_fork(_script, dict(_names), _files)))
    (_folder / "codes.json").write_text(json.dumps(_codes))
