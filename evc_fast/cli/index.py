"""`evc-fast index`: captions to a caption repository."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from evc_fast.cli import options as o
from evc_fast.cli.command import UsageError, command
from evc_fast.cli.console import Console

_EXAMPLE = """
evc-fast index captions_train.csv --clip toy --output repository
"""


class Kind(StrEnum):
    """How the repository is searched."""

    auto = "auto"
    flat = "flat"
    ivfpq = "ivfpq"


def register(app: typer.Typer) -> None:
    command(app, "index", example=_EXAMPLE)(index)


def index(
    console: Console,
    captions: Annotated[list[Path], typer.Argument(help=o.CAPTIONS_HELP, show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the repository.")] = Path("repository"),
    clip: o.Clip = o.DEFAULT_CLIP,
    id_prefix: o.Prefixes = None,
    kind: Annotated[
        Kind,
        typer.Option(
            "--search",
            help="flat is exact; ivfpq suits millions, finds 94 in 100 of the best there, ten times as fast; auto takes"
            " flat below 500,000 captions.",
        ),
    ] = Kind.auto,
    spacy_model: Annotated[
        str | None, typer.Option("--spacy-model", help="Another English spaCy pipeline, by name or folder.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Sentences that CLIP encodes at once.")] = 256,
    device: o.Device = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a repository that is there.")] = False,
) -> None:
    """Build the repository to retrieve from.

    It holds captions, their triplets and text features, and a search index. Build it from the training captions
    alone, with the CLIP towers that make the frame features.
    """
    if output.exists() and not output.is_dir():
        raise UsageError(f"{output} is a file: name a folder by --output")
    if output.is_dir() and any(output.iterdir()):
        if not overwrite:
            raise UsageError(f"{output} is in use: name another folder by --output, or give --overwrite")
        if not (output / "captions.json").is_file():
            raise UsageError(f"{output} holds something else than a repository: name another folder by --output")
    found = o.read_all_captions(captions, id_prefix)
    from evc_fast.data.index import build_repository
    from evc_fast.data.triplets import SpacyTriplets

    extractor = SpacyTriplets(spacy_model)
    towers = o.load_towers(clip, device)
    with console.stages("captions") as update:
        repository = build_repository(
            found,
            towers,
            extractor,
            index=None if kind is Kind.auto else kind.value,
            batch_size=batch_size,
            progress=update,
        )
    repository.save(output)
    data = {
        "folder": str(output),
        "captions": len(repository),
        "videos": len(found.video_ids),
        "width": repository.width,
        "search": repository.index_kind,
        "triplet_extractor": repository.triplet_extractor,
    }
    text = (
        f"{len(repository)} captions of {len(found.video_ids)} videos, searched by {repository.index_kind}, triplets "
        f"by {repository.triplet_extractor}\nrepository: {output}"
    )
    console.show(data, text)
