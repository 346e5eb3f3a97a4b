"""The model card: what a saved model was made of, what it reached, and what it cannot know."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evc_fast.data.emotions import EmotionDictionary
    from evc_fast.data.repository import CaptionRepository
    from evc_fast.model.captioner import FaceNet

__all__ = ["CaptionData", "FrozenPart", "ModelFacts", "model_card", "part_facts", "without_path"]

# Licences of frozen parts as their makers state them, by how their names begin on the hub, in lower case.
_LICENCES = {
    "openai/clip": "MIT, by OpenAI's code repository; its model card calls deployment out of scope",
    "laion/clip": "MIT",
    "google/flan-t5": "Apache 2.0",
    "google/t5-v1_1": "Apache 2.0",
    "google-t5/": "Apache 2.0",
    "facebook/opt": "OPT-175B licence: research, not commercial",
    "glove.": "PDDL 1.0, where it is the GloVe project's own",
}
_MEANINGS = {
    "Acc_sw": "emotion categories of the captions' words that are among those of the annotators' words",
    "Acc_c": "captions with such a category, which count less where wrong ones stand beside right ones",
    "BLEU-1": "words that are in the annotators' captions",
    **{f"BLEU-{n}": f"runs of up to {n} words that are in the annotators' captions" for n in (2, 3, 4)},
    "METEOR": "words, stems and synonyms that are in the annotators' captions",
    "ROUGE-L": "longest sequence of words in common with the annotators' captions",
    "CIDEr": "runs of words in common, the rarer the weightier; may exceed 100",
    "BFS": "BLEU by 0.8, Acc_sw and Acc_c by 0.1 each",
    "CFS": "CIDEr by 0.8, Acc_sw and Acc_c by 0.1 each",
}
_UNKNOWN = "not known to evc_fast: look where it came from"


@dataclass(frozen=True)
class CaptionData:
    """Captions and their videos, as a card counts them."""

    name: str
    videos: int
    captions: int


@dataclass(frozen=True)
class FrozenPart:
    """A part that was taken as it was, and is not of this model's making."""

    name: str
    use: str
    licence: str | None = None
    """None: as known for the name, or said not to be known."""


@dataclass(frozen=True)
class ModelFacts:
    """What a card states. What is not known is left out here and said to be unknown there."""

    name: str = "an emotional video captioner"
    training: tuple[CaptionData, ...] = ()
    validation: tuple[CaptionData, ...] = ()
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    """In percent; None: not computed."""
    metrics_of: str | None = None
    """On what, and how: "validation, 60 videos, step 400, beam 5"."""
    parts: Mapping[str, str] = field(default_factory=dict)
    """Encoder, decoder, repository, dictionary: as `part_facts` describes them."""
    frozen: tuple[FrozenPart, ...] = ()
    settings: Mapping[str, object] = field(default_factory=dict)
    """Seed, steps, loss weights and the like."""
    notes: tuple[str, ...] = ()
    terms: str = (
        "The weights of encoder and decoder come from the training data, whose terms may restrict them: ask whoever "
        "gave you the data."
    )
    """Of the weights that were trained."""


def part_facts(
    model: FaceNet,
    repository: CaptionRepository | None,
    dictionary: EmotionDictionary,
    clip: str | None,
) -> tuple[dict[str, str], tuple[FrozenPart, ...]]:
    """`parts` and `frozen` of a model's facts; `clip` is the name of the towers, None where it is not known."""
    config, decoder = model.encoder.config, model.decoder
    of_encoder = sum(parameter.numel() for parameter in model.encoder.parameters())
    parts = {
        "Encoder": (
            f"FACE-net with Q-former, width {config.dim}, {config.num_frames} frames, K = {config.num_groups}, "
            f"{of_encoder:,} parameters"
        ),
        "Emotion dictionary": f"{len(dictionary.words)} words in {len(dictionary.categories)} categories",
        "Parameters trained": f"{model.trainable_parameters():,} of {model.all_parameters():,}",
    }
    frozen = [FrozenPart(without_path(clip or "CLIP towers"), "features of frames, captions, triplets")]
    if hasattr(decoder, "vocabulary"):
        parts["Decoder"] = f"{decoder.kind}, vocabulary of {len(decoder.vocabulary)} words"
    else:
        llm = without_path(decoder.base.name_or_path or "a language model")
        parts["Decoder"] = f"{llm} ({decoder.family} family), frozen, with LoRA"
        frozen.append(FrozenPart(llm, "writes the caption"))
    if repository is None:
        parts["Repository"] = "none: retrieval is off"
    else:
        extractor = repository.triplet_extractor or "not stated"
        parts["Repository"] = f"{len(repository):,} captions; triplets by: {extractor}"
    if model.encoder.random_emotion_features:
        parts["Emotion words"] = "random vectors stand in for theirs"
    if model.random_weights:
        parts["Weights"] = "random: this model has not been trained, its words mean nothing"
    return parts, tuple(frozen)


