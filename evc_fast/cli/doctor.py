"""`evc-fast doctor`: what is installed here, and what runs where."""

from __future__ import annotations

import typer

from evc_fast.cli.command import command
from evc_fast.cli.console import Console


def register(app: typer.Typer) -> None:
    command(app, "doctor", example="evc-fast doctor --json")(doctor)


def doctor(console: Console) -> None:
    """Show what is installed, and what runs where.

    Versions, devices, what each extra lacks, and which implementation serves each operation, and why.
    """
    from evc_fast import __main__ as table

    found = table.report()
    console.show(found, lambda: table.show(found, rich=console.rich))
