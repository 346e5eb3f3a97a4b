"""`evc-fast data check`, `data stats`, `data toy`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from evc_fast.cli import options as o
from evc_fast.cli.command import FAILED, UsageError, command
from evc_fast.cli.console import Console


def build() -> typer.Typer:
    """The group `data`."""
    app = typer.Typer(help="Look at data before it is used, and make a toy world.", no_args_is_help=True)
    command(app, "check", example="evc-fast data check videos/\nevc-fast train ... --quarantine quarantine.json")(check)
    command(app, "stats", example="evc-fast data stats captions_train.csv")(stats)
    command(app, "toy", example="evc-fast data toy world\nevc-fast data toy small-world --limit 20")(toy)
    return app


def check(
    console: Console,
    videos: Annotated[list[Path], typer.Argument(help="Folders of videos, or files.", show_default=False)],
    quarantine: Annotated[
        Path | None,
        typer.Option(
            "--quarantine",
            "-o",
            help="File that the list of bad videos is written to, as JSON; a new quarantine.json unless given.",
            show_default=False,
        ),
    ] = None,
    captions: o.CaptionFiles = None,
    id_prefix: o.Prefixes = None,
    mapping: o.Mapping = None,
    max_bad: Annotated[
        float, typer.Option("--max-bad", min=0, max=1, help="Share of bad videos above which it exits with 1.")
    ] = 1.0,
    frames: Annotated[int, typer.Option("--frames", min=1, help="N, frames a video.")] = 16,
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds that a video may take, of up to 10 MB.")] = 10.0,
    memory: Annotated[int, typer.Option("--memory", min=1, help="MB that decoding a video may take.")] = 2048,
    allow_truncated: o.TruncatedToo = False,
    workers: o.Workers = None,
) -> None:
    """List the videos that cannot be used.

    Every video is decoded, in a process of its own that can be killed. `features` and `train` skip what is on the
    list where they are given it by --quarantine.
    """
    if quarantine is None:
        quarantine = Path("quarantine.json")
        if quarantine.exists():
            raise UsageError(f"{quarantine} is there already: name the file by --quarantine, which is written over")
    o.require_file(quarantine)
    found, _ = o.find_videos(videos, captions, id_prefix, mapping)
    from evc_fast.data.check import Quarantine, check_videos

    with console.progress("check", "videos") as update:
        checked = check_videos(
            found,
            workers=workers,
            timeout_s=timeout,
            memory_mb=memory,
            num_frames=frames,
            allow_truncated=allow_truncated,
            progress=update,
        )
    bad = Quarantine.of(checked)
    o.write_document(quarantine, bad.to_json())
    kinds = dict(Counter(video.kind for video in checked if not video.usable).most_common())
    data = {
        "videos": len(checked),
        "usable": len(checked) - len(bad),
        "kinds": kinds,
        "damaged": [video.video_id for video in checked if video.usable and video.damaged],
        "bad": bad.to_json(),
        "quarantine": str(quarantine),
    }
    lines = [f"{len(checked)} videos: {data['usable']} usable, {len(bad)} not"]
    lines += [f"{kind}: {count}" for kind, count in kinds.items()]
    if len(bad):
        lines.append(bad.describe())
    if data["damaged"]:
        lines.append(f"usable, with damaged packets or frames: {', '.join(data['damaged'])}")
    lines.append(f"quarantine list: {quarantine}")
    console.show(data, "\n".join(lines))
    if len(bad) > max_bad * len(checked):
        console.fail(f"{len(bad)} of {len(checked)} videos cannot be used, more than the {max_bad:.1%} of --max-bad")
        raise typer.Exit(FAILED)


def stats(
    console: Console,
    captions: Annotated[list[Path], typer.Argument(help=o.CAPTIONS_HELP, show_default=False)],
    id_prefix: o.Prefixes = None,
    factual: Annotated[
        list[Path] | None,
        typer.Option("--factual", metavar="<path>", help="Factual captions of the same videos, for the second rule."),
    ] = None,
    emotions: o.Emotions = None,
) -> None:
    """Count what captions are made of.

    Words, lengths, emotion words and categories, and factual, neutral and emotional captions and videos.
    """
    from evc_fast.data.statistics import describe_captions

    prefixes = o.id_prefixes([*captions, *(factual or ())], id_prefix)
    found = o.read_all_captions(captions, prefixes[: len(captions)])
    others = o.read_all_captions(factual, prefixes[len(captions) :]) if factual else None
    statistics = describe_captions(found, o.read_dictionary(emotions), factual=others)
    console.show(statistics.to_dict(), statistics.table())


def toy(
    console: Console,
    folder: Annotated[Path, typer.Argument(help="Folder to make; it must be empty or not there.")],
    seed: Annotated[int, typer.Option("--seed", min=0, help="Another seed draws another world.")] = 0,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Clips of each split; all 960, 80 and 240 unless given.")
    ] = None,
    workers: o.Workers = None,
) -> None:
    """Render a toy world.

    Clips of drawn people and animals, with captions for training, validation and test.
    """
    from evc_fast.data.toy import render_world
    from evc_fast.data.toy.world import SPLITS

    with console.progress("render", "clips") as update:
        world = render_world(folder, seed=seed, limit=limit, workers=workers, progress=update)
    files = {split: str(folder / f"captions_{split}.csv") for split in SPLITS}
    counts = {split: len(world.of(split)) for split in SPLITS}
    data = {"folder": str(folder), "seed": seed, "videos": str(folder / "videos"), "clips": counts, "captions": files}
    lines = [f"{len(world.scenes)} clips: {folder / 'videos'}"]
    lines += [f"{split}, {counts[split]} clips: {path}" for split, path in files.items()]
    console.show(data, "\n".join(lines))
