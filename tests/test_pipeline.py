"""The captioner and the pipeline: a real encoded clip through tiny towers, a tiny repository and tiny decoders."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from evc_fast.model.captioner import FaceNet
from evc_fast.model.config import FaceNetConfig
from evc_fast.model.decoders import build_decoder
from evc_fast.model.encoder import FaceNetEncoder
from evc_fast.pipeline import STAGES, CaptionPipeline, random_model
from evc_fast.testing.videos import write_video

TINY = {"dim": 16, "num_frames": 4, "num_triplets": 3, "num_queries": 5, "num_emotions": 7, "emotion_dim": 9}


def tiny_pipeline(decoder="tiny-t5", **config):
    return CaptionPipeline.random(decoder, clip="tiny", repository_size=60, dtype=torch.float32, config=TINY | config)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    pytest.importorskip("av")
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", frames=12, width=64, height=48)


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline()


@pytest.mark.parametrize("decoder", ["tiny-t5", "tiny-opt", "lstm", "transformer"])
def test_a_file_becomes_a_caption_of_the_length_asked_for(decoder, clip):
    result = tiny_pipeline(decoder)(clip, max_new_tokens=6, min_new_tokens=6)
    assert result.ids.shape == (6,)
    assert result.text.split() == [f"<{index}>" for index in result.ids.tolist()]
    assert tuple(result.timings) == STAGES
    assert all(seconds > 0 for seconds in result.timings.values())
    assert any("random weights" in note for note in result.notes)


def test_the_explanation_is_that_of_the_encoder(pipeline, clip):
    result = pipeline(clip, max_new_tokens=3)
    explanation = result.explanation
    assert explanation.routing_weights.shape == (1, 4, 3)
    assert explanation.emotion_distribution.shape == (1, 3, 7)
    features = pipeline.encode_frames([pipeline.read(clip).frames])
    found = pipeline.retrieve(features)
    assert [fact.caption for fact in result.retrieved] == found.captions[0]
    for rank, fact in enumerate(result.retrieved):
        assert fact.triplet == found.triplet_texts[0][rank]
        assert fact.similarity == pytest.approx(found.similarity[0, rank].item(), abs=1e-6)
        assert fact.component_weights == pytest.approx(explanation.component_weights[0, rank].tolist())
        assert fact.triplet_weight == pytest.approx(explanation.triplet_weights[0, rank].item())
        assert fact.routing_weight == pytest.approx(explanation.routing_weights[0, :, rank].mean().item())
        shares = explanation.emotion_distribution[0, rank]
        assert fact.emotions[0] == (f"emotion {shares.argmax()}", pytest.approx(shares.max().item()))
    assert sum(fact.routing_weight for fact in result.retrieved) == pytest.approx(1, abs=1e-5)
    assert result.fact_gate == pytest.approx(explanation.fact_gate.abs().mean().item())
    assert result.emotions[0][1] >= result.emotions[-1][1]


def test_the_description_names_everything(pipeline, clip):
    pipeline.emotion_words = ("awe", "calm", "dread", "envy", "fear", "glee", "hope")
    try:
        result = pipeline(clip, max_new_tokens=3)
    finally:
        pipeline.emotion_words = None
    text = str(result)
    assert text.startswith(f"caption: {result.text}\n")
    for fact in result.retrieved:
        assert repr(fact.caption) in text
        assert all(part in text for part in fact.triplet)
    assert result.emotions[0][0] in ("awe", "calm", "dread", "envy", "fear", "glee", "hope")
    assert f"{result.emotions[0][0]} {result.emotions[0][1]:.3f}" in text
    for word in ("similarity", "routed", "gates: facts", "retrieval", "note: random weights"):
        assert word in text


def test_without_explanation_the_caption_is_the_same(pipeline, clip):
    explained, plain = pipeline(clip, max_new_tokens=5), pipeline(clip, explain=False, max_new_tokens=5)
    assert plain.explanation is None
    assert plain.retrieved[0].triplet_weight is None
    assert torch.equal(explained.ids, plain.ids)
    assert "similarity" in plain.describe()


def test_a_batch_gives_what_its_videos_give_alone(pipeline, clip, tmp_path):
    other = write_video(tmp_path / "other.mp4", frames=5, width=32, height=80)  # another size: resized apart
    together = pipeline.caption_batch([clip, other], max_new_tokens=5, min_new_tokens=5)
    alone = [pipeline(path, max_new_tokens=5, min_new_tokens=5) for path in (clip, other)]
    for one, other_one in zip(together, alone, strict=True):
        assert torch.equal(one.ids, other_one.ids)
        assert [fact.caption for fact in one.retrieved] == [fact.caption for fact in other_one.retrieved]
        torch.testing.assert_close(
            one.explanation.emotion_distribution, other_one.explanation.emotion_distribution, rtol=1e-4, atol=1e-6
        )
    assert pipeline.caption_batch([]) == []


def test_the_ops_implementation_does_not_change_the_caption(clip):
    results = []
    for impl in ("reference", None):
        pipeline = tiny_pipeline()
        pipeline.impl = impl
        results.append(pipeline(clip, max_new_tokens=6))
    assert torch.equal(results[0].ids, results[1].ids)


def test_captions_of_the_own_video_are_left_out(pipeline, clip):
    best = pipeline(clip, max_new_tokens=2).retrieved[0].caption
    own = pipeline.repository.video_ids[pipeline.repository.captions.index(best)]
    shown = {fact.caption for fact in pipeline(clip, video_id=own, max_new_tokens=2).retrieved}
    of_own = {c for c, v in zip(pipeline.repository.captions, pipeline.repository.video_ids, strict=True) if v == own}
    assert best in of_own
    assert not shown & of_own


def test_without_retrieval_there_is_no_repository(clip):
    pipeline = tiny_pipeline(retrieval=False)
    result = pipeline(clip, max_new_tokens=3)
    assert pipeline.repository is None
    assert result.retrieved == ()
    assert "retrieval" not in result.timings
    assert result.explanation.component_weights is None
    assert "gates: facts" in str(result)


def test_without_emotion_augmentation_no_emotions_are_named(clip):
    result = tiny_pipeline(emotion_augmentation=False)(clip, max_new_tokens=3)
    assert result.emotions == ()
    assert result.emotion_gate is None
    assert result.retrieved[0].emotions == ()
    assert "attends to" not in str(result)


def test_features_that_are_not_finite_are_refused(pipeline, monkeypatch):
    frames = torch.zeros(4, 48, 64, 3, dtype=torch.uint8)
    features = torch.ones(1, 4, 32)
    features[0, 2, 5] = float("nan")
    monkeypatch.setattr(pipeline.towers, "encode_frames", lambda *_, **__: features)
    with pytest.raises(ValueError, match="image features must be finite"):
        pipeline.encode_frames([frames])


def test_tokens_that_are_not_finite_are_not_decoded(pipeline, clip, monkeypatch):
    right = pipeline.model.encoder.forward

    def damaged(*inputs, **options):
        encoded = right(*inputs, **options)
        return encoded._replace(tokens=encoded.tokens.index_fill(1, torch.tensor([2]), float("nan")))

    monkeypatch.setattr(pipeline.model.encoder, "forward", damaged)
    with pytest.raises(ValueError, match="tokens must be finite"):
        pipeline(clip)


@pytest.mark.parametrize("decoder", ["tiny-t5", "transformer"])
def test_a_model_in_training_mode_captions_without_dropout_and_stays_as_it_is(decoder, clip):
    pipeline = tiny_pipeline(decoder, dropout=0.5)
    features = pipeline.encode_frames([pipeline.read(clip).frames])
    retrieved = pipeline.retrieve(features)
    wanted = pipeline.encode(features, retrieved).tokens
    caption = pipeline(clip, max_new_tokens=5).ids
    pipeline.model.train()
    pipeline.model.encoder.qformer.eval()  # a part that its trainer has frozen
    modes = [part.training for part in pipeline.model.modules()]
    for _ in range(2):
        assert torch.equal(pipeline.encode(features, retrieved).tokens, wanted)
        assert torch.equal(pipeline(clip, max_new_tokens=5).ids, caption)
    assert [part.training for part in pipeline.model.modules()] == modes


def test_the_temporal_kernel_changes_the_video_features_and_not_the_retrieval(pipeline, clip, monkeypatch):
    plain = pipeline.encode_frames([pipeline.read(clip).frames])
    wide = CaptionPipeline(pipeline.towers, pipeline.repository, pipeline.model, temporal_kernel=3)
    calls, encoded = [], []
    tower, encoder = pipeline.towers.encode_frames, pipeline.model.encoder.forward

    def encode_frames(frames, *, temporal_kernel=1):
        calls.append(temporal_kernel)
        return tower(frames, temporal_kernel=temporal_kernel)

    def forward(features, *inputs, **options):
        encoded.append(features)
        return encoder(features, *inputs, **options)

    monkeypatch.setattr(pipeline.towers, "encode_frames", encode_frames)
    monkeypatch.setattr(pipeline.model.encoder, "forward", forward)
    first, second = pipeline(clip, max_new_tokens=2), wide(clip, max_new_tokens=2)
    assert sorted(calls) == [1, 1, 3]  # one pass suffices where t = 1
    assert torch.equal(encoded[0], plain)
    assert torch.equal(encoded[1], tower(pipeline.read(clip).frames[None], temporal_kernel=3))
    assert not torch.allclose(encoded[1], plain, atol=1e-3)
    for one, other in zip(first.retrieved, second.retrieved, strict=True):
        assert (one.caption, one.similarity) == (other.caption, other.similarity)
    with pytest.raises(ValueError, match="temporal_kernel must be an integer of at least 1, got 0"):
        CaptionPipeline(pipeline.towers, pipeline.repository, pipeline.model, temporal_kernel=0)


def test_retrieval_reads_float32_whatever_the_encoder_computes_in(clip, monkeypatch):
    pipeline = tiny_pipeline("lstm")
    wanted = pipeline(clip, max_new_tokens=2).retrieved
    pipeline.model.bfloat16()
    searched = []
    search = pipeline.repository.search
    monkeypatch.setattr(pipeline.repository, "search", lambda f, **options: searched.append(f) or search(f, **options))
    found = pipeline(clip, max_new_tokens=2).retrieved
    assert searched[0].dtype == torch.float32
    assert [(f.caption, f.similarity) for f in found] == [(f.caption, f.similarity) for f in wanted]


def test_equal_triplets_are_merged_by_the_repositorys_groups(clip):
    """Of three retrieved captions two share their lemmas: the encoder must be told which."""
    from evc_fast.data.repository import CaptionRepository, distinct_parts

    towers = tiny_pipeline("lstm").towers
    generator = torch.Generator().manual_seed(7)
    triplets = [[("man", "ride", "horse"), ("dog", "chase", "ball")][number % 3 == 0] for number in range(10)]
    repository = CaptionRepository.from_features(
        [f"caption {number}" for number in range(10)],
        [f"video {number}" for number in range(10)],
        triplets,
        torch.randn(10, towers.text_dim, generator=generator),
        torch.randn(len(distinct_parts(triplets)[0]), towers.text_dim, generator=generator),
        encoder_fingerprint=towers.fingerprint,
        random_weights=True,
    )
    config = TINY | {"merge_identical_triplets": True}
    model = random_model("lstm", video_dim=towers.image_dim, text_dim=towers.text_dim, config=config)
    pipeline = CaptionPipeline(towers, repository, model)
    result = pipeline(clip, max_new_tokens=2)
    texts = [fact.triplet for fact in result.retrieved]
    assert len(set(texts)) == 2  # two triplets in three places
    features = pipeline.encode_frames([pipeline.read(clip).frames])
    found = pipeline.retrieve(features)

    def weights(groups):
        encoded = model.encoder(features, found.triplets, found.similarity, torch.tensor([groups]), explain=True)
        return encoded.explanation.triplet_weights

    merged = weights([texts.index(text) for text in texts])
    torch.testing.assert_close(result.explanation.triplet_weights, merged)
    assert not torch.allclose(merged, weights([0, 1, 2]), atol=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        {"num_triplets": 1},
        {"order": "emotion_first"},
        {"router": "video"},
        {"bias_adjustment": False},
        {"retrieval": False},
        {"merge_identical_triplets": True},
    ],
    ids=lambda config: "-".join(map(str, *config.items())),
)
def test_every_setting_captions_a_batch_as_its_videos_alone(config, clip, tmp_path):
    other = write_video(tmp_path / "other.mp4", frames=5, width=32, height=80)
    pipeline = tiny_pipeline("tiny-t5", **config)
    together = pipeline.caption_batch([clip, other], max_new_tokens=4, min_new_tokens=4)
    for path, result in zip((clip, other), together, strict=True):
        alone = pipeline(path, max_new_tokens=4, min_new_tokens=4)
        assert torch.equal(result.ids, alone.ids)
        assert len(result.retrieved) == (pipeline.model.encoder.config.num_triplets if pipeline.repository else 0)
        for one, single in zip(result.retrieved, alone.retrieved, strict=True):
            assert one.caption == single.caption
            assert one.routing_weight == pytest.approx(single.routing_weight, rel=1e-4)
            assert one.component_weights == pytest.approx(single.component_weights, rel=1e-4)
        assert result.emotions[0][1] == pytest.approx(alone.emotions[0][1], rel=1e-4)
        assert result.describe().startswith("caption: ")


def test_random_parts_leave_the_random_numbers_alone():
    for decoder in ("lstm", "tiny-t5"):
        state = torch.get_rng_state()
        tiny_pipeline(decoder)
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("width", ["video_dim", "text_dim", "output_dim"])
def test_widths_in_a_random_models_configuration_are_refused(width):
    with pytest.raises(ValueError, match=f"config must leave the widths to the other parts, got {width}"):
        random_model("lstm", config=TINY | {width: 24})


def test_bad_input_is_named(pipeline, clip, tmp_path):
    with pytest.raises(TypeError, match="sources must be a list of video files, got one path"):
        pipeline.caption_batch(str(clip))
    with pytest.raises(ValueError, match="video_ids must be as many as sources, 1, got 2"):
        pipeline.caption_batch([clip], video_ids=["a", "b"])
    with pytest.raises(TypeError, match="video_ids must be a list of ids, one a source, got one string 'a'"):
        pipeline.caption_batch([clip], video_ids="a")
    for count in (-1, 2.0, True):
        with pytest.raises(ValueError, match=f"num_emotions must be an integer of at least 0, got {count}"):
            pipeline(clip, num_emotions=count)
    text = tmp_path / "text.mp4"
    text.write_text("no video")
    with pytest.raises(ValueError, match=r"text\.mp4"):
        pipeline(text)


def test_parts_that_do_not_fit_are_refused(pipeline):
    from evc_fast.data.clip import ClipTowers
    from evc_fast.data.repository import EncoderMismatch

    towers, repository, model = pipeline.towers, pipeline.repository, pipeline.model
    with pytest.raises(ValueError, match="towers must write features of width video_dim = 24, got 32"):
        CaptionPipeline(towers, repository, random_model("lstm", video_dim=24, text_dim=32, config=TINY))
    with pytest.raises(ValueError, match="text_dim = 24, got 32"):
        CaptionPipeline(towers, repository, random_model("lstm", video_dim=32, text_dim=24, config=TINY))
    with pytest.raises(ValueError, match="repository must be given"):
        CaptionPipeline(towers, None, model)
    with pytest.raises(ValueError, match="emotion_words must be the 7 words"):
        CaptionPipeline(towers, repository, model, emotion_words=["joy"])
    with pytest.raises(TypeError, match="emotion_words must be a sequence of words, got one string 'sadness'"):
        CaptionPipeline(towers, repository, model, emotion_words="sadness")
    with pytest.raises(EncoderMismatch):
        CaptionPipeline(ClipTowers.random("tiny", seed=1), repository, model)


def test_importing_the_pipeline_needs_neither_av_nor_faiss_nor_transformers(clip):
    """Each is named only when the stage that needs it is used."""
    code = f"""
