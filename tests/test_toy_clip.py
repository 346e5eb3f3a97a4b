"""The small CLIP of the toy world: its tokenizer, its training, its folder, and what the shipped one can tell."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from evc_fast.data.clip import ClipTowers
from evc_fast.data.preprocessing import CLIP_MEAN, CLIP_STD
from evc_fast.data.toy import plan_world, render_world
from evc_fast.data.toy.__main__ import main
from evc_fast.data.toy.assets import CLIP_ASSETS, save_clip, zero_shot
from evc_fast.data.toy.scenes import SIZE, draw_scene
from evc_fast.data.toy.sentences import describe
from evc_fast.data.toy.small_clip import (
    EMOTION_TEMPLATE,
    FACTS,
    ClipRecipe,
    fact_prompts,
    load_frames,
    make_tokenizer,
    prompts_of,
    train_clip,
    vary,
)
from evc_fast.data.video import read_frames

TINY = ClipRecipe(
    width=32, heads=2, image_layers=2, text_layers=1, patch=16, variants=2, pictures=4, steps=4, text_steps=3
)


@pytest.fixture(scope="module")
def towers() -> ClipTowers:
    return ClipTowers.from_pretrained(CLIP_ASSETS)


def test_prompts_tell_the_values_of_each_fact_apart() -> None:
    prompts = fact_prompts()
    assert {fact: len(set(texts)) for fact, texts in prompts.items()} == {fact: len(v) for fact, v in FACTS.items()}
    assert "a photo of a person feeling happy" in prompts["emotion"]
    for scene in plan_world(0)[:50]:
        stated = {prompt.text for prompt in prompts_of(scene) if prompt.is_true_of(scene)}
        assert len(stated) == len(prompts_of(scene))
        for fact, values in FACTS.items():
            assert prompts[fact][values.index(getattr(scene, fact))] in stated


def test_tokenizer_has_a_token_a_word_and_takes_any_text() -> None:
    texts = ["a happy dog kicks a ball", "the cat is sad"]
    tokenizer = make_tokenizer(texts)
    assert tokenizer.convert_ids_to_tokens(tokenizer(texts[0].upper())["input_ids"])[1:-1] == [
        f"{word}</w>" for word in texts[0].split()
    ]
    ids = tokenizer(["zebra ünïcode 42?!", ""])["input_ids"]
    assert all(row[0] == tokenizer.bos_token_id and row[-1] == tokenizer.eos_token_id for row in ids)
    assert len(ids[0]) > 10 and len(ids[1]) == 2
    assert tokenizer.unk_token_id not in ids[0][1:-1]


def test_variants_show_the_training_combinations_and_no_other() -> None:
    clips = [scene for scene in plan_world(0) if scene.split == "train"]
    rows = vary(clips, ClipRecipe(variants=3, variant_frames=2))
    variants = list(dict.fromkeys(scene for scene, _ in rows))
    assert len(rows) == 2 * len(variants) == 6 * 480
    assert {(s.subject, s.action, s.emotion) for s in variants} == {(s.subject, s.action, s.emotion) for s in clips}
    assert not {scene.seed for scene in variants} & {scene.seed for scene in plan_world(0)}
    assert vary(clips, ClipRecipe(variants=3, variant_frames=2)) == rows
    scene, numbers = variants[0], [index for other, index in rows if other == variants[0]]
    assert len(set(numbers)) == 2
    assert np.array_equal(draw_scene(scene, only=numbers), draw_scene(scene)[numbers])


def test_training_is_reproducible_and_its_folder_is_read_by_the_towers(tmp_path: Path, one_thread: None) -> None:
    world = render_world(tmp_path / "world", limit=4, workers=1)
    losses: list[float] = []
    model, tokenizer = train_clip(world.of("train"), TINY, progress=lambda step, steps, loss: losses.append(loss))
    again, _ = train_clip(world.of("train"), TINY)
    assert len(losses) == 4 and all(loss > 0 for loss in losses)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
    assert {p.dtype for p in model.parameters()} == {torch.float32}

    folder = tmp_path / "clip"
    for text in ("first", "second"):  # the second takes the place of the first
        save_clip(model, tokenizer, folder, {"what": text})
    assert json.loads((folder / "manifest.json").read_text()) == {"what": "second"}
    assert {path.name for path in tmp_path.iterdir()} == {"world", "clip"}
    towers = ClipTowers.from_pretrained(folder)
    frames = load_frames(world, "test")
    sentence = describe(world.of("test")[0])[0].text
    with torch.no_grad():
        pixels = towers.preprocess(frames[0])
        image = again.visual_projection(again.vision_model(pixel_values=pixels).pooler_output)
        ids = torch.tensor([tokenizer(sentence)["input_ids"]])
        text = again.text_projection(again.text_model(input_ids=ids).pooler_output)
    # float16 on disk
    assert torch.allclose(towers.encode_frames(frames[0]), image, rtol=2e-2, atol=2e-2)
    assert torch.allclose(towers.encode_text([sentence]), text, rtol=2e-2, atol=2e-2)
    shares = zero_shot(towers, frames, world.of("test"))
    assert set(shares) == set(FACTS) and all(0 <= share <= 1 for share in shares.values())


def test_command_renders_and_builds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["render", str(tmp_path / "world"), "--limit", "1", "--workers", "1"]) == 0
    assert "rendering: 3 of 3" in capsys.readouterr().out
    assert main(["render", str(tmp_path / "world"), "--limit", "1"]) == 1
    assert "exists and is not an empty folder" in capsys.readouterr().err
    assert main(["build", str(tmp_path), "--seed", "7"]) == 1
    assert "is of seed 0, not 7" in capsys.readouterr().err


def test_shipped_folder_is_small_and_says_what_it_is() -> None:
    weights = CLIP_ASSETS / "model.safetensors"
    assert weights.stat().st_size <= 4 << 20
    assert not {path.suffix for path in CLIP_ASSETS.iterdir()} & {".bin", ".pt", ".pth", ".pkl"}
    manifest = json.loads((CLIP_ASSETS / "manifest.json").read_text())
    assert manifest["seed"] == manifest["recipe"]["seed"] and {"torch", "transformers", "av"} <= set(
        manifest["versions"]
    )
    assert manifest["emotion_template"] == EMOTION_TEMPLATE
    metrics = manifest["metrics"]
    assert metrics["zero_shot_test"]["emotion"] >= 0.7
    assert all(accuracy < 2 / 8 for accuracy in metrics["probe_emotion_test"].values())


def test_shipped_clip_has_the_whole_preprocessing(towers: ClipTowers) -> None:
    assert not towers.random_weights and towers.has_tokenizer
    assert towers.image_size == towers.preprocess.crop == towers.preprocess.resize == SIZE
    assert (towers.preprocess.mean, towers.preprocess.std) == (CLIP_MEAN, CLIP_STD)
    other = ClipTowers.from_pretrained(CLIP_ASSETS, engine="library", dtype=torch.float32)
    own = ClipTowers.from_pretrained(CLIP_ASSETS, dtype=torch.float32)
    frames = torch.from_numpy(draw_scene(plan_world(0)[0], 4))
    assert torch.allclose(own.encode_frames(frames), other.encode_frames(frames), rtol=1e-3, atol=1e-3)
    assert own.fingerprint == other.fingerprint
    tall = torch.randint(0, 256, (3, 300, 140, 3), dtype=torch.uint8)  # any video, not only toy clips
    assert towers.encode_frames(tall).isfinite().all()


def test_shipped_clip_names_emotions_of_unseen_combinations(towers: ClipTowers, tmp_path: Path) -> None:
    scenes = plan_world(0)
    known = {(s.subject, s.action, s.emotion) for s in scenes if s.split == "train"}
    sample = [s for s in scenes if s.split == "test"][:32]
    assert not known & {(s.subject, s.action, s.emotion) for s in sample}
    frames = torch.stack([torch.from_numpy(draw_scene(scene, only=range(0, 24, 6))) for scene in sample])
    shares = zero_shot(towers, frames, sample)
    # The whole test set's figure is in the manifest; 32 clips leave a standard error of 8 %.
    assert shares["emotion"] >= 0.6, shares
    assert all(shares[fact] >= 2 / len(values) for fact, values in FACTS.items()), shares


def test_shipped_clip_survives_the_codec_and_ranks_true_captions_first(towers: ClipTowers, tmp_path: Path) -> None:
    world = render_world(tmp_path / "world", limit=8, workers=1)
    scenes = world.of("test")
    frames = torch.stack([read_frames(world.video(scene), 16).frames for scene in scenes])
    features = F.normalize(torch.stack([towers.encode_frames(clip).mean(0) for clip in frames]), dim=-1)
    sentences = [sentence for scene in scenes for sentence in describe(scene)]
    similarity = features @ F.normalize(towers.encode_text([s.text for s in sentences]), dim=-1).T
    true = torch.tensor([[sentence.is_true_of(scene) for sentence in sentences] for scene in scenes])
    assert (similarity[true].mean() - similarity[~true].mean()) > 0.1
    first = true[torch.arange(len(scenes)), similarity.argmax(1)]
    assert first.float().mean() >= 0.6
