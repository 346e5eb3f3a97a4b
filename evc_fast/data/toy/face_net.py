"""The toy world's FACE-net: features, repository, training by the preset `toy`, and the folder that ships."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evc_fast.data.captions import read_captions
from evc_fast.data.features import FeatureStore, extract_features
from evc_fast.data.files import replacing_folder, write_json
from evc_fast.data.toy.assets import versions
from evc_fast.data.toy.evaluation import FACE_NET, NEAREST, caption_test_clips
from evc_fast.data.toy.world import ToyWorld
from evc_fast.metrics import Scores, evaluate
from evc_fast.metrics.compare import compare
from evc_fast.model.captioner import FaceNet
from evc_fast.model_card import FrozenPart, model_card
from evc_fast.model_folder import MODEL, write_model_folder
from evc_fast.training.config import RunConfig, load_config
from evc_fast.training.dataset import VideoBatches
from evc_fast.training.preparation import RunData, read_data
from evc_fast.training.saving import run_facts
from evc_fast.training.trainer import RunResult, Trainer

if TYPE_CHECKING:
    from evc_fast.data.clip import ClipTowers

PRESET = "toy"
NAME = "the captioner of the toy world"
_DECIMALS = 2

Report = Callable[[str, int, int, str], None]


@dataclass(frozen=True)
class Prepared:
    """What training reads, in a folder: frame features of all clips, and the repository of the training captions."""

    world: ToyWorld
    features: Path
    repository: Path
    clip: Path

    def captions(self, split: str) -> Path:
        """File of the captions of "train", "val" or "test"."""
        return self.world.folder / f"captions_{split}.csv"

    def config(self, output: Path, overrides: Sequence[str] = ()) -> RunConfig:
        """The preset `toy` on these data; a run into the folder `output`."""
        values = {
            "data.captions": f"[{{path: '{self.captions('train')}'}}]",
            "data.validation_captions": f"[{{path: '{self.captions('val')}'}}]",
            "data.features": f"'{self.features}'",
            "data.repository": f"'{self.repository}'",
            "data.clip": f"'{self.clip}'",
            "output": f"'{output}'",
        }
        return load_config(PRESET, [*(f"{key}={value}" for key, value in values.items()), *overrides])


def prepare(world: ToyWorld, towers: ClipTowers, folder: Path, *, report: Report | None = None) -> Prepared:
    """Encodes all clips of the world, and the training captions with their triplets, into `folder`.

    towers: of a folder; what is there of the same towers is kept. `report(what, done, total, "")` tells progress.
    Raises ImportError where spaCy or its model is not installed, FeatureMismatch where `folder` is of other towers.
    """
    from evc_fast.data.index import build_repository

    features, repository = folder / "features", folder / "repository"
    videos = {scene.video_id: world.video(scene) for scene in world.scenes}
    told = None if report is None else lambda done, total: report("encoding clips", done, total, "")
    extract_features(videos, towers, features, progress=told)
    prepared = Prepared(world, features, repository, Path(towers.name))
    stages = None if report is None else lambda stage, done, total: report(stage, done, total, "")
    built = build_repository(read_captions(prepared.captions("train")), towers, index="flat", progress=stages)
    built.save(repository)
    return prepared


def train(
    prepared: Prepared, output: Path, *, overrides: Sequence[str] = (), report: Report | None = None
) -> RunResult:
    """Trains a FACE-net by the preset; `overrides` as of `load_config`. Errors as of `Trainer`."""

    def listen(record: dict[str, Any]) -> None:
        if report is not None and record["kind"] == "validation":
            scores = record["scores"]
            note = f"validation CIDEr {scores['CIDEr']:.1f}, Acc_sw {scores['Acc_sw']:.1f}, CFS {scores['CFS']:.1f}"
            report("training FACE-net, epochs", record["epoch"], config.trainer.epochs, note)

    config = prepared.config(output, overrides)
    return Trainer(config, listener=listen).fit()


def build_model(prepared: Prepared, run: RunResult, folder: Path, *, clip: str, seed: int) -> dict[str, Any]:
    """Writes the model folder of a run's best model, in place of what `folder` held; what its manifest.json says.

    The model is measured on the test clips, beside the caption that is retrieved first.
    clip: where its CLIP lies, from `folder` on.
    """
    config = load_config(run.folder / "config.yaml")
    data = read_data(config)
    model = FaceNet.from_pretrained(run.best / MODEL)
    references = read_captions(prepared.captions("test"))
    videos = VideoBatches(
        references.video_ids, FeatureStore.open(prepared.features), data.repository, config.model.encoder.num_triplets
    )
    made = caption_test_clips(model, videos, data.repository, seed=seed)
    of_model = evaluate(made[FACE_NET], references.references(), data.dictionary, meteor=False)
    gain = compare(made[NEAREST], made[FACE_NET], references.references(), data.dictionary, meteor=False)
    manifest = {
        "what": f"{NAME} of evc_fast.data.toy: a FACE-net trained on its training clips only",
        "command": f"python -m evc_fast.data.toy build OUT --seed {seed}",
        "seed": seed,
        "recipe": {
            "preset": PRESET,
            "model": config.model.model_dump(mode="json"),
            "loss": config.loss.model_dump(mode="json"),
            "optimiser": config.optimiser.model_dump(mode="json"),
            "trainer": config.trainer.model_dump(mode="json"),
            "triplets": data.repository.triplet_extractor,
        },
        "versions": versions("spacy", "accelerate", "pycocoevalcap"),
        "training": {
            "epochs": run.epochs,
            "steps": run.steps,
            "best_step": run.best_step,
            "stopped_early": run.stopped_early,
            "validation_cfs": _rounded(run.best_score),
        },
        "metrics": {
            "test": {name: _rounded(value) for name, value in of_model.overall.items()},
            "nearest_caption_test": {name: found and _rounded(found.first) for name, found in gain.differences.items()},
            "gain_over_nearest_caption": {
                name: found and {key: _rounded(getattr(found, key)) for key in ("difference", "low", "high")}
                for name, found in gain.differences.items()
            },
        },
    }
    _write(folder, model, data, config, run, of_model, clip, manifest)
    return manifest


def _write(
    folder: Path,
    model: FaceNet,
    data: RunData,
    config: RunConfig,
    run: RunResult,
    scores: Scores,
    clip: str,
    manifest: dict[str, Any],
) -> None:
    facts = dataclasses.replace(
        run_facts(model, data, config, step=run.best_step, scores=scores.overall),
        name=NAME,
        metrics_of=f"the test clips, {len(scores.per_video)} of them, with combinations of subject, action and emotion "
        f"that are not in the training data; step {run.best_step}, beam 5",
        frozen=(FrozenPart("the small CLIP of the toy world", "features of frames, captions, triplets", "MIT"),),
        notes=("It knows short clips of drawn people and animals and nothing else.",),
        terms="So are the weights of encoder and decoder: evc_fast drew and wrote their training data itself.",
    )
    with replacing_folder(folder) as partial:
        write_model_folder(
            partial,
            model=model,
            repository=data.repository,
            dictionary=data.dictionary,
            clip=clip,
            clip_fingerprint=data.features.fingerprint,
            card=model_card(facts),
        )
        sizes = {str(p.relative_to(partial)): p.stat().st_size for p in sorted(partial.rglob("*")) if p.is_file()}
        manifest["bytes"] = sizes | {"all": sum(sizes.values())}
        write_json(partial / "manifest.json", manifest)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, _DECIMALS)
