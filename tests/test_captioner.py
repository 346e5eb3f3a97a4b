"""The captioner: a model folder of tiny parts, real encoded clips, batches, and what does not belong together."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch

from evc_fast import Captioner, ClipTowers
from evc_fast.captioner import TOY_MODEL, TOY_NOTE, ModelFolderError
from evc_fast.data.emotions import EmotionDictionary
from evc_fast.data.repository import EncoderMismatch
from evc_fast.data.video_errors import VideoError
from evc_fast.model.captioner import FaceNet
from evc_fast.model.config import FaceNetConfig
from evc_fast.model.decoders import build_decoder
from evc_fast.model.decoders.vocabulary import Vocabulary
from evc_fast.model.encoder import FaceNetEncoder
from evc_fast.model_folder import find_model_folder
from evc_fast.pipeline import CaptionPipeline, random_repository
from evc_fast.testing.videos import write_video

pytest.importorskip("av")

DICTIONARY = EmotionDictionary({"joy": ["happily", "joyful"], "fear": ["afraid"], "anger": ["angrily"]})
WORDS = ["a man runs happily", "the dog barks angrily", "an afraid woman waits", "two joyful children sing in the rain"]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A tiny CLIP as transformers saves it; it has no tokenizer, since nothing here encodes a sentence."""
    from transformers import CLIPConfig, CLIPModel

    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = CLIPConfig(
            text_config=size | {"vocab_size": 30},
            vision_config=size | {"image_size": 32, "patch_size": 8},
            projection_dim=24,
        )
        model = CLIPModel(config)
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    return folder


def tiny_captioner(clip, decoder="transformer", encoder_fields=None, **options):
    towers = ClipTowers.from_pretrained(clip)
    encoder_config = FaceNetConfig(
        video_dim=towers.image_dim,
        text_dim=towers.text_dim,
        dim=16,
        output_dim=16,
        num_frames=4,
        num_triplets=3,
        num_queries=5,
        num_heads=2,
        num_emotions=len(DICTIONARY.words),
        emotion_dim=9,
        **(encoder_fields or {}),
    )
    augmented, retrieval = encoder_config.emotion_augmentation, encoder_config.retrieval
    with torch.random.fork_rng():
        torch.manual_seed(1)
        encoder = FaceNetEncoder(encoder_config, torch.randn(len(DICTIONARY.words), 9) if augmented else None)
    vocabulary = Vocabulary.from_captions(WORDS, DICTIONARY.words)
    built = build_decoder(decoder, vocabulary=vocabulary, seed=2, input_dim=16)
    for parameter in [*built.parameters(), *encoder.qformer.parameters(), *encoder.video_projection.parameters()]:
        parameter.data.mul_(3)  # sharper than initial weights, so that captions differ
    model = FaceNet(encoder, built).eval()
    model.random_weights = built.random_weights = False
    repository = random_repository(towers, 40) if retrieval else None
    return Captioner(towers, repository, model, DICTIONARY, **options)


@pytest.fixture(scope="module")
def captioner(clip_folder):
    return tiny_captioner(clip_folder, notes=["trained on nothing"])


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    sizes = [(48, 32), (64, 48), (32, 64), (48, 32), (80, 32)]
    return [
        write_video(folder / f"clip{n}.mp4", seed=n, frames=3 + n, width=w, height=h) for n, (w, h) in enumerate(sizes)
    ]


