"""Processes with a patched model that end in every way, each a fork of this one, which has imported all there is.

Run as `python -m tests.support.exit_scenarios FOLDER`. A fork goes on as a script of its own: it patches (the operators
start in it), runs its scenario with the names of `PRELUDE` as globals, and ends as any interpreter does. What it prints
goes to FOLDER/name.out and .err, how it ended to FOLDER/name.rc ("hang" where it had to be killed).
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch

from tests.support.cases import KERNEL_BF16 as KERNEL_BF16
from tests.support.helpers import MIXTRAL as MIXTRAL
from tests.support.patched import adapted_model as adapted_model
from tests.support.patched import loss_of as loss_of

PATIENCE = 60  # seconds
PRELUDE = """
import atexit, gc, logging, os, sys, threading
out = sys.stdout
model = adapted_model(MIXTRAL, KERNEL_BF16, seed=1)
assert model._kt_wrappers[0].backend_name == "AMXBF16"
loss_of(model, MIXTRAL.inputs()).backward()
print("trained")
"""
SCENARIOS = {
    "end": "",
    "global model and open graph": "loss = loss_of(model, MIXTRAL.inputs())",
    "exception": "raise ValueError('on purpose')",
    "sys.exit": "sys.exit(3)",
    "sys.exit with words": "sys.exit('told')",
    "model deleted": "del model\ngc.collect()\nprint('deleted')",
    "model in a cycle": (
        "class Holder: pass\nholder = Holder()\nholder.itself, holder.model = holder, model\ndel model, holder"
    ),
    # A shell's job in the background begins with the signal ignored.
    "interrupted": "signal.signal(2, signal.default_int_handler)\nos.kill(os.getpid(), 2)",
    "printed at exit": (
        "atexit.register(lambda: (print('late'), print('to the old', file=out), os.write(1, b'raw\\n')))\n"
        "logging.basicConfig(stream=out, format='%(message)s')\natexit.register(logging.warning, 'logged')"
    ),
    "printed by a finalizer": (
        "class Last:\n    def __del__(self): print('finalizer', self.model is not None)\n"
        "last = Last()\nlast.model = model"
    ),
    "model used at exit": "atexit.register(lambda: print('loss', bool(loss_of(model, MIXTRAL.inputs()) > 0)))",
    "model deleted at exit": "def drop():\n    global model\n    del model\n    gc.collect()\natexit.register(drop)",
    "without a newline": "print('half', end='')",
    "a thread that ends later": (
        "import time\nthreading.Thread(target=lambda: (time.sleep(0.2), loss_of(model, MIXTRAL.inputs()), "
        "print('thread'))).start()"
    ),
    "a fork that ends": (
        "child = os.fork()\nif not child:\n    print('child')\n    sys.exit()\nprint('waited', os.waitpid(child, 0)[1])"
    ),
    "a fork that deletes": (
        "child = os.fork()\nif not child:\n    del model\n    gc.collect()\n    os._exit(0)\n"
        "print('waited', os.waitpid(child, 0)[1])"
    ),
    "a fork that calls": (
        "child = os.fork()\nif not child:\n    try:\n        model(MIXTRAL.inputs())\n    except Exception as error:\n"
        "        print(type(error).__name__)\n    sys.exit()\nprint('waited', os.waitpid(child, 0)[1])"
    ),
    "a fork that patches": (
        "child = os.fork()\nif not child:\n    try:\n        adapted_model(MIXTRAL, KERNEL_BF16)\n"
        "    except Exception as error:\n        print(type(error).__name__)\n    sys.exit()\n"
        "print('waited', os.waitpid(child, 0)[1])"
    ),
    "a fork while a thread computes": (
        "from kt_hf.backends import CALL_LOCK\nheld, done = threading.Event(), threading.Event()\n"
        "def hold():\n    with CALL_LOCK:\n        held.set()\n        done.wait()\n"
        "threading.Thread(target=hold).start()\nheld.wait()\nchild = os.fork()\nif not child:\n    try:\n"
        "        model(MIXTRAL.inputs())\n    except Exception as error:\n        print(type(error).__name__)\n"
        "    sys.stdout.flush()\n    os._exit(0)\ndone.set()\nprint('waited', os.waitpid(child, 0)[1])"
    ),
}


def wait(child: int) -> str:
    """The exit code of a child, -N for a signal; "hang" if it had to be killed."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return str(os.waitstatus_to_exitcode(status))
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "hang"


if __name__ == "__main__":
    torch.set_num_threads(1)
    _folder, _name = Path(sys.argv[1]), None
    for _number, _candidate in enumerate(SCENARIOS):
        sys.stdout.flush()
        _child = os.fork()
        if _child == 0:
            _name = _candidate
            for _descriptor, _ending in ((1, "out"), (2, "err")):
                _file = os.open(_folder / f"{_number}.{_ending}", os.O_WRONLY | os.O_CREAT)
                os.dup2(_file, _descriptor)
                os.close(_file)
            break
        (_folder / f"{_number}.rc").write_text(wait(_child))
    if _name is not None:
        exec(compile(PRELUDE + SCENARIOS[_name], "scenario", "exec"))  # with the globals of this script
