"""The model card: everything that a reader must find is there, and nothing that it is given can be markup."""

from __future__ import annotations

import re

import pytest

from evc_fast.data.emotions import EmotionDictionary
from evc_fast.model_card import CaptionData, FrozenPart, ModelFacts, model_card, part_facts, without_path
from evc_fast.pipeline import CaptionPipeline

HEADINGS = [
    "What it is made of",
    "Data",
    "Metrics",
    "Training",
    "What it cannot know",
    "Licences of the frozen parts",
]


def section(card, heading):
    return re.split(r"^## ", card.split(f"## {heading}\n")[1], flags=re.MULTILINE)[0]


def rows(text):
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:1] == "|"]


def test_a_full_card_states_all_there_is():
    card = model_card(
        ModelFacts(
            name="the captioner of a test",
            training=(CaptionData("captions_train.csv", 1200, 6000),),
            validation=(CaptionData("captions_val.csv", 60, 300),),
            metrics={"Acc_sw": 71.25, "METEOR": None, "something": 3},
            metrics_of="the validation videos, 60 of them",
            parts={"Encoder": "FACE-net"},
            frozen=(FrozenPart("openai/clip-vit-base-patch32", "features"), FrozenPart("mine", "words", "CC0")),
            settings={"seed": 7},
            notes=("it knows nothing",),
        )
    )
    assert card.startswith("# Model card: the captioner of a test\n")
    assert re.findall("^## (.*)$", card, re.MULTILINE) == HEADINGS
    assert "> **Note.** it knows nothing\n" in card
    assert rows(section(card, "Data"))[2:] == [
        ["training", "captions_train.csv", "1,200", "6,000"],
        ["validation", "captions_val.csv", "60", "300"],
    ]
    metrics = section(card, "Metrics")
    assert "Measured on: the validation videos, 60 of them. In percent." in metrics
    assert [row[:2] for row in rows(metrics)[2:]] == [
        ["Acc_sw", "71.2"],
        ["METEOR", "not computed"],
        ["something", "3.0"],
    ]
    assert rows(section(card, "Training"))[2:] == [["seed", "7"]]
    licences = rows(section(card, "Licences of the frozen parts"))
    assert licences[2][2].startswith("MIT, by OpenAI's code repository")
    assert licences[3] == ["mine", "words", "CC0"]
    assert (
        "evc_fast itself is under the MIT licence.\nThe weights of encoder and decoder come from the training data"
        in card
    )
    limits = section(card, "What it cannot know")
    for said in ("does not recognise what anybody feels", "cultures", "does not hear", "Do not use it to judge people"):
        assert said in limits


def test_a_card_may_state_terms_of_its_own():
    card = model_card(ModelFacts(terms="The weights are under CC0."))
    assert card.endswith("\nevc_fast itself is under the MIT licence.\nThe weights are under CC0.\n")
    assert "whose terms may restrict them" not in card


def test_what_is_not_known_is_said_not_to_be():
    card = model_card(ModelFacts(frozen=(FrozenPart("someone/a-clip", "features"),)))
    assert [heading for heading in HEADINGS if f"## {heading}" in card] == [h for h in HEADINGS if h != "Training"]
    for said in ("Not stated.", "The training data are not stated.", "None were measured."):
        assert said in card
    assert rows(section(card, "Licences of the frozen parts"))[2][2].startswith("not known to evc_fast")
    assert "No frozen part is stated." in model_card(ModelFacts())


@pytest.mark.parametrize(
    "text, shown",
    [
        ("a | b", r"a \| b"),
        ("captions_train.csv", "captions_train.csv"),
        ("__bold__ _it_", r"\_\_bold\_\_ \_it\_"),
        ("a\n\n# head", r"a \# head"),
        ("<b>&amp; [x](y) `z` *i*", r"\<b\>\&amp; \[x\](y) \`z\` \*i\*"),
        ("\\", "\\\\"),
    ],
)
def test_nothing_given_is_markup(text, shown):
    card = model_card(ModelFacts(name=text, parts={text: text}, notes=(text,), terms=text))
    assert card.splitlines()[0] == f"# Model card: {shown}" and card.splitlines()[-1] == shown
    assert f"| {shown} | {shown} |" in card.splitlines()
    assert f"> **Note.** {shown}" in card.splitlines()


def test_paths_of_this_machine_stay_here(tmp_path):
    (tmp_path / "my-clip").mkdir()
    assert without_path(str(tmp_path / "my-clip")) == "my-clip (a local path)"
    assert without_path("/nowhere/glove.6B.300d.txt") == "glove.6B.300d.txt (a local path)"
    assert without_path("openai/clip-vit-base-patch32") == "openai/clip-vit-base-patch32"


@pytest.mark.parametrize("decoder", ["lstm", "tiny-t5"])
def test_parts_are_described_as_they_are(decoder, tmp_path):
    dictionary = EmotionDictionary({"joy": ["happily", "joyful"], "fear": ["afraid"]})
    sizes = {"num_emotions": 3, "dim": 16, "num_frames": 4}
    pipeline = CaptionPipeline.random(decoder, clip="tiny", repository_size=1200, config=sizes)
    parts, frozen = part_facts(pipeline.model, pipeline.repository, dictionary, str(tmp_path))
    assert parts["Emotion dictionary"] == "3 words in 2 categories"
    assert "width 16, 4 frames" in parts["Encoder"]
    assert parts["Repository"].startswith("1,200 captions")
    assert parts["Emotion words"] == "random vectors stand in for theirs"
    assert "not been trained" in parts["Weights"]
    assert [part.use for part in frozen] == ["features of frames, captions, triplets", "writes the caption"][
        : 1 if decoder == "lstm" else 2
    ]
    assert str(tmp_path) not in model_card(ModelFacts(parts=parts, frozen=frozen))
    without, _ = part_facts(pipeline.model, None, dictionary, None)
    assert without["Repository"] == "none: retrieval is off"
