"""What a set of captions is like: lengths, words, emotions, and its bias towards fact or emotion (Sec. 3.1)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from evc_fast.data.captions import CaptionSet
from evc_fast.data.emotions import EmotionDictionary
from evc_fast.model.decoders.vocabulary import MAX_CAPTION_WORDS, caption_words

__all__ = ["BIASES", "Bias", "CaptionStatistics", "bias_of", "describe_captions"]

Bias = Literal["factual", "neutral", "emotional"]
BIASES: tuple[Bias, ...] = ("factual", "neutral", "emotional")

_EMOTIONAL, _FACTUAL = 6, 10  # 1 / t_1 and 1 / t_2


def bias_of(emotion_words: int, words: int) -> Bias:
    """Rule 1: at least one emotion word in six is emotional, at most one in ten factual, between them neutral."""
    if _EMOTIONAL * emotion_words >= words:
        return "emotional"
    return "factual" if _FACTUAL * emotion_words <= words else "neutral"


@dataclass(frozen=True)
class CaptionStatistics:
    """Counts of a caption set; words are those of `caption_words`, of whole captions unless said otherwise.

    lengths: words in a caption -> captions; longer: captions of more than 15 words, which training and metrics cut
    vocabulary: distinct words of the captions cut to 15; words: all of the whole captions
    emotion_words, emotion_categories: word or category -> how often it comes, the most frequent first; a word counts
        in each of its categories
    with_emotion: captions, and videos, with at least one emotion word
    bias: "captions" and "videos" -> rule 1 -> how many; a video's share of emotion words is that of all its captions
    refined: the same by rule 2, where factual captions of the same videos were given: what is neutral or factual by
        rule 1 becomes emotional where one of that video's factual captions is itself emotional by rule 1
    """

    captions: int
    videos: int
    words: int
    vocabulary: int
    lengths: dict[int, int]
    longer: int
    dictionary_words: int
    emotion_words: dict[str, int]
    emotion_categories: dict[str, int]
    with_emotion: dict[str, int]
    bias: dict[str, dict[str, int]]
    refined: dict[str, dict[str, int]] | None

    def to_dict(self) -> dict[str, Any]:
        """What `to_json` writes."""
        return asdict(self)

    def to_json(self) -> str:
        """JSON text."""
        return json.dumps(self.to_dict(), indent=1) + "\n"

    def table(self, most: int = 12) -> str:
        """Plain text; the `most` frequent emotion words and categories."""
        mean = self.words / self.captions
        lines = [
            f"{self.captions} captions of {self.videos} videos",
            f"words a caption: {mean:.1f} on average, {min(self.lengths)} to {max(self.lengths)};"
            f" {self.longer} captions are cut to {MAX_CAPTION_WORDS}",
            f"vocabulary: {self.vocabulary} words;"
            f" {len(self.emotion_words)} of the dictionary's {self.dictionary_words} emotion words",
            f"with an emotion word: {_share(self.with_emotion['captions'], self.captions)} of the captions,"
            f" {_share(self.with_emotion['videos'], self.videos)} of the videos",
            f"emotion words: {_frequent(self.emotion_words, most)}",
            f"categories: {_frequent(self.emotion_categories, most)}",
        ]
        for rule, counts in (("rule 1", self.bias), ("rule 2", self.refined)):
            for level, total in (("captions", self.captions), ("videos", self.videos)):
                if counts is not None:
                    shares = ", ".join(f"{bias} {_share(counts[level][bias], total)}" for bias in BIASES)
                    lines.append(f"{rule}, {level}: {shares}")
        return "\n".join(lines)


def describe_captions(
    captions: CaptionSet, dictionary: EmotionDictionary, *, factual: CaptionSet | None = None
) -> CaptionStatistics:
    """Statistics of a caption set.

    factual: captions of the same videos by people who were not asked for emotions, as MSVD's of EVC-MSVD's videos, for
    rule 2; videos that it lacks stay as rule 1 has them. Raises ValueError where it has none of the videos.
    """
    if not len(captions):
        raise ValueError("there are no captions to describe")
    rows = [(caption.video_id, caption_words(caption.text, max_words=None)) for caption in captions]
    found = [[word for word in words if word in dictionary] for _, words in rows]
    emotion_words = Counter(word for words in found for word in words)
    biases = [bias_of(len(emotions), len(words)) for (_, words), emotions in zip(rows, found, strict=True)]
    video_words, video_emotions = Counter[str](), Counter[str]()
    for (video_id, words), emotions in zip(rows, found, strict=True):
        video_words[video_id] += len(words)
        video_emotions[video_id] += len(emotions)
    video_bias = {video_id: bias_of(video_emotions[video_id], total) for video_id, total in video_words.items()}
    refined = None
    if factual is not None:
        moved = _emotional_videos(captions, factual, dictionary)
        refined = {
            "captions": _count(
                "emotional" if row[0] in moved else bias for row, bias in zip(rows, biases, strict=True)
            ),
            "videos": _count("emotional" if video_id in moved else bias for video_id, bias in video_bias.items()),
        }
    lengths = Counter(len(words) for _, words in rows)
    return CaptionStatistics(
        captions=len(captions),
        videos=len(captions.video_ids),
        words=sum(video_words.values()),
        vocabulary=len({word for _, words in rows for word in words[:MAX_CAPTION_WORDS]}),
        lengths=dict(sorted(lengths.items())),
        longer=sum(count for length, count in lengths.items() if length > MAX_CAPTION_WORDS),
        dictionary_words=len(dictionary),
        emotion_words=_sorted(emotion_words),
        emotion_categories=_sorted(Counter(name for word in emotion_words.elements() for name in dictionary.of(word))),
        with_emotion={"captions": sum(map(bool, found)), "videos": sum(count > 0 for count in video_emotions.values())},
        bias={"captions": _count(biases), "videos": _count(video_bias.values())},
        refined=refined,
    )


def _emotional_videos(captions: CaptionSet, factual: CaptionSet, dictionary: EmotionDictionary) -> set[str]:
    """The videos with a factual caption that is emotional by rule 1."""
    known = set(captions.video_ids) & set(factual.video_ids)
    if not known:
        raise ValueError("rule 2 needs factual captions of the same videos: the two caption sets share no video id")
    moved = set()
    for caption in factual.subset(known):
        words = caption_words(caption.text, max_words=None)
        if bias_of(sum(word in dictionary for word in words), len(words)) == "emotional":
            moved.add(caption.video_id)
    return moved


def _count(biases: Iterable[Bias]) -> dict[str, int]:
    counts = Counter(biases)
    return {bias: counts[bias] for bias in BIASES}


def _sorted(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda entry: (-entry[1], entry[0])))


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %"


def _frequent(counts: Mapping[str, int], most: int) -> str:
    shown = ", ".join(f"{name} {count}" for name, count in list(counts.items())[:most])
    rest = len(counts) - most
    return (shown or "none") + (f" and {rest} more" if rest > 0 else "")
