"""Long tests of what must not break: counted, seeded, each count written down.

A part is a module _soak_NAME.py beside this file, with TITLE, FULL (the full count) and
`run(count, seed, progress) -> dict`: calls progress(done, count), and returns {"rows": [one dict of cells a row of its
table, all with the same keys], "violations": [a sentence for each thing that must not be], "said": [notes]} and
whatever else the JSON is to hold. `python benchmarks/soak.py` runs all parts, `--part NAME` one of them, `--count` a
fraction. The exit status is 1 where anything was violated.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from pathlib import Path
from typing import Any

import torch
from _machine import describe
from _page import publish, terminal
from _report import Table

from evc_fast.ops import dispatch

FOLDER = Path(__file__).resolve().parent


def part_names() -> list[str]:
    """Names of the parts that are there."""
    return sorted(path.stem.removeprefix("_soak_") for path in FOLDER.glob("_soak_*.py"))


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    summary, details = __doc__.split("\n\n")
    parser = argparse.ArgumentParser(description=summary, epilog=details)
    parser.add_argument("--part", action="append", choices=part_names(), help="may be given several times")
    parser.add_argument("--count", type=int, help="default: each part's full count")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=FOLDER / "results" / "local")
    arguments = parser.parse_args(argv)
    if arguments.count is not None and arguments.count < 1:
        parser.error("--count must be at least 1")
    return arguments


def run_part(name: str, arguments: argparse.Namespace) -> bool:
    """Run one part and write its page; whether nothing was violated."""
    part = importlib.import_module(f"_soak_{name}")
    count = arguments.count or part.FULL
    console = terminal(140)
    start = time.monotonic()
    with console.status(part.TITLE) as status:
        found = part.run(count, arguments.seed, lambda done, total: status.update(f"{part.TITLE}: {done} of {total}"))
    seconds = time.monotonic() - start
    said = [f"Count {count} of {part.FULL}, seed {arguments.seed}, {seconds:.0f} s.", *found["said"]]
    violations = found["violations"]
    targets = [f"Violations: {len(violations)}", *violations]
    table = Table(part.TITLE, *_cells(found["rows"]))
    machine = describe("cpu", torch.get_num_threads()) | {"kernels_isa": dispatch.cpu_isa()}
    report = {
        "machine": machine,
        "count": count,
        "full": part.FULL,
        "seed": arguments.seed,
        "seconds": seconds,
        **found,
    }
    publish(console, arguments.out, f"soak_{name}", f"{part.TITLE}, counted", report, [table], said, targets)
    return not violations


def _cells(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    return list(rows[0]), [[str(cell) for cell in row.values()] for row in rows]


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    passed = [run_part(name, arguments) for name in arguments.part or part_names()]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
