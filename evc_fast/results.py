"""What captioning a video gives: the caption and all that explains it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from evc_fast.model.output import Explanation

__all__ = ["STAGES", "CaptionResult", "Picture", "RetrievedFact"]

STAGES = ("video decode", "image tower", "retrieval", "encoder", "decoder")
"""What :attr:`CaptionResult.timings` holds, in the order in which the stages run; "encoder" includes the Q-former."""


class Picture(NamedTuple):
    """One of the frames that were looked at, small, for a person to see."""

    jpeg: bytes
    seconds: float
    """After the video's first frame."""
    width: int
    height: int


@dataclass(frozen=True)
class RetrievedFact:
    """One retrieved caption, its triplet, and the weights that the encoder gave it."""

    caption: str
    triplet: tuple[str, str, str]
    similarity: float
    """Cosine of the video and the caption, (5)."""
    component_weights: tuple[float, float, float] | None = None
    """alpha of subject, predicate, object, (12)."""
    triplet_weight: float | None = None
    """theta, (15)."""
    routing_weight: float | None = None
    """G of (26), mean over the frames."""
    emotions: tuple[tuple[str, float], ...] = ()
    """The emotion words that this triplet attends to most, (19), and their share."""


@dataclass(frozen=True)
class CaptionResult:
    """A caption, and what explains it."""

    text: str
    """At most 15 words; token ids "<17> <3>" where the decoder has no tokenizer."""
    ids: Tensor
    """[T] int64, on the CPU."""
    retrieved: tuple[RetrievedFact, ...]
    """Best first; empty without retrieval."""
    emotions: tuple[tuple[str, float], ...]
    """The emotion words that the classification head finds most likely, and their probability; empty without one."""
    fact_gate: float | None
    """Mean of |B_f| (24): how much of the facts passes; None where it was not asked for."""
    emotion_gate: float | None
    """Mean of |B_e| (25); None too without emotion augmentation."""
    explanation: Explanation | None
    """The same as tensors, on the CPU, batch of one."""
    timings: dict[str, float]
    """Seconds a stage of STAGES; of the whole batch where several videos were captioned together."""
    notes: tuple[str, ...] = field(default=())
    """What a reader of the caption must know, such as random weights or a damaged file."""
    source: str | None = None
    """The video file."""
    batch_size: int = 1
    """How many videos ``timings`` are of."""
    emotion_words: tuple[str, ...] | None = None
    """The W words of ``explanation.emotion_distribution``; None where the dictionary is not known."""
    pictures: tuple[Picture, ...] = ()
    """The frames, in order, where they were asked for."""

    def __str__(self) -> str:
        return self.describe()

    def describe(self) -> str:
        """The caption and its explanation as plain text."""
        lines = [f"caption: {self.text}"]
        for rank, fact in enumerate(self.retrieved, 1):
            lines.append(f"{rank}. {fact.caption!r}, similarity {fact.similarity:.3f}")
            parts = list(fact.triplet)
            if fact.component_weights is not None:
                parts = [f"{part} {weight:.2f}" for part, weight in zip(parts, fact.component_weights, strict=True)]
            line = f"   triplet ({', '.join(parts)})"
            if fact.triplet_weight is not None:
                line += f", weight {fact.triplet_weight:.2f}"
            if fact.routing_weight is not None:
                line += f", routed {fact.routing_weight:.2f}"
            lines.append(line)
            if fact.emotions:
                lines.append(f"   attends to {_shares(fact.emotions)}")
        if self.emotions:
            lines.append(f"emotions: {_shares(self.emotions)}")
        gates = (("facts", self.fact_gate), ("emotions", self.emotion_gate))
        shown = [f"{name} {value:.2f}" for name, value in gates if value is not None]
        if shown:
            lines.append(f"gates: {', '.join(shown)}")
        lines.append("time: " + ", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in self.timings.items()))
        lines.extend(f"note: {note}" for note in self.notes)
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """What `describe` says, in types of JSON; seconds and shares as they are."""
        return {
            "source": self.source,
            "caption": self.text,
            "retrieved": [
                {
                    "caption": fact.caption,
                    "triplet": list(fact.triplet),
                    "similarity": fact.similarity,
                    "component_weights": None if fact.component_weights is None else list(fact.component_weights),
                    "triplet_weight": fact.triplet_weight,
                    "routing_weight": fact.routing_weight,
                    "emotions": dict(fact.emotions),
                }
                for fact in self.retrieved
            ],
            "emotions": dict(self.emotions),
            "gates": {"facts": self.fact_gate, "emotions": self.emotion_gate},
            "seconds": dict(self.timings),
            "batch_size": self.batch_size,
            "notes": list(self.notes),
        }


def _shares(pairs: Sequence[tuple[str, float]]) -> str:
    return ", ".join(f"{word} {value:.3f}" for word, value in pairs)
