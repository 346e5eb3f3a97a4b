"""The paper's ablations on the toy world, over several seeds, as they come out.

Fig. 3 (components), Table 2 (the decoders LSTM and Transformer), Table 3 (K = 1..5), Table 4 (self- and
cross-refinement) and Table 5 (order). Each model is trained on the toy world's training clips by the preset `toy`, for
fewer epochs; its best epoch on the validation clips captions the test clips. Tables give mean and standard deviation
over the seeds. The toy world is small, its sentences are of few forms and its CLIP knows it well: what a part is worth
here says little of what it is worth on videos.

    python benchmarks/ablation.py                            # 42 runs, WORK is benchmarks/results/local/ablation
    python benchmarks/ablation.py --seeds 1 --epochs 2       # a glance
    python benchmarks/ablation.py --only FACE-net "K = 1"    # these alone

Each finished run is kept in WORK/runs: broken off, the same command goes on with those that lack.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
import transformers
from _machine import describe
from _page import publish, terminal
from _report import MISSING, Table
from rich.progress import Progress

from evc_fast.data.captions import read_captions
from evc_fast.data.clip import ClipTowers
from evc_fast.data.files import write_atomically
from evc_fast.data.toy import ToyWorld, render_world
from evc_fast.data.toy.assets import CLIP_ASSETS
from evc_fast.data.toy.face_net import Prepared, prepare
from evc_fast.metrics import METRICS, evaluate
from evc_fast.model.captioner import FaceNet
from evc_fast.model_folder import MODEL
from evc_fast.ops import dispatch
from evc_fast.training.dataset import VideoBatches
from evc_fast.training.evaluation import caption_videos
from evc_fast.training.preparation import read_data
from evc_fast.training.trainer import Trainer

LOCAL = Path(__file__).resolve().parent / "results" / "local"
FULL = "FACE-net"
TITLE = "Ablations on the toy world"
_REFINED = ("self_refine", "cross_refine")


def _without(*parts: str) -> list[str]:
    overrides = [f"model.encoder.{part}=false" for part in parts]
    return [*overrides, "data.repository=null"] if "retrieval" in parts else overrides


VARIANTS: dict[str, list[str]] = {
    FULL: [],
    "none": _without("retrieval", *_REFINED, "emotion_augmentation", "bias_adjustment"),
    "RE": _without(*_REFINED, "emotion_augmentation", "bias_adjustment"),
    "RE + FC": _without("emotion_augmentation", "bias_adjustment"),
    "RE + FC + EA": _without("bias_adjustment"),
    "LSTM": ["model.decoder={name: lstm}"],
    **{f"K = {k}": [f"model.encoder.num_triplets={k}"] for k in (1, 2, 3, 5)},
    "neither SR nor CR": _without(*_REFINED),
    "SR": _without("cross_refine"),
    "CR": _without("self_refine"),
    "emotion first": ["model.encoder.order=emotion_first"],
}
"""What differs from the preset."""

STUDIES: dict[str, dict[str, str]] = {
    "Fig. 3, components": {
        "none": "none",
        "RE": "RE",
        "RE + FC": "RE + FC",
        "RE + FC + EA": "RE + FC + EA",
        "RE + FC + EA + BA": FULL,
    },
    "Table 2, decoders": {"LSTM": "LSTM", "Transformer": FULL},
    "Table 3, retrieved captions": {f"K = {k}": FULL if k == 4 else f"K = {k}" for k in range(1, 6)},
    "Table 4, factual calibration": {
        "neither": "neither SR nor CR",
        "SR": "SR",
        "CR": "CR",
        "SR + CR": FULL,
    },
    "Table 5, order": {"emotion first": "emotion first", "facts first": FULL},
}
"""Study -> label of its row -> variant."""

SAID = [
    "RE retrieval, FC factual calibration (SR self-, CR cross-refinement), EA emotion augmentation, BA bias "
    "adjustment. K = 4, the Transformer decoder and facts first where a row does not say otherwise.",
    "Nothing was tuned for any row but the preset for the whole model; the spread is that of the seeds of weights, "
    "order and dropout alone: data, CLIP and split are the same.",
]


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    first, *rest = __doc__.split("\n\n")
    parser = argparse.ArgumentParser(
        description=first, epilog="\n\n".join(rest), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="0, 1, ... (default: 3)")
    parser.add_argument("--epochs", type=int, default=6, help="of each run (default: 6)")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, metavar="VARIANT", help=", ".join(VARIANTS))
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="a.b=c", help="for all runs")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, each on its share of the threads")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--world", type=Path, help="a rendered toy world; default: WORK/world, rendered if absent")
    parser.add_argument("--clip", type=Path, default=CLIP_ASSETS, help="default: the small CLIP that ships")
    parser.add_argument("--work", type=Path, default=LOCAL / "ablation", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=LOCAL, help="of ablation.json and .md (default: %(default)s)")
    arguments = parser.parse_args(argv)
    if min(arguments.seeds, arguments.epochs, arguments.jobs, arguments.threads) < 1:
        parser.error("--seeds, --epochs, --jobs and --threads must be at least 1")
    return arguments


def run_one(prepared: Prepared, variant: str, seed: int, common: Sequence[str], work: Path, threads: int) -> dict:
    """Trains a variant and scores it on the test clips; its record, kept in `work`/runs."""
    torch.set_num_threads(threads)
    begin = time.perf_counter()
    name = _file_name(variant, seed)
    output = work / "training" / name
    shutil.rmtree(output, ignore_errors=True)
    overrides = [*common, *VARIANTS[variant], f"seed={seed}"]
    config = prepared.config(output, overrides)
    data = read_data(config)
    trainer = Trainer(config, data)
    run = trainer.fit()
    trained = time.perf_counter()
    references = read_captions(prepared.captions("test"))
    videos = VideoBatches(references.video_ids, data.features, data.repository, config.model.encoder.num_triplets)
    captions = caption_videos(FaceNet.from_pretrained(run.best / MODEL), videos, range(len(videos)))
    scores = evaluate(captions, references.references(), data.dictionary, meteor=False)
    record = {
        "variant": variant,
        "seed": seed,
        "settings": settings_digest(prepared, overrides),
        "overrides": overrides,
        "scores": scores.overall,
        "validation_cfs": run.best_score,
        "best_step": run.best_step,
        "steps": run.steps,
        "parameters": trainer.model.trainable_parameters(),
        "seconds": {"training": trained - begin, "test": time.perf_counter() - trained},
        "captions": captions,
    }
    path = work / "runs" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(record, indent=1) + "\n").encode())
    shutil.rmtree(output)
    return record


def settings_digest(prepared: Prepared, overrides: Sequence[str]) -> str:
    """Of all that decides a run's figures: its resolved configuration, without its folders, and the data."""
    tree = prepared.config(Path("run"), overrides).model_dump(mode="json")
    data = {key: value for key, value in tree["data"].items() if not isinstance(value, str | list)}
    decisive = {**tree, "data": data, "output": None, "retrieval": tree["data"]["repository"] is not None}
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode())
    for file in (prepared.features / "manifest.json", prepared.repository / "manifest.json"):
        digest.update(file.read_bytes())
    for split in ("train", "val", "test"):
        digest.update(prepared.captions(split).read_bytes())
    return digest.hexdigest()


