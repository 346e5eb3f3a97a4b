"""Measure retrieval from large repositories: recall@K and time of IVF-PQ with exact ranking beside the flat index.

python benchmarks/retrieval.py
python benchmarks/retrieval.py --captions 20000 --queries 50       # half a minute

The features are synthetic: clustered ones with the geometry of CLIP's, and plain random ones, for which no index that
divides captions into lists can work. A repository of a million captions takes 6 GB of memory while it is built, and
2 GB of disk.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from _machine import describe
from _page import publish, terminal
from _report import Table
from _retrieval_features import CAPTIONS_A_VIDEO, KINDS
from rich.progress import Progress
from torch import Tensor

from evc_fast.data.repository import CaptionRepository, Retrieved
from evc_fast.ops import dispatch

BATCH = 32
DEPTHS = (1, 4, 10)  # recall@K
EFFORTS = ((16, 64), (16, 256), (64, 256), (256, 256), (256, 1024))  # probes, candidates
DEFAULT = (256, 1024)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    first, *rest = __doc__.split("\n\n")
    parser = argparse.ArgumentParser(
        description=first, epilog="\n\n".join(rest), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--captions", type=int, nargs="+", default=[10**5, 10**6], help="default: %(default)s")
    parser.add_argument("--features", nargs="+", choices=KINDS, default=list(KINDS), help="default: all")
    parser.add_argument("--width", type=int, default=512, help="of the features (default: %(default)s)")
    parser.add_argument("--queries", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=3.0, help="measuring time of a row (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--keep", action="store_true", help="keep what the folder's report has of other repositories")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "results" / "local",
        help="folder of retrieval.json and retrieval.md (default: %(default)s)",
    )
    return parser.parse_args(argv)


class OtherWork:
    """How many cores other processes have kept busy since this was made."""

    def __init__(self) -> None:
        self._begin = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Seconds: of the clock, busy of all cores, and of this process."""
        user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
        busy = (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), busy, time.process_time()

    def cores(self) -> float:
        clock, busy, own = (now - begin for now, begin in zip(self._now(), self._begin, strict=True))
        return max(0.0, busy - own) / clock


class Subject:
    """Features, queries and the ids of the queries' own videos; repositories of them, saved and loaded again."""

    def __init__(self, kind: str, captions: int, queries: int, width: int) -> None:
        self.features, images, own = KINDS[kind](captions, queries, width, 0)
        self.images = images[:, None, :]  # [q, N = 1, D]
        self.own = [f"video{number}" for number in own.tolist()]

    def repository(self, index: str, folder: Path) -> tuple[CaptionRepository, dict[str, float]]:
        """What is loaded from `folder` after it was built and saved there, and the seconds of the three."""
        rows = range(len(self.features))
        begin = time.perf_counter()
        built = CaptionRepository.from_features(
            [f"caption {row}" for row in rows],
            [f"video{row // CAPTIONS_A_VIDEO}" for row in rows],
            [("someone", "do", "something")] * len(rows),
            self.features,
            torch.ones(3, self.features.shape[1]),
            encoder_fingerprint="synthetic",
            random_weights=True,
            index=index,
        )
        seconds = {"build": time.perf_counter() - begin}
        begin = time.perf_counter()
        built.save(folder)
        seconds["save"] = time.perf_counter() - begin
        del built
        begin = time.perf_counter()
        loaded = CaptionRepository.load(folder)
        seconds["load"] = time.perf_counter() - begin
        return loaded, seconds

    def search(self, repository: CaptionRepository, k: int) -> Retrieved:
        return repository.search(self.images, k, self.own)


