"""`evc-fast evaluate`: captions of held-out videos, their metrics, and two runs compared."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from evc_fast.cli import options as o
from evc_fast.cli.command import UsageError, command
from evc_fast.cli.console import Console

if TYPE_CHECKING:
    from evc_fast.data.captions import CaptionSet
    from evc_fast.data.emotions import EmotionDictionary

_EXAMPLE = """
evc-fast evaluate run --captions captions_test.csv
evc-fast evaluate --compare run-1 run-2 --captions captions_test.csv
evc-fast evaluate generated.json --captions captions_test.csv --json
"""


def register(app: typer.Typer) -> None:
    command(app, "evaluate", example=_EXAMPLE)(evaluate)


def evaluate(
    console: Console,
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="A run's folder, a captioner's folder, or a file of captions (JSON id -> caption, COCO results, CSV,"
            " or scores saved by this command); two of them with --compare.",
            show_default=False,
        ),
    ],
    captions: o.CaptionFiles = None,
    id_prefix: o.Prefix = "",
    compare: Annotated[
        bool, typer.Option("--compare", help="Differences of two runs, with bootstrap intervals.")
    ] = False,
    features: Annotated[
        Path | None, typer.Option("--features", help="Of the videos; the run's own unless given.", show_default=False)
    ] = None,
    repository: Annotated[
        Path | None, typer.Option("--repository", help="To retrieve from; the run's own unless given.")
    ] = None,
    emotions: o.Emotions = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File for scores and captions, as JSON; in a run's folder unless given."),
    ] = None,
    meteor: Annotated[
        bool, typer.Option("--meteor/--no-meteor", help="METEOR needs Java and takes some 10 s to start.")
    ] = True,
    samples: Annotated[int, typer.Option("--samples", min=2, help="Bootstrap samples of --compare.")] = 1000,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the bootstrap.")] = 0,
    num_beams: Annotated[int, typer.Option("--num-beams", min=1, help="Of the beam search.")] = 5,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Videos captioned at once.")] = 32,
    device: o.Device = "auto",
) -> None:
    """Score a run on held-out videos, or compare two.

    The videos of the caption file are captioned, and the captions scored against it. A video's own captions are
    never retrieved for it. Where the captions are EmVidCap's test split, the paper's Table 1 is printed beside.
    """
    if not captions:
        raise UsageError("name the captions to compare with by --captions")
    if len(runs) != (2 if compare else 1):
        raise UsageError(f"name {'two runs with --compare' if compare else 'one run, or two with --compare'}")
    references = o.read_all_captions(captions, id_prefix)
    search = {"num_beams": num_beams, "batch_size": batch_size, "device": o.choose_device(device)}
    generated: list[dict[str, str]] = []
    dictionary: EmotionDictionary | None = None if emotions is None else o.read_dictionary(emotions)
    for run in runs:
        made, own_dictionary = _captions_of(console, run, references, features, repository, search)
        generated.append(made)
        dictionary = dictionary or own_dictionary
    dictionary = dictionary or o.read_dictionary(None)
    if compare:
        _compare(console, runs, generated, references, dictionary, output, meteor=meteor, samples=samples, seed=seed)
        return
    from evc_fast.data.files import write_atomically
    from evc_fast.metrics import evaluate as score

    scores = score(generated[0], references.references(), dictionary, meteor=meteor)
    if output is None and runs[0].is_dir():
        output = runs[0] / f"scores-{captions[0].stem}.json"
    if output is not None:
        write_atomically(output, scores.to_json().encode())
    saved = f"\nscores and captions: {output}" if output is not None else ""
    console.show(scores.to_dict(), scores.table() + saved)


def _captions_of(
    console: Console,
    run: Path,
    references: CaptionSet,
    features: Path | None,
    repository: Path | None,
    search: dict[str, object],
) -> tuple[dict[str, str], EmotionDictionary | None]:
    """Video id -> caption of a run, which are made where it is a folder; and the dictionary it was trained with."""
    if run.is_file():
        from evc_fast.data.caption_files import read_hypotheses

        return read_hypotheses(run), None
    from evc_fast.cli.models import open_run

    opened = open_run(run, features, repository, str(search["device"]))
    with console.progress(f"caption by {run.name}", "videos") as update:
        made = opened.caption(references.video_ids, update, search["batch_size"], search["num_beams"])
    return made, opened.dictionary


def _compare(
    console: Console,
    runs: list[Path],
    generated: list[dict[str, str]],
    references: CaptionSet,
    dictionary: EmotionDictionary,
    output: Path | None,
    **options: object,
) -> None:
    from evc_fast.data.files import write_atomically
    from evc_fast.metrics.compare import compare

    names = tuple(map(str, runs))
    found = compare(*generated, references.references(), dictionary, names=names, **options)
    if output is not None:
        write_atomically(output, found.to_json().encode())
    console.show(found.to_dict(), found.table())