import sys
for name in ("av", "faiss", "transformers", "peft"):
    sys.modules[name] = None
from evc_fast.pipeline import CaptionPipeline, random_model
model = random_model("lstm", video_dim=8, text_dim=8, config={TINY!r})
pipeline = CaptionPipeline.__new__(CaptionPipeline)
pipeline.model = model
try:
    pipeline.read("clip.mp4")
except ModuleNotFoundError as error:
    print("av" in str(error))
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "True"


def small_model(decoder="lstm", **config):
    return random_model(decoder, video_dim=8, text_dim=6, dtype=torch.float32, config=TINY | config)


def batch(model, size=2):
    config = model.encoder.config
    generator = torch.Generator().manual_seed(1)
    video = torch.randn(size, config.num_frames, config.video_dim, generator=generator)
    triplets = torch.randn(size, config.num_triplets, 3, config.text_dim, generator=generator)
    return video, triplets, torch.rand(size, config.num_triplets, generator=generator)


@pytest.mark.parametrize("decoder", ["tiny-t5", "transformer"])
def test_training_reaches_encoder_and_decoder_and_leaves_the_llm_alone(decoder):
    model = small_model(decoder)
    model.train()
    targets = torch.randint(4, 90, (2, 5))
    outputs = model(*batch(model), targets)
    assert outputs.logits.shape[:2] == (2, 5)
    assert outputs.emotion_logits.shape == (2, 7)
    (outputs.logits.float().logsumexp(-1).mean() + outputs.emotion_logits.square().mean()).backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # A fresh LoRA adapter's first factor gets its gradient through the second, which starts at 0.
    assert all(parameter.grad is not None for parameter in trained)
    assert model.encoder.video_projection.weight.grad.abs().sum() > 0
    assert model.trainable_parameters() == sum(parameter.numel() for parameter in trained)
    if decoder == "tiny-t5":
        assert model.trainable_parameters() < model.all_parameters()
        frozen = [p for name, p in model.decoder.named_parameters() if "lora" not in name]
        assert all(parameter.grad is None for parameter in frozen)
    else:
        assert model.trainable_parameters() == model.all_parameters()


