"""`evc-fast features`: videos, or a file of features, to a feature store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from evc_fast.cli import options as o
from evc_fast.cli.command import UsageError, command
from evc_fast.cli.console import Console

_EXAMPLE = """
evc-fast features videos/ --clip toy --output features
evc-fast features videos/ --captions train.csv --captions test.csv --mapping names.txt --output features
evc-fast features --hdf5 clip_features.h5 --output features
"""


def register(app: typer.Typer) -> None:
    command(app, "features", example=_EXAMPLE, resumes="the same command goes on from there")(features)


def features(
    console: Console,
    videos: Annotated[
        list[Path] | None, typer.Argument(help="Folders of videos, or files.", show_default=False)
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the features.")] = Path("features"),
    clip: o.Clip = o.DEFAULT_CLIP,
    captions: o.CaptionFiles = None,
    id_prefix: o.Prefixes = None,
    mapping: o.Mapping = None,
    skip_missing: Annotated[
        bool, typer.Option("--skip-missing", help="Go on without the videos that have no file.")
    ] = False,
    hdf5: Annotated[
        Path | None, typer.Option("--hdf5", help="Import [frames, width] a video id from this HDF5 file instead.")
    ] = None,
    frames: Annotated[int, typer.Option("--frames", min=1, help="N, frames a video.")] = 16,
    quarantine: Annotated[
        Path | None, typer.Option("--quarantine", help="List by `evc-fast data check` of videos not to try.")
    ] = None,
    max_bad: Annotated[
        float, typer.Option("--max-bad", min=0, max=1, help="Share of the videos that may be bad before it stops.")
    ] = 0.1,
    allow_truncated: o.TruncatedToo = False,
    workers: o.Workers = None,
    device: o.Device = "auto",
    restart: Annotated[bool, typer.Option("--restart", help="Make the folder anew; else it is gone on with.")] = False,
) -> None:
    """Encode the frames of videos by CLIP, once.

    In parallel, and going on where it stopped. A video's id is its file's name without suffix, or what captions and
    mapping say.
    """
    if (hdf5 is None) == (not videos):
        raise UsageError("name the videos, or a file by --hdf5, and not both")
    if hdf5 is not None:
        given = {
            "--captions": captions,
            "--id-prefix": id_prefix,
            "--mapping": mapping,
            "--skip-missing": skip_missing,
            "--quarantine": quarantine,
            "--allow-truncated": allow_truncated,
        }
        unused = [name for name, value in given.items() if value]
        if unused:
            raise UsageError(f"{' and '.join(unused)} say how videos are read: --hdf5 takes all features of its file")
        if not restart and any(output.glob("features-*.safetensors")):
            raise UsageError(f"{output} holds features: name another --output, or replace them by --restart")
        _import(console, hdf5, output, clip, frames)
        return
    found, missing = o.find_videos(videos, captions, id_prefix, mapping, skip_missing)
    if missing:
        console.say(f"{len(missing)} videos have no file and are left out, {missing[0]} first")
    towers = o.load_towers(clip, device)
    from evc_fast.data.check import Quarantine
    from evc_fast.data.features import extract_features

    listed = None if quarantine is None else Quarantine.read(quarantine)
    with console.progress("features", "videos") as update:
        report = extract_features(
            found,
            towers,
            output,
            num_frames=frames,
            workers=workers,
            resume=not restart,
            progress=update,
            quarantine=listed,
            max_bad_share=max_bad,
            allow_truncated=allow_truncated,
        )
    data = {
        "folder": str(report.folder),
        "requested": report.requested,
        "extracted": report.extracted,
        "reused": report.reused,
        "failed": report.failed.to_json(),
        "missing": missing,
        "seconds": round(report.seconds, 3),
    }
    console.show(data, f"{report.describe()}\nfeatures: {report.folder}")


def _import(console: Console, hdf5: Path, output: Path, clip: str, frames: int) -> None:
    towers = o.load_towers(clip, "cpu")
    from evc_fast.data.features import import_hdf5

    with console.progress("features", "videos") as update:
        store = import_hdf5(
            hdf5,
            output,
            frames,
            fingerprint=towers.fingerprint,
            encoder=towers.name,
            width=towers.image_dim,
            progress=update,
        )
    data = {"folder": str(output), "imported": len(store), "frames": store.num_frames, "width": store.width}
    console.show(
        data, f"{len(store)} videos imported, {store.num_frames} frames of width {store.width}\nfeatures: {output}"
    )
