"""Simulated /proc and /sys trees, and CPUs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from kt_hf.system.cpu import CpuFeatures


def write(root: Path, files: Mapping[str, object]) -> Path:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
    return root


def machine(root: Path, cores: Sequence[tuple[int, int]], nodes: Mapping[int, str] | None = None) -> Path:
    """A tree whose logical CPU i is of `cores[i]` = (package, core id), with `nodes` = node -> CPU list."""
    files: dict[str, object] = {}
    for cpu, (package, core) in enumerate(cores):
        topology = f"sys/devices/system/cpu/cpu{cpu}/topology"
        files[f"{topology}/physical_package_id"], files[f"{topology}/core_id"] = package, core
    for node, cpus in (nodes or {}).items():
        files[f"sys/devices/system/node/node{node}/cpulist"] = cpus
    return write(root, files)


EIGHT = [(0, core) for core in range(8)]
FOUR_SMT = [(0, core) for core in range(4)] * 2  # siblings i and i + 4
TWO_SOCKETS = [(package, core) for package in range(2) for core in range(4)]  # core ids repeat from socket to socket


def features(amx: bool = False, avx512_bf16: bool = False, avx2: bool = True) -> CpuFeatures:
    return CpuFeatures("Some CPU", amx, avx512_bf16, avx2)