def _file_name(variant: str, seed: int) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in variant) + f"-{seed}"


def kept(prepared: Prepared, variant: str, seed: int, common: Sequence[str], work: Path) -> dict | None:
    """The record of a run that was finished with the same settings and data."""
    path = work / "runs" / f"{_file_name(variant, seed)}.json"
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    digest = settings_digest(prepared, [*common, *VARIANTS[variant], f"seed={seed}"])
    return record if record["settings"] == digest else None


def results(
    prepared: Prepared, wanted: Sequence[tuple[str, int]], common: Sequence[str], arguments: argparse.Namespace
) -> Iterator[dict]:
    """The records of all wanted runs, those that are there first."""
    missing = []
    for variant, seed in wanted:
        record = kept(prepared, variant, seed, common, arguments.work)
        if record is None:
            missing.append((variant, seed))
        else:
            yield record
    threads = max(1, arguments.threads // arguments.jobs)
    if arguments.jobs == 1:
        for variant, seed in missing:
            yield run_one(prepared, variant, seed, common, arguments.work, threads)
        return
    # Spawned: a fork would inherit the locks of threads.
    with ProcessPoolExecutor(arguments.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        tasks = [pool.submit(run_one, prepared, *run, common, arguments.work, threads) for run in missing]
        try:
            for task in as_completed(tasks):
                yield task.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def summarise(records: Sequence[dict]) -> dict[str, dict[str, Any]]:
    """Variant -> its seeds, and of each metric mean and standard deviation (None of one seed)."""
    summary: dict[str, dict[str, Any]] = {}
    for variant in VARIANTS:
        found = sorted((record for record in records if record["variant"] == variant), key=lambda r: r["seed"])
        if not found:
            continue
        summary[variant] = {"seeds": [record["seed"] for record in found], "parameters": found[0]["parameters"]}
        for metric in METRICS:
            values = [record["scores"][metric] for record in found]
            if None in values:
                continue
            spread = statistics.stdev(values) if len(values) > 1 else None
            summary[variant][metric] = {"mean": statistics.fmean(values), "deviation": spread}
    return summary


def study_tables(summary: dict[str, dict[str, Any]]) -> list[Table]:
    """A table a study; rows that were not run are left out."""
    shown = []
    metrics = [metric for metric in METRICS if all(metric in found for found in summary.values())]
    for study, rows in STUDIES.items():
        cells = [
            [label, *(_cell(summary[variant][metric]) for metric in metrics), str(len(summary[variant]["seeds"]))]
            for label, variant in rows.items()
            if variant in summary
        ]
        if len(cells) > 1:
            shown.append(Table(study, ["", *metrics, "seeds"], cells, verdicts(summary, rows)))
    return shown


def verdicts(summary: dict[str, dict[str, Any]], rows: dict[str, str]) -> list[str]:
    """For CFS and Acc_sw: how far each row is from the paper's model, in standard errors of the difference."""
    if FULL not in summary:
        return []
    notes = []
    for label, variant in rows.items():
        if variant == FULL or variant not in summary:
            continue
        said = []
        for metric in ("CFS", "Acc_sw"):
            one, full = summary[variant][metric], summary[FULL][metric]
            gap = one["mean"] - full["mean"]
            text = f"{metric} {gap:+.1f}"
            if one["deviation"] is not None and full["deviation"] is not None:
                error = math.hypot(
                    one["deviation"] / math.sqrt(len(summary[variant]["seeds"])),
                    full["deviation"] / math.sqrt(len(summary[FULL]["seeds"])),
                )
                text += f" (standard error {error:.1f})"
            said.append(text)
        notes.append(f"{label} against the whole model: {', '.join(said)}.")
    return notes


def _cell(value: dict[str, float | None]) -> str:
    spread = value["deviation"]
    return f"{value['mean']:.1f} ± {MISSING if spread is None else format(spread, '.1f')}"


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    torch.set_num_threads(arguments.threads)
    transformers.logging.disable_progress_bar()
    console = terminal(160)
    machine = describe("cpu", arguments.threads) | {"kernels_isa": dispatch.cpu_isa()}
    arguments.work.mkdir(parents=True, exist_ok=True)
    variants = arguments.only or list(VARIANTS)
    # Seed by seed, so that what is broken off has all rows.
    wanted = [(variant, seed) for seed in range(arguments.seeds) for variant in variants]
    epochs = f"trainer.epochs={arguments.epochs}"
    common = [epochs, "trainer.tensorboard=false", "trainer.save_every=null", "trainer.keep=1", *arguments.overrides]
    records: list[dict] = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("preparing")

        def report(what: str, done: int, total: int, _: str = "") -> None:
            progress.update(task, description=what, completed=done, total=total)

        folder = arguments.world or arguments.work / "world"
        if arguments.world is None and not (folder / "world.json").exists():
            render_world(folder, progress=lambda done, total: report("rendering", done, total))
        world = ToyWorld.load(folder)
        prepared = prepare(world, ClipTowers.from_pretrained(arguments.clip), arguments.work, report=report)
        for record in results(prepared, wanted, common, arguments):
            records.append(record)
            if not console.is_terminal:
                scores = ", ".join(f"{metric} {record['scores'][metric]:.1f}" for metric in ("Acc_sw", "CIDEr", "CFS"))
                console.print(
                    f"{len(records)} of {len(wanted)}: {record['variant']}, seed {record['seed']}: {scores}; "
                    f"{sum(record['seconds'].values()):.0f} s",
                    highlight=False,
                )
            report("training", len(records), len(wanted))
            last = len(records) == len(wanted)
            write_page(console if last else None, arguments, machine, world, records)
    return 0


def write_page(console, arguments: argparse.Namespace, machine: dict, world: ToyWorld, records: list[dict]) -> None:
    """After each run: what is known so far."""
    summary = summarise(records)
    slim = [{key: value for key, value in record.items() if key != "captions"} for record in records]
    counts = {split: len(world.of(split)) for split in ("train", "val", "test")}
    report = {"machine": machine, "world": {"seed": world.seed, "clips": counts}, "summary": summary, "runs": slim}
    seconds = sum(sum(record["seconds"].values()) for record in records)
    said = [
        f"{len(records)} runs, {seconds / 60:.0f} minutes of training and test in all, {arguments.jobs} at once; at "
        f"most {arguments.epochs} epochs each on {counts['train']} clips, the best of them on {counts['val']} "
        f"validation clips by CFS, scored on {counts['test']} test clips of unseen combinations. In percent, mean ± "
        "standard deviation over the seeds; METEOR is left out.",
        *([f"Changed for all runs: {', '.join(arguments.overrides)}."] if arguments.overrides else []),
        *SAID,
    ]
    publish(console, arguments.out, "ablation", TITLE, report, study_tables(summary), said)


if __name__ == "__main__":
    sys.exit(main())
