"""`kt-hf doctor`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from .failures import FAILED, plain_failures


def main(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Say what this machine can do, and what to mend.

    Whether each backend computes right, what is wrong and how to mend it.

    Example: kt-hf doctor

    Started by torchrun it says, once, what each process has of the cores and the memory.

    Ends with a block of text for bug reports. The exit code is 0 when all is well, 1 when something is wrong.
    """
    with plain_failures():
        from ..tools import doctor

        findings = doctor.examine()
        if not findings:  # another of the processes that were started together tells it all
            return
        if as_json:
            typer.echo(json.dumps(doctor.as_json(findings), indent=2))
        else:
            show(findings)
        if not doctor.healthy(findings):
            raise typer.Exit(FAILED)


def show(findings: list[Any]) -> None:
    """Print a table of the `Finding`s, what to do about them, and the block for a bug report."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from ..tools import doctor

    console = Console(highlight=False)
    table = Table(box=None, show_header=False, padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    marks = {True: "[green]ok[/green]", False: "[red]wrong[/red]", None: ""}
    group = ""
    for finding in findings:
        shown = finding.group if finding.group != group else ""
        group = finding.group
        table.add_row(marks[finding.ok], shown, finding.name, escape(finding.value))
    console.print(table)
    wrong = [finding for finding in findings if finding.fix]
    if wrong:
        console.print("\nWhat to do:")
        for finding in wrong:
            console.print(f"  - {finding.group}, {finding.name}: {escape(finding.fix)}", soft_wrap=True)
    console.print("\nFor a bug report, copy this:\n```")
    console.print(escape(doctor.block(findings)), soft_wrap=True)
    console.print("```")
