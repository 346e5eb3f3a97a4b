"""`evc-fast report`: captions of videos as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from evc_fast.cli import caption as captioning
from evc_fast.cli import options as o
from evc_fast.cli.command import FAILED, command
from evc_fast.cli.console import Console

_EXAMPLE = "evc-fast report clips/ --model run --output captions.html"


def register(app: typer.Typer) -> None:
    command(app, "report", example=_EXAMPLE)(report)


def report(
    console: Console,
    videos: captioning.Videos,
    output: Annotated[Path, typer.Option("--output", "-o", help="The page.")] = Path("report.html"),
    model: captioning.Model = o.TOY,
    num_beams: captioning.Beams = 5,
    batch_size: captioning.BatchSize = 8,
    clip: captioning.Clip = None,
    device: o.Device = "auto",
) -> None:
    """Caption videos into one HTML page.

    It opens offline, and shows pictures, weights, emotion curves and times. The same page as by `evc-fast caption
    --report`, without printing the captions.
    """
    o.require_file(output)
    results, failed = captioning.caption_all(
        console, videos, model, clip=clip, device=device, batch_size=batch_size, num_beams=num_beams, pictures=True
    )
    page = captioning.write_page(results, output, failed) if results else None
    data = {"report": page, "videos": len(results), "failed": failed}
    count = f"{len(results)} video{'s' if len(results) > 1 else ''}"
    console.show(data, f"{count}: {page}" if results else "no page: none of the videos can be read")
    if failed:
        raise typer.Exit(FAILED)
