"""METEOR 1.5: the Java program that pycocoevalcap brings, spoken to over a pipe.

pycocoevalcap's own wrapper is not used: an error between its lock and its release, as when Java stops, leaves the lock
closed, and the interpreter then waits for it for ever. The program, its options and its numbers are the same.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import numpy as np

_JAR = "meteor-1.5.jar"
_LENGTHS, _CHUNKS, _MATCHES = slice(0, 2), 20, slice(21, 23)  # of caption and reference, in METEOR's counts


class MeteorUnavailable(RuntimeError):
    """METEOR cannot be computed here; the message is the reason."""


class Meteor:
    """One running METEOR; a context manager.

    Raises MeteorUnavailable, also from its methods, where there is no Java, where it stops, and where it gives no
    answer for `timeout_s` seconds.
    """

    def __init__(self, *, timeout_s: float = 300.0) -> None:
        java = shutil.which("java")
        if java is None:
            raise MeteorUnavailable("METEOR 1.5 is a Java program, and there is no java on the PATH")
        package = importlib.util.find_spec("pycocoevalcap")
        folders = (package and package.submodule_search_locations) or []
        jars = [jar for folder in folders if (jar := Path(folder, "meteor", _JAR)).is_file()]
        if not jars:
            raise MeteorUnavailable(f"the installed pycocoevalcap has no {_JAR}")
        self._timeout_s = timeout_s
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  closed in __exit__
        try:
            self._process = subprocess.Popen(
                [java, "-jar", "-Xmx2G", _JAR, "-", "-", "-stdio", "-l", "en", "-norm"],
                cwd=jars[0].parent,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
            )
        except OSError as error:
            self._errors.close()
            raise MeteorUnavailable(f"{java} does not start: {error}") from error

    def __enter__(self) -> Meteor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def statistics(self, hypothesis: str, references: Sequence[str]) -> np.ndarray:
        """What METEOR counts of one caption, float64 [23]."""
        return self._ask(" ||| ".join(("SCORE", *references, hypothesis)), 1)[0]

    def scores(self, statistics: np.ndarray) -> tuple[np.ndarray, float]:
        """METEOR of each of n captions and of the corpus that they are, from 0 to 1: [n, 23] -> float64 [n], float."""
        rows = (" ".join(map(repr, row)) for row in statistics.tolist())
        answers = self._ask(" ||| ".join(("EVAL", *rows)), len(statistics) + 1)
        return np.concatenate(answers[:-1]), float(answers[-1][0])

    def _ask(self, line: str, answers: int) -> list[np.ndarray]:
        """Writes a line and reads lines of numbers."""
        watchdog = threading.Timer(self._timeout_s, self._process.kill)
        watchdog.start()
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
            lines = [self._process.stdout.readline().split() for _ in range(answers)]
            found = [np.array([float(value) for value in values]) for values in lines]
        except (BrokenPipeError, ValueError):
            found = []
        finally:
            watchdog.cancel()
        if not found or not all(map(len, found)):
            self._process.kill()
            self._process.wait()
            self._errors.seek(0)
            said = self._errors.read().decode(errors="replace").strip().splitlines() or ["it said nothing"]
            raise MeteorUnavailable(f"METEOR's Java program gave no answer: {said[-1]}")
        return found


def summable(statistics: np.ndarray) -> np.ndarray:
    """Counts whose sum over captions has the METEOR of that corpus, [n, 23] -> [n, 23].

    A caption that is its reference word for word, one chunk that covers both, adds no chunk to its corpus.
    """
    whole = (statistics[:, _LENGTHS] == statistics[:, _MATCHES]).all(axis=1) & (statistics[:, _CHUNKS] == 1)
    counts = statistics.copy()
    counts[whole, _CHUNKS] = 0
    return counts


@contextmanager
def start_meteor(wanted: bool = True) -> Iterator[Meteor | MeteorUnavailable]:
    """A running METEOR, or the reason why there is none. It takes about 10 s of processor time to start."""
    try:
        program: Meteor | MeteorUnavailable = Meteor() if wanted else MeteorUnavailable("left out")
    except MeteorUnavailable as reason:
        program = reason
    if isinstance(program, MeteorUnavailable):
        yield program
    else:
        with program:
            yield program
