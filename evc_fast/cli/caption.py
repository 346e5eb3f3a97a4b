"""`evc-fast caption`: videos to captions, and what explains them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evc_fast.cli import caption_view as view
from evc_fast.cli import options as o
from evc_fast.cli.command import FAILED, UsageError, command
from evc_fast.cli.console import Console

if TYPE_CHECKING:
    from evc_fast.results import CaptionResult

_EXAMPLE = """
evc-fast caption clip.mp4
evc-fast caption clips/ --model run --report captions.html --batch-size 16
"""

Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="Folder of a captioner, or of a run by `evc-fast train`; `toy` is the package's own, which knows the toy"
        " world only.",
    ),
]
Clip = Annotated[
    str | None,
    typer.Option(
        "--clip", help="The CLIP that the model was trained with, where it lies elsewhere than the model says."
    ),
]
Videos = Annotated[list[Path], typer.Argument(help="Video files, or folders of them.", show_default=False)]
Beams = Annotated[int, typer.Option("--num-beams", min=1, help="Of the beam search.")]
BatchSize = Annotated[
    int, typer.Option("--batch-size", min=1, help="Videos captioned at once; the captions are the same.")
]


def register(app: typer.Typer) -> None:
    command(app, "caption", example=_EXAMPLE)(caption)


def caption(
    console: Console,
    videos: Videos,
    model: Model = o.TOY,
    report: Annotated[Path | None, typer.Option("--report", help="Write an HTML page that opens offline.")] = None,
    num_beams: Beams = 5,
    num_emotions: Annotated[int, typer.Option("--num-emotions", min=0, help="Emotion words to show.")] = 5,
    batch_size: BatchSize = 8,
    clip: Clip = None,
    device: o.Device = "auto",
) -> None:
    """Caption videos, and show why.

    Shown are emotions, the retrieved captions with their triplets and weights, and the gates of facts and emotions.
    A video's name without suffix is its id: what the repository holds of the same id is not retrieved for it.
    A video that cannot be read does not stop the others; the exit code is 1 then.
    """
    if report is not None:
        o.require_file(report)
    results, failed = caption_all(
        console,
        videos,
        model,
        clip=clip,
        device=device,
        batch_size=batch_size,
        num_beams=num_beams,
        num_emotions=num_emotions,
        pictures=report is not None,
    )
    page = write_page(results, report, failed) if report is not None and results else None
    data = {
        "model": model,
        "captions": [result.to_dict() for result in results],
        "failed": failed,
        "report": page,
    }

    def show() -> None:
        for result in results:
            (view.print_rich if console.rich else view.print_plain)(result)
        if page is not None:
            print(f"report: {page}")

    console.show(data, show)
    if failed:
        raise typer.Exit(FAILED)


def caption_all(
    console: Console,
    videos: Sequence[Path],
    model: str,
    *,
    clip: str | None,
    device: str,
    batch_size: int,
    **options: Any,
) -> tuple[list[CaptionResult], list[dict[str, str]]]:
    """Captions of all videos, with progress; what could not be read is said at once, and listed."""
    found = o.source_files(videos)
    o.work_offline()  # models come from folders or from the hub's cache, whatever they are called
    o.silence_transformers()
    from evc_fast.captioner import Captioner

    captioner = Captioner.from_pretrained(
        None if model == o.TOY else model,
        clip=None if clip is None else o.clip_source(clip),
        device=o.choose_device(device),
    )
    failed: list[dict[str, str]] = []

    def note_failure(video: Any, error: ValueError) -> None:
        failed.append({"source": str(video), "kind": type(error).__name__, "reason": str(error)})
        console.fail(str(error))

    for path in list(found):
        if wrong := o.unwritable_name(path):
            note_failure(ascii(str(path)), UsageError(wrong))
            found.remove(path)
    options = {"video_ids": [path.stem for path in found], **options}

    if len(found) == 1:  # a bar for one video would only flicker
        return captioner.caption(found, failed=note_failure, **options), failed
    with console.progress("caption", "videos") as update:
        update(0, len(found))
        results = captioner.caption(found, batch_size=batch_size, failed=note_failure, progress=update, **options)
    return results, failed


def write_page(results: Sequence[CaptionResult], path: Path, failed: Sequence[dict[str, str]]) -> str:
    """Writes the HTML page of captions made with `pictures=True`, and of what has none: its path."""
    from evc_fast.report import write_report

    write_report(results, path, failed={video["source"]: video["reason"] for video in failed})
    return str(path)