def model_card(facts: ModelFacts) -> str:
    """The card as Markdown; nothing in `facts` can add markup of its own."""
    lines = [f"# Model card: {_text(facts.name)}", ""]
    lines += [
        "Made with evc_fast, which implements FACE-net (emotional video captioning): a video in, one English sentence",
        "of at most 15 words out, with the retrieved captions, triplet weights and emotion words that explain it.",
        "",
    ]
    for note in facts.notes:
        lines += [f"> **Note.** {_text(note)}", ""]
    lines += ["    evc-fast caption VIDEO --model FOLDER", ""]
    lines += ["## What it is made of", ""]
    lines += _table(("part", "what"), [(name, what) for name, what in facts.parts.items()], "Not stated.")
    lines += ["## Data", ""]
    rows = [("training", data) for data in facts.training] + [("validation", data) for data in facts.validation]
    counted = [(use, data.name, f"{data.videos:,}", f"{data.captions:,}") for use, data in rows]
    lines += _table(("used for", "captions from", "videos", "captions"), counted, "The training data are not stated.")
    lines += [
        "The model says what people in these data said of such videos, in their words, with their mistakes and their",
        "prejudices. The captions that it retrieves come from its repository; their authors' rights stay with them.",
        "",
        "## Metrics",
        "",
    ]
    if facts.metrics_of:
        lines += [f"Measured on: {_text(facts.metrics_of)}. In percent.", ""]
    scores = [
        (name, "not computed" if value is None else f"{value:.1f}", _MEANINGS.get(name, ""))
        for name, value in facts.metrics.items()
    ]
    lines += _table(("metric", "value", "what it measures"), scores, "None were measured.")
    if facts.settings:
        lines += ["## Training", ""]
        lines += _table(("setting", "value"), [(name, str(value)) for name, value in facts.settings.items()], "")
    lines += [_LIMITS]
    lines += ["## Licences of the frozen parts", ""]
    parts = [(part.name, part.use, part.licence or _licence(part.name)) for part in facts.frozen]
    lines += _table(("part", "use", "licence"), parts, "No frozen part is stated.")
    lines += [
        "evc_fast itself is under the MIT licence.",
        _text(facts.terms),
    ]
    return "\n".join(lines) + "\n"


_LIMITS = """\
## What it cannot know

**It does not recognise what anybody feels.** It learnt which emotion words people wrote beside such pictures.

- A face, a posture or a scene is weak evidence of an emotion. The same expression goes with different feelings, the
  same feeling shows differently or not at all, and people act, mask and perform. Psychologists dispute that emotions
  can be read from expressions at all.
- How emotions are shown and named differs between cultures, ages and persons; disability, illness and
  neurodivergence change it too. The captions are English, and their authors may come from few backgrounds. For people
  unlike those in the data the model may be wrong more often, and by how much has not been measured.
- Its frozen parts were trained by others on data of their own and bring the prejudices of those along.
- It does not hear: speech, music and what was said before are lost, and with them often the reason of an emotion. It
  sees a few frames only.
- What it says may come from a retrieved caption rather than from the video. It can name persons, actions and emotions
  that are not there, fluently. Weights, gates and emotion bars show how the caption was computed, not that it is true;
  they are no probabilities of a feeling.
- Its metrics say how well it agrees with the annotators' words on videos like those that it was trained on. They say
  nothing of other videos.

Do not use it to judge people: not in hiring, schools, policing, border control, insurance, health or credit, not to
watch over workers, and not to find out what a person feels who has not agreed to it. The law may forbid it: in the
European Union the AI Act does so at work and in schools, with few exceptions. It is fit for research on captioning, and
for describing and searching footage where a person checks what it says.
"""


def without_path(name: str) -> str:
    """A hub's name as it is; of a file or folder its last part, since a card is read on other machines."""
    return f"{Path(name).name} (a local path)" if os.path.isabs(name) or os.path.exists(name) else name


def _licence(name: str) -> str:
    return next((licence for start, licence in _LICENCES.items() if name.lower().startswith(start)), _UNKNOWN)


def _table(heads: tuple[str, ...], rows: list[tuple[str, ...]], instead: str) -> list[str]:
    """Lines of a table, or of the sentence that stands for an empty one."""
    if not rows:
        return [instead, ""]
    lines = [" | ".join(heads), " | ".join("---" for _ in heads)]
    lines += [" | ".join(_text(cell) for cell in row) for row in rows]
    return [f"| {line} |" for line in lines] + [""]


def _text(value: str) -> str:
    """One line in which nothing is Markdown or HTML; underscores inside a word are none."""
    return re.sub(r"([\\`*\[\]<>|#&]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", " ".join(str(value).split()))
