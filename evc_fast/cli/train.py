"""`evc-fast train`: a configuration to a trained captioner."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evc_fast.cli import options as o
from evc_fast.cli.command import UsageError, command
from evc_fast.cli.console import Console, StageUpdate, counted, is_main_process

if TYPE_CHECKING:
    from evc_fast.training.config import RunConfig

_EXAMPLE = """
evc-fast train toy --captions captions_train.csv --features features --repository repository --clip toy -o run
evc-fast train evc-msvd --set 'model.decoder={name: transformer}' --set trainer.epochs=10 ... -o run
evc-fast train run --resume
torchrun --nproc-per-node 2 -m evc_fast.cli train my.yaml -o run
"""


def register(app: typer.Typer) -> None:
    command(app, "train", example=_EXAMPLE, resumes="--resume goes on from the run's newest checkpoint")(train)


def train(
    console: Console,
    config: Annotated[
        str,
        typer.Argument(
            help="YAML file, preset (toy, evc-msvd, evc-ve, evc-combine), or folder of a run to go on with."
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the run.", show_default=False)
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Change a key, as trainer.epochs=5; may be given several times."
        ),
    ] = None,
    captions: Annotated[
        list[Path] | None,
        typer.Option(
            "--captions",
            metavar="<path>",
            help="Training captions: data.captions; may be given several times.",
            show_default=False,
        ),
    ] = None,
    validation: Annotated[
        list[Path] | None,
        typer.Option(
            "--validation",
            metavar="<path>",
            help="Validation captions; else a share of the training videos is set apart.",
        ),
    ] = None,
    id_prefix: o.Prefixes = None,
    features: Annotated[Path | None, typer.Option("--features", help="By `evc-fast features`: data.features.")] = None,
    repository: Annotated[
        Path | None, typer.Option("--repository", help="By `evc-fast index`: data.repository.")
    ] = None,
    clip: Annotated[
        str | None, typer.Option("--clip", help="The CLIP of features and repository: folder, hub name, or `toy`.")
    ] = None,
    quarantine: Annotated[
        Path | None, typer.Option("--quarantine", help="List by `evc-fast data check`: data.quarantine.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint of the run.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the configuration as it is resolved, and stop.")
    ] = False,
) -> None:
    """Train a captioner.

    The one that is best on validation videos is kept. The options for data stand for keys of the configuration;
    --set changes any other. The configuration as it was resolved is saved with the run: config.yaml. The trained
    model is OUTPUT/best.
    """
    console.quiet = not is_main_process()
    training, held_out = captions or [], validation or []
    if id_prefix and not (training or held_out):
        raise UsageError("--id-prefix goes with --captions; a configuration has data.captions.0.id_prefix")
    files = _files([*training, *held_out], id_prefix)
    given = {
        "output": output,
        "data.captions": files[: len(training)] or None,
        "data.validation_captions": files[len(training) :] or None,
        "data.features": features,
        "data.repository": repository,
        "data.clip": None if clip is None else o.clip_source(clip),
        "data.quarantine": quarantine,
    }
    resolved = resolve(config, given, settings or ())
    if dry_run:
        console.show(resolved.model_dump(mode="json"), resolved.to_yaml().rstrip())
        return
    if resolved.output is None:
        raise UsageError("name the folder of the run by --output")
    o.work_offline(resolved.data.clip, resolved.model.decoder.checkpoint)
    from evc_fast.training.trainer import Trainer

    o.silence_transformers()
    with console.stages("steps") as update:
        listener = _Listener(console, update, resolved.trainer.epochs)
        result = Trainer(resolved, listener=listener, validating=listener.validating).fit(resume=resume)
    if not is_main_process():
        return
    scores = listener.best_scores
    data = {
        "run": str(result.folder),
        "model": str(result.best),
        "steps": result.steps,
        "epochs": result.epochs,
        "stopped_early": result.stopped_early,
        "best_step": result.best_step,
        "best_cfs": result.best_score,
        "validation": scores,
        "skipped": list(result.skipped),
    }
    lines = [f"{counted(result.epochs, 'epoch')}, {counted(result.steps, 'step')}"]
    if result.stopped_early:
        lines[0] += ", stopped early"
    if scores is not None:
        shown = ", ".join(f"{name} {value:.1f}" for name, value in scores.items() if value is not None)
        lines.append(f"best on validation, step {result.best_step}: {shown}")
    elif result.best_score is not None:  # a run that an earlier command had all but finished
        lines.append(f"best on validation, step {result.best_step}: CFS {result.best_score:.1f}")
    if result.skipped:
        lines.append(f"{counted(len(result.skipped), 'video')} not used")
    lines.append(f"model: {result.best}")
    console.show(data, "\n".join(lines))


def resolve(config: str, given: dict[str, Any], settings: Sequence[str]) -> RunConfig:
    """The configuration of a file, preset or run's folder, changed by options and then by `--set`.

    given: key -> value of the options; None where an option was left out.
    """
    from evc_fast.training.config import load_config

    source = Path(config, "config.yaml") if Path(config, "config.yaml").is_file() else config
    # JSON is YAML, and keeps what looks like a number or a comment a string.
    overrides = [
        f"{key}={json.dumps(value if isinstance(value, list) else os.fspath(value))}"
        for key, value in given.items()
        if value is not None
    ]
    return load_config(source, [*overrides, *settings])


def _files(paths: Sequence[Path], prefixes: Sequence[str] | None) -> list[dict[str, str]]:
    pairs = zip(paths, o.id_prefixes(paths, prefixes), strict=True)
    return [{"path": str(path)} | ({"id_prefix": prefix} if prefix else {}) for path, prefix in pairs]


class _Listener:
    """Turns the records of a run's log into progress and remarks."""

    def __init__(self, console: Console, update: StageUpdate, epochs: int) -> None:
        self._console = console
        self._update = update
        self._epochs = epochs
        self._step = self._total = 0
        self.best_scores: dict[str, float | None] | None = None

    def __call__(self, record: dict[str, Any]) -> None:
        kind, self._step = record["kind"], record["step"]
        if kind == "start":
            self._total = self._epochs * record["batches_an_epoch"]
            self._console.say(
                f"{'going on at step ' + str(record['step']) if record['resumed'] else 'training'}: "
                f"{counted(record['captions'], 'caption')} of {counted(record['videos'], 'video')}, "
                f"{record['validation_videos']} for validation, {record['parameters']:,} parameters"
                + (f", {record['processes']} processes" if record["processes"] > 1 else "")
            )
            self._update("training", record["step"], self._total)
        elif kind == "step":
            note = f"epoch {record['epoch'] + 1} of {self._epochs}, loss {record['loss']:.3f}"
            self._update("training", record["step"], self._total, note)
        elif kind == "validation":
            shown = ", ".join(f"{name} {record['scores'][name]:.1f}" for name in ("CFS", "CIDEr", "BLEU-4", "Acc_sw"))
            best = ""
            if record["best"]:
                self.best_scores, best = record["scores"], ", the best so far"
            self._console.say(f"epoch {record['epoch']}, validation: {shown}{best}")

    def validating(self, done: int, total: int) -> None:
        """Told of the validation videos that have been captioned."""
        self._update("training", self._step, self._total, f"validating, {done} of {counted(total, 'video')}")
