"""How long a start takes, as a ratio to `import torch`: `import kt_hf`, `kt-hf --help` and what follows them.

    python benchmarks/startup.py [--runs 5]

Each line is a process of its own, and they take turns; the least time of all runs is shown, on the clock and of the
processor (user and system): the latter says most on a busy machine. With --check the script ends with status 1 if, of
the processor, `import kt_hf` takes more than 1.2 times what `import torch` takes, or `kt-hf --help` more than half a
second.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

TORCH, IMPORT, HELP = "import torch", "import kt_hf", "kt-hf --help"
CASES = {
    "python": ["-c", "pass"],
    TORCH: ["-c", "import torch"],
    IMPORT: ["-c", "import kt_hf"],
    HELP: ["-m", "kt_hf.cli", "--help"],
    "kt-hf train --help": ["-m", "kt_hf.cli", "train", "--help"],
    "import peft": ["-c", "import peft"],
    "import kt_hf, peft": ["-c", "import kt_hf, peft"],
    "from kt_hf import apply_kt_moe": ["-c", "from kt_hf import apply_kt_moe"],
    "from kt_hf import *": ["-c", "from kt_hf import *"],
}
MOST_OF_TORCH, MOST_SECONDS = 1.2, 0.5


def seconds(arguments: list[str]) -> tuple[float, float]:
    """Of a process: on the clock, and of the processor."""
    start, before = time.perf_counter(), os.times()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - start, cpu


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    clock, cpu = dict.fromkeys(CASES, float("inf")), dict.fromkeys(CASES, float("inf"))
    for _ in range(options.runs):
        for name, arguments in CASES.items():
            clock[name], cpu[name] = map(min, (clock[name], cpu[name]), seconds(arguments))
    for name, value in cpu.items():
        print(f"{name:32} {clock[name]:6.2f} s, processor {value:6.2f} s  {value / cpu[TORCH]:5.2f} x import torch")
    slow = cpu[IMPORT] > MOST_OF_TORCH * cpu[TORCH] or cpu[HELP] > MOST_SECONDS
    return 1 if options.check and slow else 0


if __name__ == "__main__":
    sys.exit(main())