def check(found: Retrieved, subject: Subject) -> None:
    """Stops the run unless cosines are those of the features, fall, and no caption is of the query's own video."""
    exact = (subject.features.double()[found.indices] * subject.images.double()).sum(dim=2)
    error = float((found.similarity.double() - exact).abs().max())
    own = torch.tensor([int(video.removeprefix("video")) for video in subject.own])
    if bool((found.indices // CAPTIONS_A_VIDEO == own[:, None]).any()):
        raise AssertionError("a caption of the query's own video was retrieved")
    if error > 1e-5 or bool((found.similarity[:, :-1] < found.similarity[:, 1:]).any()):
        raise AssertionError(f"cosines are wrong by {error:.1e}, or do not fall")


def recall(found: Tensor, exact: Tensor, k: int) -> float:
    """The share of the k best captions that are among the first k found."""
    hits = (found[:, :k, None] == exact[:, None, :k]).any(dim=2)
    return float(hits.float().mean())


def best_seconds(calls: dict[str, Callable[[], object]], budget: float) -> dict[str, float]:
    """Least time of each call, in turns until all have had `budget` seconds each, at least three turns."""
    best = dict.fromkeys(calls, float("inf"))
    begin, turn = time.perf_counter(), 0
    while turn < 3 or time.perf_counter() - begin < budget * len(calls):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - start)
        turn += 1
    return best


def measure(kind: str, captions: int, arguments: argparse.Namespace, say: Callable[[str], None]) -> dict:
    """Recall and times of one repository; the flat index first, whose answers are the exact ones."""
    others = OtherWork()
    say("features")
    subject = Subject(kind, captions, arguments.queries, arguments.width)
    pair = subject.features[torch.randint(captions, (2, 5000), generator=torch.Generator().manual_seed(0))]
    with tempfile.TemporaryDirectory() as folder:
        say("flat index")
        flat, flat_seconds = subject.repository("flat", Path(folder, "flat"))
        exact = subject.search(flat, max(DEPTHS))
        check(exact, subject)
        say("IVF-PQ: learning")
        ivfpq, ivfpq_seconds = subject.repository("ivfpq", Path(folder, "ivfpq"))
        manifest = (Path(folder, "ivfpq") / "index.safetensors").stat().st_size
        rows = []
        for probes, candidates in EFFORTS:
            say(f"IVF-PQ: {probes} lists, {candidates} captions")
            ivfpq.set_effort(probes=probes, candidates=candidates)
            found = subject.search(ivfpq, max(DEPTHS))
            check(found, subject)
            last = min(4, max(DEPTHS)) - 1
            rows.append(
                {
                    "probes": probes,
                    "candidates": candidates,
                    "recall": {k: recall(found.indices, exact.indices, k) for k in DEPTHS},
                    "cosine_lost": float((exact.similarity[:, last] - found.similarity[:, last]).mean()),
                    "seconds": times(ivfpq, subject, arguments.seconds),
                }
            )
        say("flat index")
        flat_times = times(flat, subject, arguments.seconds)
        del flat, ivfpq
    return {
        "features": kind,
        "captions": captions,
        "width": arguments.width,
        "queries": arguments.queries,
        "busy_elsewhere": others.cores(),
        "threads": arguments.threads,
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "cosines": {
            "two_captions": float((pair[0] * pair[1]).sum(dim=1).mean()),
            "query_and_any": float((subject.images[:, 0] @ pair[0].T).mean()),
            "query_and_fourth": float(exact.similarity[:, 3].mean()),
        },
        "flat": {"seconds": flat_times | flat_seconds, "bytes": captions * arguments.width * 4},
        "ivfpq": {"seconds": ivfpq_seconds, "index_bytes": manifest, "efforts": rows},
    }


def times(repository: CaptionRepository, subject: Subject, seconds: float) -> dict[str, float]:
    """Of one search for the four best captions, of one query and of a batch."""
    one, many = (subject.images[:1], subject.own[:1]), (subject.images[:BATCH], subject.own[:BATCH])
    calls = {
        "one": lambda: repository.search(one[0], 4, one[1]),
        "batch": lambda: repository.search(many[0], 4, many[1]),
    }
    return best_seconds(calls, seconds / 2)


def table(record: dict) -> Table:
    flat, ivfpq = record["flat"], record["ivfpq"]
    columns = ["index", *(f"recall@{k}" for k in DEPTHS), "cosine lost", "ms, one", f"ms, {BATCH}", "flat / row"]

    def cells(name: str, shares: list[str], lost: str, seconds: dict) -> list[str]:
        milliseconds = [f"{seconds[key] * 1e3:.3g}" for key in ("one", "batch")]
        return [name, *shares, lost, *milliseconds, f"{flat['seconds']['one'] / seconds['one']:.1f}"]

    rows = [cells("flat", ["1"] * len(DEPTHS), "0", flat["seconds"])]
    for effort in ivfpq["efforts"]:
        name = f"IVF-PQ, {effort['probes']} lists, {effort['candidates']} ranked"
        name += " (default)" if (effort["probes"], effort["candidates"]) == DEFAULT else ""
        shares = [f"{share:.3f}" for share in effort["recall"].values()]
        rows.append(cells(name, shares, f"{effort['cosine_lost']:.1e}", effort["seconds"]))
    cosines = record["cosines"]
    notes = [
        "Cosines: two captions {two_captions:.2f}, a query and any caption {query_and_any:.2f}, "
        "a query and its fourth best {query_and_fourth:.2f}.".format(**cosines),
        f"Memory: flat {flat['bytes'] / 1e6:,.0f} MB; IVF-PQ {ivfpq['index_bytes'] / 1e6:,.0f} MB, the features stay "
        "in the mapped file.",
    ]
    for name, seconds in (("flat", flat["seconds"]), ("IVF-PQ", ivfpq["seconds"])):
        notes.append(f"{name}, seconds: " + ", ".join(f"{key} {seconds[key]:.1f}" for key in ("build", "save", "load")))
    return Table(f"{record['captions']:,} captions, {record['features']} features", columns, rows, notes)


def with_kept(records: list[dict], path: Path) -> list[dict]:
    """The records, and those of other repositories in the report at `path`, by size."""
    made = {(record["captions"], record["features"]) for record in records}
    before = json.loads(path.read_text(encoding="utf-8"))["records"] if path.exists() else []
    kept = [record for record in before if (record["captions"], record["features"]) not in made]
    return sorted([*kept, *records], key=lambda record: (record["captions"], record["features"]))


def said(records: list[dict], machine: dict) -> list[str]:
    first = records[0]
    notes = [
        f"Synthetic features of width {first['width']}, no real CLIP features: clustered ones are made to CLIP's "
        "geometry (captions in a narrow cone, images in another, topic, video and wording within), random ones are "
        "independent directions, the worst case: nothing is near anything, and lists divide nothing.",
        f"{first['queries']} queries, each with its own video's {CAPTIONS_A_VIDEO} captions excluded. Recall@K: share "
        "of the K best captions among the first K found. Cosine lost: of the fourth caption, on average. All cosines "
        "were held against float64 first.",
        "Least time of a whole search for 4 captions, in turns; features in the page cache. Build: normalising, "
        "checking and, for IVF-PQ, learning; without CLIP.",
    ]
    busiest = max(record.get("busy_elsewhere", 0.0) for record in records)
    if busiest > 0.1 * machine["cores"]:
        notes.append(
            f"The machine was busy with other work, which took up to {busiest:.1f} of {machine['cores']} cores while a "
            "part ran. Recall does not depend on it; times are upper bounds, and build times are above those alone."
        )
    return notes


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    torch.set_num_threads(arguments.threads)
    console = terminal(140)
    machine = describe("cpu", arguments.threads) | {"kernels_isa": dispatch.cpu_isa()}
    todo = [(kind, captions) for captions in arguments.captions for kind in arguments.features]
    records: list[dict] = []
    title = "Retrieval, measured"
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("retrieval", total=len(todo))
        for kind, captions in todo:

            def say(what: str, kind: str = kind, captions: int = captions) -> None:
                progress.update(task, description=f"{captions:,} {kind}: {what}")

            records.append(measure(kind, captions, arguments, say))
            progress.advance(task)
            shown = with_kept(records, arguments.out / "retrieval.json") if arguments.keep else records
            report = {"machine": machine, "records": shown}
            page = [table(record) for record in shown]
            publish(None, arguments.out, "retrieval", title, report, page, said(shown, machine))
    publish(console, arguments.out, "retrieval", title, report, page, said(shown, machine))
    return 0


if __name__ == "__main__":
    sys.exit(main())
