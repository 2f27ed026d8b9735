"""The blocks of a documentation page, and a folder in which they are run in turn, as by copy and paste."""

from __future__ import annotations

import re
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.support.tiny import ROOT, environment

DOCS = ROOT / "docs"
_BLOCK = re.compile(
    r"(?:^<!-- needs: (?P<needs>.*) -->\n)?"
    r"^```(?P<language>\w*)(?: title=\"(?P<title>[^\"]+)\")?[^\n]*\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
RUN = ("python", "bash")  # what has no title and one of these languages is run
NEEDS = ("a GPU", "two GPUs", "a network")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        language: Behind the fence.
        title: The file that a reader saves it as; "" for none.
        text: What is in it.
        needs: The hardware or network without which it cannot be run; "" for nothing.
    """

    language: str
    title: str
    text: str
    needs: str

    @property
    def runs(self) -> bool:
        return self.language in RUN and not self.title and not self.needs


def blocks(page: str) -> list[Block]:
    """The fenced blocks of `docs/PAGE.md`, in order."""
    text = (DOCS / f"{page}.md").read_text()
    return [
        Block(one["language"], one["title"] or "", one["text"], one["needs"] or "") for one in _BLOCK.finditer(text)
    ]


class Reader:
    """Somebody who saves the titled blocks of pages as files, and pastes the others into a terminal.

    Args:
        folder: Where; `configs` and `scripts` of the repository are in it, as in a clone.
        instead: What is written in the place of words of the pages: a tiny model for the hub's, say.
    """

    def __init__(self, folder: Path, instead: dict[str, str]) -> None:
        self.folder, self.instead = folder, instead
        programs = folder / ".programs"
        programs.mkdir()
        modules = {
            "python": "", "kt-hf": "-m kt_hf.cli", "torchrun": "-m torch.distributed.run --standalone", "pip": "-m pip",
            "accelerate": "-m accelerate.commands.accelerate_cli",
        }  # fmt: skip
        for name, module in modules.items():
            program = programs / name
            program.write_text(f'#!/bin/sh\nexec {sys.executable} {module} "$@"\n')
            program.chmod(program.stat().st_mode | stat.S_IXUSR)
        for name in ("configs", "scripts"):
            (folder / name).symlink_to(ROOT / name)
        env = environment(folder)
        self.environment = env | {"PATH": f"{programs}:{env['PATH']}", "CUDA_VISIBLE_DEVICES": ""}

    def follow(self, page: str) -> list[str]:
        """Do what a page says, and return what its commands printed. Fails with the first command that does."""
        printed = []
        for block in blocks(page):
            text = block.text
            for words, others in self.instead.items():
                text = text.replace(words, others)
            if block.title:
                (self.folder / block.title).write_text(text)
            elif block.runs:
                command = ["bash", "-e", "-c", text] if block.language == "bash" else ["python", "-c", text]
                done = subprocess.run(
                    command, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False,
                    timeout=3600,
                )  # fmt: skip
                assert done.returncode == 0, f"docs/{page}.md:\n{text}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
                printed.append(done.stdout)
        return printed
