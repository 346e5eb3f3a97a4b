"""How a benchmark of one part ends: its tables on the terminal, and as Markdown and JSON in a folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from _report import Table
from rich.console import Console


def terminal(width: int = 120) -> Console:
    """A console; into a file or a pipe, lines of `width`."""
    console = Console()
    return console if console.is_terminal else Console(width=width)


def publish(
    console: Console | None,
    folder: Path,
    stem: str,
    title: str,
    report: dict,
    tables: Sequence[Table],
    said: Sequence[str],
    targets: Sequence[str] = (),
) -> None:
    """Print the tables, each with its notes, then `targets` and `said`; write `stem`.json and `stem`.md into `folder`.

    console: None only writes, as after each part of a long run, so that its end is not the end of what it found.
    report: what the JSON holds; its "machine" heads the page. said: notes of the whole run.
    """
    machine = report["machine"]
    device = f"Device: {machine['device_name']}, {machine['threads']} threads, kernels: {machine['kernels_isa']}"
    if "gpu" in machine:
        device += ", compute capability {capability}, {multiprocessors} multiprocessors, CUDA {cuda}".format(
            **machine["gpu"]
        )
    head = [
        f"Date: {machine['date']}",
        device,
        "Versions: " + ", ".join(f"{name} {version}" for name, version in machine["versions"].items()),
        *said,
    ]
    page = [f"# {title}", "", *(f"- {line}" for line in head), "", *(table.markdown() for table in tables)]
    if targets:
        page += ["## Targets", "", *(f"- {line}" for line in targets), ""]
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / f"{stem}.json", folder / f"{stem}.md"
    paths[0].write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    paths[1].write_text("\n".join(page), encoding="utf-8")
    if console is None:
        return
    for table in tables:
        console.print(table.rich())
        for note in table.notes:
            console.print(f"- {note}", markup=False, highlight=False)
    for line in (*targets, *said):
        console.print(f"- {line}", markup=False, highlight=False)
    console.print(f"Written: {paths[0]}, {paths[1]}", highlight=False)