def test_generation_is_the_two_parts_in_a_row_without_dropout():
    model = small_model()
    model.train()
    inputs = batch(model)
    generated = model.generate(*inputs, explain=True, num_beams=2, max_new_tokens=4, min_new_tokens=4)
    assert model.training
    assert model.encoder.training
    assert generated.ids.shape == (2, 4)
    model.eval()
    encoded = model.encoder(*inputs)
    assert torch.equal(
        generated.ids, model.decoder.generate(encoded.tokens, num_beams=2, max_new_tokens=4, min_new_tokens=4)
    )
    torch.testing.assert_close(generated.emotion_logits, encoded.emotion_logits)
    assert generated.explanation.triplet_weights.shape == (2, 3)


@pytest.mark.parametrize("decoder", ["tiny-t5", "lstm"])
def test_a_model_comes_back_from_its_folder(decoder, tmp_path):
    model = small_model(decoder)
    model.random_weights = False
    model.save_pretrained(tmp_path / "model")
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"config.json", "encoder", "decoder"}
    loaded = FaceNet.from_pretrained(tmp_path / "model")
    assert not loaded.random_weights
    assert not loaded.training
    inputs = batch(model)
    options = {"max_new_tokens": 5, "min_new_tokens": 5}
    assert torch.equal(loaded.generate(*inputs, **options).ids, model.generate(*inputs, **options).ids)


def test_folders_that_hold_no_model_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        FaceNet.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        FaceNet.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"class": "Other", "random_weights": true}')
    with pytest.raises(ValueError, match="does not describe a FaceNet"):
        FaceNet.from_pretrained(tmp_path)
    with pytest.raises(NotADirectoryError, match="folder must be a directory"):
        small_model().save_pretrained(tmp_path / "config.json")


def test_widths_that_do_not_meet_are_refused():
    encoder = FaceNetEncoder(FaceNetConfig.from_dict(TINY | {"output_dim": 24}))
    with pytest.raises(ValueError, match="decoder's width 16, its output_dim is 24"):
        FaceNet(encoder, build_decoder("lstm", input_dim=16))
