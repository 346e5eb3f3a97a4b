"""What the shipped toy model reaches on the toy world's test clips, beside retrieval alone.

The test clips show combinations of subject, action and emotion that are in no training clip. Three sets of captions are
scored: the model's; the repository's caption that is nearest to the clip; the model's where each clip is given what was
retrieved for another one. The differences have 95 % intervals by a paired bootstrap over the clips. Beside that, what
the small CLIP tells without any training, and what linear probes can guess that see no face, posture or motion.

    python benchmarks/toy.py                      # renders the world anew, a minute on two cores
    python benchmarks/toy.py --world WORLD        # a world that is there
    python benchmarks/toy.py --model OUT/assets/model
    python benchmarks/toy.py --together A B C     # folders of such runs, of several seeds: their clips as one set
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from _machine import describe
from _page import publish, terminal
from _report import MISSING, Table
from rich.console import Console
from rich.progress import Progress

from evc_fast import Captioner
from evc_fast.captioner import TOY_MODEL
from evc_fast.data.captions import read_captions
from evc_fast.data.emotions import EmotionDictionary
from evc_fast.data.features import FeatureStore, extract_features
from evc_fast.data.toy import ToyWorld, plan_world, render_world
from evc_fast.data.toy.assets import zero_shot
from evc_fast.data.toy.evaluation import FACE_NET, NEAREST, SHUFFLED, caption_test_clips
from evc_fast.data.toy.probes import probe_emotions
from evc_fast.data.toy.sentences import describe as describe_scene
from evc_fast.data.toy.small_clip import FACTS, load_frames
from evc_fast.metrics import METRICS, evaluate
from evc_fast.metrics.compare import Comparison, compare
from evc_fast.ops import dispatch
from evc_fast.training.dataset import VideoBatches

ZERO_SHOT_TARGET, CHANCE_FACTOR = 0.70, 2
TITLE = "The toy model on the toy world's test clips"
COMPARED = ((NEAREST, FACE_NET), (FACE_NET, SHUFFLED))
JUDGED = ("CIDEr", "Acc_sw")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    first, *rest = __doc__.split("\n\n")
    parser = argparse.ArgumentParser(
        description=first, epilog="\n\n".join(rest), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=TOY_MODEL, help="default: the one that ships")
    parser.add_argument("--world", type=Path, help="a rendered world of the model's seed; default: rendered anew")
    parser.add_argument("--together", type=Path, nargs="+", metavar="FOLDER", help="with the toy.json of earlier runs")
    parser.add_argument("--limit", type=int, help="clips of each split, for a trial")
    parser.add_argument("--samples", type=int, default=1000, help="of the bootstrap (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of bootstrap and shuffling (default: 0)")
    parser.add_argument("--no-meteor", dest="meteor", action="store_false", help="METEOR needs Java")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "local")
    return parser.parse_args(argv)


def measure(arguments: argparse.Namespace, folder: Path, progress: Progress) -> dict:
    """Scores, comparisons, zero-shot shares and probes; whatever is written on the way goes into `folder`."""
    manifest = json.loads((arguments.model / "manifest.json").read_text(encoding="utf-8"))
    task = progress.add_task("rendering")

    def tell(what: str):
        return lambda done, total: progress.update(task, description=what, completed=done, total=total)

    if arguments.world is None:
        world = render_world(folder / "world", seed=manifest["seed"], limit=arguments.limit, progress=tell("rendering"))
    else:
        world = ToyWorld.load(arguments.world)
    if world.seed != manifest["seed"]:
        raise ValueError(f"{world.folder} is of seed {world.seed}, the model was trained on seed {manifest['seed']}")
    captioner = Captioner.from_pretrained(None if arguments.model == TOY_MODEL else arguments.model)
    pipeline, scenes = captioner.pipeline, world.of("test")
    extract_features(
        {scene.video_id: world.video(scene) for scene in scenes},
        pipeline.towers,
        folder / "features",
        progress=tell("encoding clips"),
    )
    references = read_captions(world.folder / "captions_test.csv")
    store = FeatureStore.open(folder / "features")
    repository, model = pipeline.repository, pipeline.model
    progress.update(task, description="captioning", total=None)
    videos = VideoBatches(references.video_ids, store, repository, model.encoder.config.num_triplets)
    made = caption_test_clips(model, videos, repository, seed=arguments.seed)
    progress.update(task, description="scoring")
    options = {"meteor": arguments.meteor}
    texts = references.references()
    scores = {name: evaluate(captions, texts, captioner.dictionary, **options) for name, captions in made.items()}
    options |= {"samples": arguments.samples, "seed": arguments.seed}
    comparisons = [compare(made[a], made[b], texts, captioner.dictionary, names=(a, b), **options) for a, b in COMPARED]
    frames = {split: load_frames(world, split, progress=tell(f"reading {split}")) for split in ("train", "test")}
    return {
        "manifest": manifest,
        "clips": len(scenes),
        "scores": {name: found.overall for name, found in scores.items()},
        "notes": list(dict.fromkeys(note for found in scores.values() for note in found.notes)),
        "comparisons": comparisons,
        "zero_shot": zero_shot(pipeline.towers, frames["test"], scenes),
        "probes": probe_emotions(frames["train"], world.of("train"), frames["test"], scenes),
        "captions": made,
        "asset_bytes": asset_bytes(arguments.model),
    }


def asset_bytes(model: Path) -> int:
    """Of the model's folder and its CLIP's."""
    folders = (model, model.parent / "clip")
    return sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())


def tables(found: dict) -> list[Table]:
    """Scores, differences, and what CLIP and probes tell."""

    def figure(value: float | None, form: str = ".1f") -> str:
        return MISSING if value is None else format(value, form)

    rows = [[name, *(figure(scores[metric]) for metric in METRICS)] for name, scores in found["scores"].items()]
    shown = [Table(f"{found['clips']} test clips, in percent", ["captions", *METRICS], rows, found["notes"])]
    for comparison in found["comparisons"]:
        first, second = comparison.names
        rows = [
            [metric, f"{d.first:.1f}", f"{d.second:.1f}", f"{d.difference:+.1f}", f"{d.low:+.1f} .. {d.high:+.1f}"]
            for metric, d in comparison.differences.items()
            if d is not None
        ]
        shown.append(
            Table(
                f"{second} against {first}",
                ["metric", first, second, "difference", f"{100 * comparison.level:g} % interval"],
                rows,
                [f"{comparison.samples} paired bootstrap samples, seed {comparison.seed}"],
            )
        )
    rows = [
        [fact, f"{100 * share:.1f}", f"{100 / len(FACTS[fact]):.1f}", str(len(FACTS[fact]))]
        for fact, share in found["zero_shot"].items()
    ]
    shown.append(Table("Zero-shot of the small CLIP, in percent", ["fact", "right", "chance", "choices"], rows))
    chance = 100 / len(FACTS["emotion"])
    rows = [[name, f"{100 * share:.1f}", f"{chance:.1f}"] for name, share in found["probes"].items()]
    shown.append(Table("Linear probes for emotion, in percent", ["what they see", "right", "chance"], rows))
    return shown


def above_and_below(comparisons: Sequence[Comparison]) -> list[tuple[str, bool]]:
    """A sentence for each target of the captions, and whether it is reached.

    That shuffled retrieval lowers CIDEr is judged by the figure; the sentence says where chance could do it too.
    """
    against_nearest, shuffled = (comparison.differences for comparison in comparisons)
    said = [
        (
            f"{metric} above that of the nearest caption, interval without 0: {against_nearest[metric].difference:+.1f}"
            f" ({against_nearest[metric].low:+.1f} .. {against_nearest[metric].high:+.1f})",
            against_nearest[metric].low > 0,
        )
        for metric in JUDGED
    ]
    lower = shuffled["CIDEr"]
    said.append(
        (
            f"shuffled retrieval lowers CIDEr: {lower.difference:+.1f} ({lower.low:+.1f} .. {lower.high:+.1f}"
            f"{'' if lower.excludes_zero else ', which chance could do too'})",
            lower.difference < 0,
        )
    )
    return said


def targets(found: dict) -> list[tuple[str, bool]]:
    """A sentence for each target, and whether it is reached."""
    said = above_and_below(found["comparisons"])
    share = found["zero_shot"]["emotion"]
    said.append(
        (
            f"zero-shot emotion of the CLIP at least {ZERO_SHOT_TARGET:.0%} on unseen combinations: {share:.1%}",
            share >= ZERO_SHOT_TARGET,
        )
    )
    limit, best = CHANCE_FACTOR / len(FACTS["emotion"]), max(found["probes"].values())
    said.append((f"probes on mean colour and thumbnail below twice chance, {limit:.1%}: {best:.1%}", best < limit))
    size = found["asset_bytes"] / 1e6
    said.append((f"CLIP and model together at most 10 MB: {size:.2f} MB", size <= 10))
    return said


def put_together(folders: Sequence[Path], *, samples: int, seed: int, meteor: bool) -> dict:
    """The captions of several runs, each on the whole test set of its own world, compared as those of one set.

    References are the worlds' own, which follow from their seeds. Raises ValueError where a run is of other clips, or
    two are of one seed.
    """
    made: dict[str, dict[str, str]] = {FACE_NET: {}, SHUFFLED: {}, NEAREST: {}}
    references: dict[str, list[str]] = {}
    runs: dict[int, dict] = {}
    for folder in folders:
        run = json.loads((folder / "toy.json").read_text(encoding="utf-8"))
        world = run["manifest"]["seed"]
        scenes = [scene for scene in plan_world(world) if scene.split == "test"]
        if world in runs:
            raise ValueError(f"{folder} is of seed {world}, as another folder is")
        if {scene.video_id for scene in scenes} != run["captions"][FACE_NET].keys():
            raise ValueError(f"{folder} has captions of other clips than the test clips of seed {world}")
        runs[world] = run
        references |= {f"{world}/{s.video_id}": [each.text for each in describe_scene(s)] for s in scenes}
        for name, captions in made.items():
            captions |= {f"{world}/{video_id}": text for video_id, text in run["captions"][name].items()}
    options = {"samples": samples, "seed": seed, "meteor": meteor}
    dictionary = EmotionDictionary.default()
    comparisons = [compare(made[a], made[b], references, dictionary, names=(a, b), **options) for a, b in COMPARED]
    return {"seeds": sorted(runs), "clips": len(references), "runs": runs, "comparisons": comparisons}


def tables_of_seeds(found: dict) -> list[Table]:
    """Each comparison, a row for each seed and one for all together."""
    shown = []
    for place, ((first, second), together) in enumerate(zip(COMPARED, found["comparisons"], strict=True)):
        by_seed = {str(seed): found["runs"][seed]["comparisons"][place]["differences"] for seed in found["seeds"]}
        by_seed["together"] = {name: found and vars(found) for name, found in together.differences.items()}
        rows = []
        for name, differences in by_seed.items():
            cells = [name]
            for metric in JUDGED:
                of = differences[metric]
                cells += [f"{of['first']:.1f}", f"{of['second']:.1f}"]
                cells.append(f"{of['difference']:+.1f} ({of['low']:+.1f} .. {of['high']:+.1f})")
            rows.append(cells)
        head = [column for metric in JUDGED for column in (f"{metric}, {first}", second, "difference")]
        shown.append(Table(f"{second} against {first}", ["seed", *head], rows, []))
    return shown


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    torch.set_num_threads(arguments.threads)
    transformers.logging.disable_progress_bar()
    console = terminal(140)
    machine = describe("cpu", arguments.threads) | {"kernels_isa": dispatch.cpu_isa()}
    if arguments.together:
        options = {"samples": arguments.samples, "seed": arguments.seed, "meteor": arguments.meteor}
        found = put_together(arguments.together, **options)
        judged = above_and_below(found["comparisons"])
        shown = tables_of_seeds(found)
        del found["runs"]
        said = [
            f"Seeds {', '.join(map(str, found['seeds']))}, each of a world, its CLIP and its captioner; "
            f"{found['clips']} test clips.",
            f"95 % intervals by {arguments.samples} paired bootstrap samples of the clips.",
        ]
        return finish(
            console, arguments.out, "toy_seeds", f"{TITLE}, of several seeds", found, machine, shown, said, judged
        )
    with (
        tempfile.TemporaryDirectory(prefix="evc_fast-toy-") as folder,
        Progress(console=console, transient=True) as bar,
    ):
        found = measure(arguments, Path(folder), bar)
    judged = targets(found)
    manifest = found["manifest"]
    said = [
        f"Model: seed {manifest['seed']}, step {manifest['training']['best_step']}, "
        f"{manifest['training']['epochs']} epochs. Beam 5; a clip's own captions are never retrieved for it.",
        "Shuffled retrieval: each clip is given captions, triplets and similarities of another test clip.",
    ]
    return finish(console, arguments.out, "toy", TITLE, found, machine, tables(found), said, judged)


def finish(
    console: Console,
    out: Path,
    stem: str,
    title: str,
    found: dict,
    machine: dict,
    shown: Sequence[Table],
    said: Sequence[str],
    judged: Sequence[tuple[str, bool]],
) -> int:
    """Print and write it all; 0 where every target is reached, else 1."""
    report = {"machine": machine, **found, "comparisons": [each.to_dict() for each in found["comparisons"]]}
    report["targets"] = [{"target": text, "reached": reached} for text, reached in judged]
    lines = [f"{text}: {'reached' if reached else 'missed'}" for text, reached in judged]
    publish(console, out, stem, title, report, shown, said, lines)
    return 0 if all(reached for _, reached in judged) else 1


if __name__ == "__main__":
    sys.exit(main())
