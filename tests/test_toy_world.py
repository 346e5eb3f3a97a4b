"""The toy world: its clips, its captions, its split, and that emotion cannot be guessed from colours."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from evc_fast.data.captions import read_captions
from evc_fast.data.emotions import EmotionDictionary
from evc_fast.data.toy import ToyWorld, ToyWorldError, plan_world, render_world
from evc_fast.data.toy.actions import ACTIONS
from evc_fast.data.toy.drawing import Pen
from evc_fast.data.toy.faces import EXPRESSIONS
from evc_fast.data.toy.figures import SUBJECTS
from evc_fast.data.toy.places import PLACES
from evc_fast.data.toy.probes import emotion_labels, linear_probe, probe_emotions
from evc_fast.data.toy.scenes import FRAMES, SIZE, Scene, draw_scene, locate_figure
from evc_fast.data.toy.sentences import EMOTION_WORDS, FORMS, NOUNS, SHARES, VERBS, Sentence, describe, fill, kind_of
from evc_fast.data.toy.world import SPLITS, write_clip
from evc_fast.data.video import read_frames
from evc_fast.model.decoders.vocabulary import caption_words

CATEGORIES = {
    "happy": "joy",
    "sad": "sadness",
    "angry": "anger",
    "afraid": "fear",
    "surprised": "surprise",
    "disgusted": "disgust",
    "calm": "calm",
    "loving": "love",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> ToyWorld:
    return render_world(tmp_path_factory.mktemp("toy") / "world", limit=2, workers=1)


@pytest.fixture(scope="module")
def described() -> list[tuple[Scene, list[Sentence]]]:
    return [(scene, describe(scene)) for scene in plan_world(0)]


def combination(scene: Scene) -> tuple[str, str, str]:
    return scene.subject, scene.action, scene.emotion


def test_plan_is_large_enough_and_split_by_combination() -> None:
    scenes = plan_world(0)
    of = {split: [scene for scene in scenes if scene.split == split] for split in SPLITS}
    assert {split: len(clips) for split, clips in of.items()} == {"train": 960, "val": 80, "test": 240}
    assert len(SUBJECTS) >= 8 and len(ACTIONS) >= 10 and len(EXPRESSIONS) >= 8 and len(PLACES) >= 3
    for one, other in itertools.combinations(SPLITS, 2):
        assert not {*map(combination, of[one])} & {*map(combination, of[other])}
    # What the test combines anew is known from training, each pair of facts of it too.
    for first, second in itertools.combinations(range(3), 2):
        pairs = [{(combination(s)[first], combination(s)[second]) for s in of[split]} for split in ("train", "test")]
        assert pairs[1] <= pairs[0]
    assert Counter(scene.emotion for scene in of["test"]) == dict.fromkeys(EXPRESSIONS, 30)
    assert len({scene.video_id for scene in scenes}) == len(scenes)


def test_place_is_independent_of_emotion() -> None:
    scenes = plan_world(0)
    seen = np.zeros((len(EXPRESSIONS), len(PLACES)))
    for scene in scenes:
        seen[list(EXPRESSIONS).index(scene.emotion), list(PLACES).index(scene.place)] += 1
    expected = seen.sum(1, keepdims=True) * seen.sum(0, keepdims=True) / seen.sum()
    # Chi square of 35 degrees of freedom: beyond 66.6 once in a thousand.
    assert ((seen - expected) ** 2 / expected).sum() < 66.6


def test_plan_follows_the_seed_and_the_limit() -> None:
    assert plan_world(3) == plan_world(3) != plan_world(4)
    few = plan_world(3, limit=5)
    assert Counter(scene.split for scene in few) == dict.fromkeys(SPLITS, 5)
    assert set(few) < set(plan_world(3))


def test_rendering_is_deterministic(tmp_path: Path) -> None:
    first, second = plan_world(0)[:2]
    frames = draw_scene(first)
    assert frames.shape == (FRAMES, SIZE, SIZE, 3) and frames.dtype == np.uint8
    assert np.array_equal(frames, draw_scene(first))
    assert not np.array_equal(frames, draw_scene(second))
    write_clip(tmp_path / "a.mp4", frames)
    write_clip(tmp_path / "b.mp4", frames)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


@pytest.mark.parametrize("action", ACTIONS)
def test_every_action_and_emotion_moves_and_stays_in_the_picture(action: str) -> None:
    for number, emotion in enumerate(EXPRESSIONS):
        scene = Scene("x", "train", SUBJECTS[number], action, emotion, "park", (1, number))
        frames = draw_scene(scene, 6).astype(int)
        assert all(np.abs(after - before).max() > 0 for before, after in itertools.pairwise(frames))
        assert np.abs(frames - frames[0]).max() > 60
        assert ((locate_figure(scene) > 0) & (locate_figure(scene) < SIZE)).all()


def test_emotions_look_different_on_the_same_figure() -> None:
    faces = {}
    for emotion in EXPRESSIONS:
        scene = Scene("x", "train", "dog", "walk", emotion, "park", (1, 1))
        x, y = locate_figure(scene, 1)[0, 0].astype(int)
        faces[emotion] = draw_scene(scene, 1)[0, y - 12 : y + 12, x - 12 : x + 12].astype(int)
    for one, other in itertools.combinations(faces, 2):
        changed = np.abs(faces[one] - faces[other]).max(-1) > 60
        assert changed.mean() > 0.05, (one, other)


def test_pen_draws_where_it_says() -> None:
    picture = np.zeros((20, 20, 3), np.float32)
    pen = Pen(picture, (10.0, 10.0), 2.0, angle=np.pi / 2)  # its x axis points up
    pen.rectangle(1.0, -1.0, 4.0, 1.0, (1.0, 0.5, 0.25))
    assert np.allclose(picture[3:7, 9:11], (1.0, 0.5, 0.25))
    assert (
        picture[9:].max() == 0 and picture[:1].max() == 0 and picture[:, :7].max() == 0 and picture[:, 13:].max() == 0
    )
    area = picture[..., 0].sum()
    assert area == pytest.approx(6 * 4, rel=0.1)
    picture[:] = 0
    pen.ellipse(0.0, 0.0, 4.0, 2.0, (1.0, 1.0, 1.0))
    assert picture[..., 0].sum() == pytest.approx(np.pi * 8 * 4, rel=0.03)
    assert picture[3, 10, 0] == 1 and picture[10, 3, 0] == 0
    pen.ellipse(100.0, 0.0, 4.0, 2.0, (1.0, 1.0, 1.0))  # outside: nothing to draw


def test_world_on_disk(world: ToyWorld) -> None:
    assert ToyWorld.load(world.folder) == world
    for split in SPLITS:
        captions = read_captions(world.folder / f"captions_{split}.csv")
        assert list(captions.video_ids) == [scene.video_id for scene in world.of(split)]
        for scene in world.of(split):
            assert captions.of(scene.video_id) == [sentence.text for sentence in world.sentences[scene.video_id]]
    content = (world.folder / "captions_train.csv").read_bytes()
    assert content.startswith(b"VideoID,EmCaptions\r\n") and content.count(b"\r\n") == content.count(b"\n") == 11


def test_clips_are_h264_of_enough_frames(world: ToyWorld) -> None:
    import av

    for scene in world.scenes:
        with av.open(str(world.video(scene))) as container:
            assert container.streams.video[0].codec_context.name == "h264"
        clip = read_frames(world.video(scene), 16)
        assert clip.num_decoded == FRAMES >= 16 and clip.damaged == 0
        assert clip.frames.shape == (16, SIZE, SIZE, 3)
        # What was drawn, but for the codec's losses, mostly in colour, which has half the resolution.
        assert (clip.frames[0].int() - torch.from_numpy(draw_scene(scene)[0]).int()).abs().float().mean() < 6


def test_world_refuses_a_folder_in_use_and_other_nonsense(world: ToyWorld, tmp_path: Path) -> None:
    with pytest.raises(ToyWorldError, match="exists and is not an empty folder"):
        render_world(world.folder, limit=1)
    with pytest.raises(ToyWorldError, match="holds no toy world"):
        ToyWorld.load(tmp_path)
    (tmp_path / "world.json").write_text('{"format": "another"}')
    with pytest.raises(ToyWorldError, match="is not of the format"):
        ToyWorld.load(tmp_path)
    with pytest.raises(ValueError, match="limit must be at least 1"):
        render_world(tmp_path / "new", limit=0)


def test_interrupted_rendering_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        render_world(tmp_path / "world", limit=1, workers=1, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_captions_are_true_and_say_what_they_state(described: list[tuple[Scene, list[Sentence]]]) -> None:
    place_words = set(PLACES)
    verb_words = {w for verb in VERBS.values() for f in (*verb.present, *verb.progressive) for w in f.split()[:1]}
    for scene, sentences in described:
        assert len({sentence.text for sentence in sentences}) == 5
        assert sum(sentence.emotion is not None for sentence in sentences) >= 2
        for sentence in sentences:
            words = caption_words(sentence.text)
            assert sentence.is_true_of(scene) and len(words) == len(sentence.text.split()) <= 15
            nouns = [noun for noun in NOUNS if noun in words]
            assert sentence.subjects == NOUNS[nouns[0]]
            found = [emotion for emotion, of in EMOTION_WORDS.items() if set(words) & set(of.all)]
            assert found == ([sentence.emotion] if sentence.emotion else [])
            assert (place_words & set(words)) == ({sentence.place} if sentence.place else set())
            if sentence.action is None:
                assert not verb_words & set(words)
    other = plan_world(0)[0]
    assert not any(
        s.is_true_of(other) for scene in plan_world(0) for s in describe(scene) if other.subject not in s.subjects
    )


def test_a_caption_is_true_of_what_it_leaves_open_only() -> None:
    scene = Scene("x", "train", "dog", "kick", "happy", "park", (0, 0))
    sentence = fill("a {j} {n} {v}", scene, np.random.default_rng(0))
    assert sentence is not None and sentence.subjects == ("dog",)
    assert sentence.is_true_of(replace(scene, place="beach"))
    for other in ({"subject": "cat"}, {"action": "walk"}, {"emotion": "sad"}):
        assert not sentence.is_true_of(replace(scene, **other))


def test_kinds_of_captions_have_the_shares_of_emvidcap(described: list[tuple[Scene, list[Sentence]]]) -> None:
    kinds = Counter(sentence.kind for _, sentences in described for sentence in sentences)
    for kind, share in SHARES.items():
        assert kinds[kind] / kinds.total() == pytest.approx(share, abs=0.03)
    assert kind_of("the dog is sad") == "emotional"
    assert kind_of("a happy girl is reading a book") == "neutral"
    assert kind_of("a girl is reading a book") == "factual"


def test_every_form_can_be_filled() -> None:
    scenes = [Scene("x", "train", "dog", action, "happy", "park", (0, 0)) for action in ("kick", "dance")]
    for form in FORMS:
        filled = [fill(form, scene, np.random.default_rng(0)) for scene in scenes]
        assert any(filled) and not any("{" in sentence.text for sentence in filled if sentence is not None)


def test_emotion_words_are_in_the_dictionary(described: list[tuple[Scene, list[Sentence]]]) -> None:
    dictionary = EmotionDictionary.default()
    for emotion, words in EMOTION_WORDS.items():
        for word in words.all:
            assert dictionary.of(word) == (CATEGORIES[emotion],), word
    own = {word for words in EMOTION_WORDS.values() for word in words.all}
    used = {w for _, sentences in described for s in sentences for w in caption_words(s.text)}
    assert used & set(dictionary.words) == own & used  # no other word of a caption is one of emotion


def test_linear_probe_finds_what_is_linear_and_nothing_else() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 8, (800,), generator=generator)
    noise = torch.randn(800, 8, generator=generator)
    told = noise + 10 * torch.nn.functional.one_hot(labels, 8)
    assert linear_probe(told[:600], labels[:600], told[600:], labels[600:]) > 0.95
    assert linear_probe(noise[:600], labels[:600], noise[600:], labels[600:]) < 0.25


def test_emotion_is_not_guessable_from_colours_or_a_thumbnail() -> None:
    scenes = plan_world(0)
    train, test = ([s for s in scenes if s.split == split] for split in ("train", "test"))
    frames = {s.video_id: torch.from_numpy(draw_scene(s, 1)) for s in (*train, *test)}
    stacked = [torch.stack([frames[s.video_id] for s in part]) for part in (train, test)]
    found = probe_emotions(stacked[0], train, stacked[1], test)
    assert emotion_labels(test).bincount().tolist() == [30] * 8
    assert all(accuracy < 2 / 8 for accuracy in found.values()), found