@pytest.fixture(scope="module")
def saved(captioner, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    captioner.save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def same(one, other):
    assert one.text == other.text
    assert torch.equal(one.ids, other.ids)
    assert [fact.caption for fact in one.retrieved] == [fact.caption for fact in other.retrieved]


def test_a_model_comes_back_from_its_folder(captioner, saved, clips):
    assert {path.name for path in saved.iterdir()} == {
        "captioner.json",
        "model",
        "repository",
        "emotions",
        "MODEL_CARD.md",
    }
    loaded = Captioner.from_pretrained(saved)
    result = loaded(clips[0])
    same(result, captioner(clips[0]))
    assert result.notes == captioner(clips[0]).notes
    assert "trained on nothing" in result.notes
    assert result.source == str(clips[0])
    assert result.emotion_words == DICTIONARY.words
    assert {word for word, _ in result.emotions} <= set(DICTIONARY.words)
    assert loaded.card == (saved / "MODEL_CARD.md").read_text()
    assert "What it cannot know" in loaded.card


def test_a_saved_model_saves_the_same_again(saved, tmp_path, clips):
    first = Captioner.from_pretrained(saved)
    first.save_pretrained(tmp_path / "again")
    for name in ("captioner.json", "MODEL_CARD.md"):
        assert (tmp_path / "again" / name).read_text() == (saved / name).read_text()
    first.save_pretrained(tmp_path / "again")  # over itself
    same(Captioner.from_pretrained(tmp_path / "again")(clips[1]), first(clips[1]))
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


@pytest.mark.parametrize("decoder", ["transformer", "lstm"])
def test_the_batch_size_does_not_change_a_caption(clip_folder, clips, decoder):
    captioner = tiny_captioner(clip_folder, decoder)
    alone = [captioner(clip, min_new_tokens=5) for clip in clips]
    assert len({result.text for result in alone}) > 1
    for batch_size in (1, 2, 3, 5, 64):
        done = []
        together = captioner.caption(
            clips, batch_size=batch_size, min_new_tokens=5, progress=lambda *at, done=done: done.append(at)
        )
        assert done[-1] == (5, 5)
        assert [result.source for result in together] == [str(clip) for clip in clips]
        for one, other in zip(alone, together, strict=True):
            same(one, other)
            assert one.notes == other.notes
        assert together[0].batch_size == min(batch_size, 5)
    assert captioner.caption([]) == []


def test_a_near_tie_is_made_again_alone_and_noted(clip_folder, clips, monkeypatch):
    captioner = tiny_captioner(clip_folder)
    pipeline = captioner.pipeline
    alone = [captioner(clip) for clip in clips[:3]]
    assert not any("near-tie" in note for result in alone for note in result.notes)
    search, sizes = pipeline.search, []

    def disturbed(tokens, **options):
        """What rounding may do in a batch: the second of three gets other words, and the margin tells."""
        ids, margins = search(tokens, **options)
        sizes.append(len(tokens))
        if len(tokens) == 3:
            ids[1, 0], margins[1] = ids[1, 0] + 1, 1e-6
        return ids, margins

    monkeypatch.setattr(pipeline, "search", disturbed)
    together = captioner.caption(clips[:3])
    assert sizes == [3, 1]
    for one, other in zip(alone, together, strict=True):
        same(one, other)
    assert [any("near-tie" in note for note in result.notes) for result in together] == [False, True, False]
    assert "within 0.0001" in together[1].notes[-1]


def test_videos_that_cannot_be_read_are_told(captioner, clips, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video at all")
    with pytest.raises(VideoError, match=r"broken\.mp4"):
        captioner.caption([clips[0], broken])
    told = []
    results = captioner.caption(
        [clips[0], broken, clips[1]], failed=lambda path, error: told.append((path, str(error))), batch_size=2
    )
    assert [result.source for result in results] == [str(clips[0]), str(clips[1])]
    assert [path for path, _ in told] == [broken]
    assert "broken.mp4" in told[0][1]
    assert captioner.caption([broken], failed=lambda *_: None) == []


def test_a_videos_own_captions_are_left_out(captioner, clips):
    best = captioner(clips[0]).retrieved[0].caption
    repository = captioner.pipeline.repository
    own = repository.video_ids[repository.captions.index(best)]
    for result in captioner.caption(clips[:3], video_ids=[own, None, None], batch_size=2)[:1]:
        assert best not in {fact.caption for fact in result.retrieved}


def test_pictures_are_kept_where_asked_for(captioner, clips):
    import av

    result = captioner.caption(clips[:2], pictures=True)[1]
    assert len(result.pictures) == 4
    seconds = [picture.seconds for picture in result.pictures]
    assert seconds == sorted(seconds)
    picture = result.pictures[0]
    assert (picture.width, picture.height) == (64, 48)
    decoder = av.CodecContext.create("mjpeg", "r")
    decoded = next(iter(decoder.decode(av.Packet(picture.jpeg)))).to_ndarray(format="rgb24")
    frames = captioner.pipeline.read(clips[1]).frames
    assert abs(decoded.astype(float) - frames[0].numpy()).mean() < 12
    assert captioner(clips[0]).pictures == ()


@pytest.mark.parametrize(
    "fields, lacks",
    [
        ({}, set()),
        ({"retrieval": False}, {"pie", "fact"}),
        ({"emotion_augmentation": False}, {"of-emotions", "curves", "emotion"}),
        ({"bias_adjustment": False, "self_refine": False, "cross_refine": False}, set()),
    ],
)
def test_every_model_saves_loads_and_reports(clip_folder, clips, tmp_path, fields, lacks):
    """What a page shows is what the model has: with retrieval, emotions, gates, or without."""
    from evc_fast.report import write_report

    made = tiny_captioner(clip_folder, encoder_fields=fields, notes=["trained on nothing"])
    made.save_pretrained(tmp_path / "model")
    captioner = Captioner.from_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "repository").is_dir() == fields.get("retrieval", True)
    results = captioner.caption(clips[:2], pictures=True)
    same(results[0], made(clips[0]))
    write_report(results, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    shown = {name for group in re.findall('class="([^"]*)"', page) for name in group.split()}
    marks = {"of-facts", "of-emotions", "pie", "fact", "curves", "emotion", "time", "frames"}
    assert marks - shown == lacks
    assert page.count("data:image/jpeg;base64,") == 2 * (4 + 1)
    assert "Trained on nothing" in page
    for result in results:
        assert result.text in page
        assert result.to_dict() == json.loads(json.dumps(result.to_dict()))


def test_a_folder_with_its_clip_can_be_moved(captioner, clip_folder, tmp_path, clips):
    captioner.save_pretrained(tmp_path / "model", include_clip=True)
    assert json.loads((tmp_path / "model" / "captioner.json").read_text())["clip"] == "./clip"
    moved = (tmp_path / "model").rename(tmp_path / "moved")
    assert (moved / "clip" / "config.json").is_file()
    loaded = Captioner.from_pretrained(moved)
    assert loaded.pipeline.towers.name == str(moved / "clip")
    same(loaded(clips[0]), captioner(clips[0]))
    with pytest.raises(ModelFolderError, match="have no folder whose files could be kept"):
        towers = ClipTowers.random("tiny")
        random = CaptionPipeline.random("lstm", clip="tiny", repository_size=20, config={"num_emotions": 4, "dim": 16})
        Captioner(towers, random.repository, random.model, DICTIONARY).save_pretrained(
            tmp_path / "x", include_clip=True
        )
    assert not (tmp_path / "x").exists()


def test_a_run_and_a_hubs_cache_lead_to_their_model(saved, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "best").symlink_to(saved)
    assert find_model_folder(run) == run / "best"
    cache = tmp_path / "models--someone--tiny"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("abc123\n")
    shutil.copytree(saved, cache / "snapshots" / "abc123")
    assert find_model_folder(str(cache)) == cache / "snapshots" / "abc123"


def test_a_save_that_is_broken_off_leaves_the_old_model(captioner, copy, monkeypatch):
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    monkeypatch.setattr(FaceNet, "save_pretrained", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        captioner.save_pretrained(copy)
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]


def test_a_folder_that_is_something_else_is_left_alone(captioner, tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "to mother.txt").write_text("dear mother")
    with pytest.raises(ModelFolderError, match="holds something else than a model"):
        captioner.save_pretrained(tmp_path / "letters")
    with pytest.raises(NotADirectoryError, match="is a file"):
        captioner.save_pretrained(tmp_path / "letters" / "to mother.txt")


@pytest.mark.parametrize("part", ["model", "emotions", "repository"])
def test_a_missing_part_is_named(copy, part):
    shutil.rmtree(copy / part)
    with pytest.raises(ModelFolderError, match=f"is not whole: {part}/ missing"):
        Captioner.from_pretrained(copy)


def test_a_damaged_or_foreign_manifest_is_named(copy, tmp_path):
    path = copy / "captioner.json"
    right = json.loads(path.read_text())
    for change, message in (
        ({"version": 2}, "of version 2, this evc_fast reads version 1"),
        ({"format": "something"}, "does not describe a captioner"),
        ({"retrieval": "yes"}, "has no retrieval that can be used"),
        ({"temporal_kernel": 0}, "has no temporal_kernel that can be used"),
        ({"notes": [1]}, "has no notes that can be used"),
        ({"words_sha256": "0" * 64}, "holds other words than the model was trained with"),
        ({"clip": "./nowhere"}, "nowhere; name its folder as clip"),
        ({"clip": None}, "names no CLIP: name the towers"),
    ):
        path.write_text(json.dumps(right | change))
        with pytest.raises(ModelFolderError, match=message):
            Captioner.from_pretrained(copy)
    path.write_text("{")
    with pytest.raises(ModelFolderError, match=r"captioner\.json is damaged"):
        Captioner.from_pretrained(copy)
    path.unlink()
    with pytest.raises(ModelFolderError, match=r"it has no captioner\.json, which Captioner\.save_pretrained writes"):
        Captioner.from_pretrained(copy)
    with pytest.raises(FileNotFoundError, match="models are read from local folders, none is fetched"):
        Captioner.from_pretrained("someone/a-model-on-the-hub")


def test_nothing_is_fetched(copy, monkeypatch):
    """A CLIP by its name on the hub is looked for on this machine, and no connection is opened."""
    import socket

    def refused(*_, **__):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refused)
    path = copy / "captioner.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"clip": "someone/clip-of-theirs"}))
    with pytest.raises(ModelFolderError, match="not on this machine, and nothing is fetched: get it by `hf download"):
        Captioner.from_pretrained(copy)
    decoder = copy / "model" / "decoder" / "config.json"
    decoder.write_text(json.dumps({"decoder": "llm", "base": "someone/an-llm"}))
    with pytest.raises(ModelFolderError, match=r"the language model of .* is not on this machine"):
        Captioner.from_pretrained(copy)


def test_other_towers_are_refused(saved, clip_folder, clips):
    with pytest.raises(EncoderMismatch, match=r"was trained with the CLIP .* name the right one as clip"):
        Captioner.from_pretrained(saved, clip=ClipTowers.random("tiny"))
    towers = ClipTowers.from_pretrained(clip_folder)
    assert Captioner.from_pretrained(saved, clip=towers).pipeline.towers is towers
    assert Captioner.from_pretrained(saved, clip=clip_folder)(clips[0]).text
    with pytest.raises(ModelFolderError, match="clip 'someone/clip' is not on this machine"):
        Captioner.from_pretrained(saved, clip="someone/clip")


def test_a_device_that_is_not_there_is_refused(saved, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device cuda is not there"):
        Captioner.from_pretrained(saved, device="cuda")


def test_bad_arguments_are_named(captioner, clips):
    with pytest.raises(TypeError, match="videos must be a list of video files, got one path"):
        captioner.caption(str(clips[0]))
    for size in (0, True, 2.0):
        with pytest.raises(ValueError, match="batch_size must be an integer of at least 1"):
            captioner.caption(clips, batch_size=size)
    with pytest.raises(ValueError, match="video_ids must be as many as videos, 5, got 1"):
        captioner.caption(clips, video_ids=["a"])
    with pytest.raises(TypeError, match="video_ids must be a list of ids"):
        captioner.caption(clips, video_ids="abcde")


def test_the_shipped_model_says_what_it_knows(saved, monkeypatch, tmp_path, clips):
    shutil.copytree(saved, tmp_path / "toy")
    monkeypatch.setattr("evc_fast.captioner.TOY_MODEL", tmp_path / "toy")
    toy = Captioner.from_pretrained()
    assert toy(clips[0]).notes[0] == TOY_NOTE
    assert "drawn people and animals" in TOY_NOTE
    assert "from_pretrained(FOLDER)" in TOY_NOTE
    toy.save_pretrained(tmp_path / "mine")
    assert TOY_NOTE not in (tmp_path / "mine" / "captioner.json").read_text()
    monkeypatch.setattr("evc_fast.captioner.TOY_MODEL", tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="this installation has no toy model"):
        Captioner.from_pretrained()
    assert TOY_MODEL.parts[-4:] == ("data", "toy", "assets", "model")
