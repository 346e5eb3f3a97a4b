"""What a command says: its result on standard output, progress and remarks on standard error."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import typer

LINE_SECONDS = 10.0
"""Between the lines of progress where standard error is no terminal."""


class Update(Protocol):
    """Told how far the work is."""

    def __call__(self, done: int, total: int, note: str = "") -> None: ...


class StageUpdate(Protocol):
    """Told how far a stage of the work is."""

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None: ...


class Console:
    """One command's output.

    as_json: its result is one JSON document.
    quiet: says nothing at all, as on every process of a training but the first.
    """

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet

    @property
    def rich(self) -> bool:
        """Whether results are drawn for a terminal rather than printed as plain lines."""
        return not self.as_json and sys.stdout.isatty()

    def show(self, data: Any, text: str | Callable[[], object]) -> None:
        """The command's result: `data`, which JSON can hold, or a text, or what prints one."""
        if self.quiet:
            return
        if self.as_json:
            print(json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False), flush=True)
        elif callable(text):
            text()
        else:
            print(text, flush=True)

    def say(self, line: str) -> None:
        """A remark on the work."""
        if not self.quiet:
            print(line, file=sys.stderr, flush=True)

    def fail(self, sentence: str) -> None:
        """What went wrong, in red where it is a terminal; of several processes each says which one it is."""
        process = "" if is_main_process() else f" in process {os.environ['RANK']}"
        typer.secho(f"error{process}: {sentence}", fg=typer.colors.RED, err=True)

    @contextmanager
    def progress(self, what: str, unit: str = "") -> Iterator[Update]:
        """How far some work is, with the time left: a bar, or a line now and then where it is no terminal."""
        with self.stages(unit) as update:
            yield lambda done, total, note="": update(what, done, total, note)

    @contextmanager
    def stages(self, unit: str = "") -> Iterator[StageUpdate]:
        """The same for work of several stages, each of which has a bar, or lines, of its own."""
        if self.quiet:
            yield lambda stage, done, total, note="": None
        elif sys.stderr.isatty():
            with _bars() as update:
                yield update
        else:
            stages: dict[str, _Lines] = {}
            yield lambda stage, done, total, note="": stages.setdefault(stage, _Lines(stage, unit))(done, total, note)


@contextmanager
def _bars() -> Iterator[StageUpdate]:
    from rich.console import Console as RichConsole
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=RichConsole(stderr=True)) as display:
        tasks: dict[str, Any] = {}

        def update(stage: str, done: int, total: int, note: str = "") -> None:
            if stage not in tasks:
                tasks[stage] = display.add_task(stage, total=None, note="")
            display.update(tasks[stage], completed=done, total=total, note=note)

        yield update


class _Lines:
    """Progress as lines: one when the work ends, and before that one every `LINE_SECONDS`."""

    def __init__(self, what: str, unit: str) -> None:
        self._what = what
        self._unit = f" {unit}" if unit else ""
        self._begin = self._shown = time.monotonic()
        self._first: int | None = None
        self._ended = False

    def __call__(self, done: int, total: int, note: str = "") -> None:
        now = time.monotonic()
        if self._first is None:
            self._first, self._begin = done, now  # what an earlier run had done took no time of this one
        ends = done == total and not self._ended
        if not ends and now - self._shown < LINE_SECONDS:
            return
        self._shown, self._ended = now, self._ended or ends
        line = f"{self._what}: {done} of {total}{self._unit}"
        passed, here = now - self._begin, done - self._first
        if done == total:
            line += f", took {duration(passed)}"
        elif here:
            line += f", {duration(passed / here * (total - done))} left"
        print(f"{line}, {note}" if note else line, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """ "42 s", "3:05" minutes, "2:03:05" hours."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02} min"


def counted(number: int, what: str) -> str:
    """ "1 video", "2 videos"."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def is_main_process() -> bool:
    """False on every process that torchrun started but the first."""
    return os.environ.get("RANK", "0") == "0"
