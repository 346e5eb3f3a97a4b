"""`evc-fast evaluate`: captions of held-out videos, their metrics, and two runs compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from evc_fast.cli import options as o
from evc_fast.cli.command import UsageError, command
from evc_fast.cli.console import Console, counted

if TYPE_CHECKING:
    from evc_fast.cli.models import OpenRun
    from evc_fast.data.captions import CaptionSet
    from evc_fast.data.emotions import EmotionDictionary
    from evc_fast.metrics import Scores
    from evc_fast.metrics.compare import Comparison

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
    id_prefix: o.Prefixes = None,
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
    skip_missing: Annotated[
        bool,
        typer.Option(
            "--skip-missing",
            help="Score the videos that have features or captions, not all.",
        ),
    ] = False,
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
    if output is None and not compare and runs[0].is_dir():
        output = runs[0] / f"scores-{captions[0].stem}.json"
    if output is not None:
        o.require_file(output)
    references = o.read_all_captions(captions, id_prefix)
    device = o.choose_device(device)
    found = [_open(run, features, repository, device) for run in runs]
    dictionary = _dictionary(runs, found, emotions)
    references, missing = _those_to_score(references, runs, found, skip_missing)
    if missing:
        console.say(f"{counted(len(missing), 'video')} left out, {missing[0]} first")
    generated: list[dict[str, str]] = []
    for run, each in zip(runs, found, strict=True):
        if isinstance(each, dict):
            generated.append({video_id: each[video_id] for video_id in references.video_ids})
            continue
        with console.progress(f"caption by {run.name}", "videos") as update:
            generated.append(each.caption(references.video_ids, update, batch_size, num_beams))
    scores: Scores | Comparison
    if compare:
        from evc_fast.metrics.compare import compare as score

        options = {"names": tuple(map(str, runs)), "samples": samples, "seed": seed}
    else:
        from evc_fast.metrics import evaluate as score

        options = {}
    scores = score(*generated, references.references(), dictionary, meteor=meteor, **options)
    document = scores.to_dict() | {"missing": missing}
    if output is not None:
        o.write_document(output, document)
    saved = "" if output is None else f"\n{'differences' if compare else 'scores and captions'}: {output}"
    console.show(document, scores.table() + saved)


def _open(run: Path, features: Path | None, repository: Path | None, device: str) -> OpenRun | dict[str, str]:
    """A run that is to caption, or the captions of a file."""
    if run.is_file():
        from evc_fast.data.caption_files import read_hypotheses

        return read_hypotheses(run)
    from evc_fast.cli.models import open_run

    return open_run(run, features, repository, device)


def _dictionary(
    runs: Sequence[Path], found: Sequence[OpenRun | dict[str, str]], emotions: Path | None
) -> EmotionDictionary:
    """The one that is named, else that of the runs, else the package's own."""
    if emotions is not None:
        return o.read_dictionary(emotions)
    own = [each.dictionary for each in found if not isinstance(each, dict)]
    if any(each != own[0] for each in own):
        names = " and ".join(map(str, runs))
        raise UsageError(f"{names} were trained with different emotion dictionaries: name one by --emotions")
    return own[0] if own else o.read_dictionary(None)


def _those_to_score(
    references: CaptionSet, runs: Sequence[Path], found: Sequence[OpenRun | dict[str, str]], skip_missing: bool
) -> tuple[CaptionSet, list[str]]:
    """The references of the videos that every run can be scored on, and the ids of the others."""
    from evc_fast.data.captions import differing_ids
    from evc_fast.data.text_files import listed
    from evc_fast.metrics import MetricsError

    wanted = references.video_ids
    missing: dict[str, None] = {}
    for run, each in zip(runs, found, strict=True):
        if isinstance(each, dict):
            lacking, what = [video_id for video_id in wanted if video_id not in each], f"{run} has no captions"
            surplus = [video_id for video_id in each if video_id not in references]
            if surplus and not lacking and not skip_missing:
                raise MetricsError(
                    f"{run} has captions of {len(surplus)} videos without references: {listed(surplus)}; "
                    "--skip-missing leaves them out"
                )
            hint = ""
        else:
            lacking, what = each.without_features(wanted), f"{each.features.folder} has no features"
            hint = differing_ids(wanted, each.features.video_ids)
        if lacking and (not skip_missing or len(lacking) == len(wanted)):
            hint = hint if len(lacking) == len(wanted) else "; --skip-missing scores the others"
            raise MetricsError(f"{what} of {len(lacking)} of {len(wanted)} videos: {listed(lacking)}{hint}")
        missing.update(dict.fromkeys(lacking))
    rest = [video_id for video_id in wanted if video_id not in missing]
    if not rest:
        raise MetricsError("there is no video that both runs can be scored on")
    return (references.subset(rest) if missing else references), list(missing)
