"""Two runs on the same videos: the difference of every metric, and how far chance could move it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from evc_fast.data.emotions import EmotionDictionary
from evc_fast.metrics.captions import resampled
from evc_fast.metrics.meteor import Meteor, MeteorUnavailable, start_meteor
from evc_fast.metrics.published import METRICS
from evc_fast.metrics.scores import Counts, align, check, count, with_hybrids

__all__ = ["Comparison", "Difference", "compare"]


NOTHING = 0.02
"""In percent: pycocoevalcap's BLEU-4 is up to 100 (1e-15)^(1/4), 0.018, where nothing of four words matches."""


@dataclass(frozen=True)
class Difference:
    """One metric of two runs in percent, second minus first, and the interval of that difference."""

    first: float
    second: float
    difference: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval is on one side of 0, further from it than `NOTHING`."""
        return self.low > NOTHING or self.high < -NOTHING


@dataclass(frozen=True)
class Comparison:
    """differences: metric -> Difference, in the order of `METRICS`; None: not computed, `notes` says why."""

    differences: dict[str, Difference | None]
    videos: int
    samples: int
    seed: int
    level: float
    names: tuple[str, str] = ("first", "second")
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """What `to_json` writes."""
        return {
            "unit": "percent",
            "names": list(self.names),
            "videos": self.videos,
            "bootstrap": {"samples": self.samples, "seed": self.seed, "level": self.level, "paired": True},
            "differences": {
                metric: None if found is None else {**vars(found), "excludes_zero": found.excludes_zero}
                for metric, found in self.differences.items()
            },
            "notes": self.notes,
        }

    def to_json(self) -> str:
        """JSON text."""
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n"

    def table(self) -> str:
        """Plain text; a star marks intervals that exclude 0."""
        rows = [["", *self.names, "difference", "interval", ""]]
        for metric, found in self.differences.items():
            if found is None:
                rows.append([metric, "not computed", "not computed", "", "", ""])
            else:
                interval = f"{found.low:+.1f} .. {found.high:+.1f}"
                figures = [f"{found.first:.1f}", f"{found.second:.1f}", f"{found.difference:+.1f}"]
                rows.append([metric, *figures, interval, "*" if found.excludes_zero else ""])
        title = (
            f"{self.videos} videos, in percent; {100 * self.level:g} % intervals of the difference from {self.samples}"
            f" paired bootstrap samples, seed {self.seed}; * excludes 0"
        )
        return "\n".join([title, *align(rows), *self.notes])


def compare(
    first: Mapping[str, str],
    second: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    dictionary: EmotionDictionary,
    *,
    samples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    meteor: bool = True,
    names: tuple[str, str] = ("first", "second"),
) -> Comparison:
    """The metrics of two sets of captions of the same videos, and percentile intervals of their differences.

    Videos are drawn with replacement, the same for both runs, and every metric is that of the drawn corpus: BLEU,
    METEOR, the accuracies and the hybrids are made of summed counts anew, CIDEr keeps the document frequencies of the
    whole set. Equal arguments give equal intervals. Arguments and errors as of `evaluate`; ValueError also for fewer
    than 2 samples and a level outside of 0..1.
    """
    if samples < 2:
        raise ValueError(f"samples must be at least 2, got {samples}")
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    for captions in (first, second):
        check(captions, references)
    videos = len(references)
    drawn = np.random.default_rng(seed).integers(videos, size=(samples, videos))
    weights = np.zeros((samples + 1, videos), dtype=np.int64)
    np.add.at(weights, (np.arange(samples)[:, None], drawn), 1)
    weights[samples] = 1  # the last row is the corpus itself
    with start_meteor(meteor) as program:
        runs = [count(captions, references, dictionary, program) for captions in (first, second)]
        notes = list(dict.fromkeys(note for run in runs for note in run.captions.notes))
        meteors = _meteor(runs, weights, program, notes)
    first_values, second_values = (
        with_hybrids({**resampled(run.captions, weights), "METEOR": values}, weights @ run.emotion_rows)
        for run, values in zip(runs, meteors, strict=True)
    )
    differences: dict[str, Difference | None] = {}
    for metric in METRICS:
        if first_values[metric] is None or second_values[metric] is None:
            differences[metric] = None
            continue
        gaps = second_values[metric] - first_values[metric]
        low, high = np.quantile(gaps[:samples], [(1 - level) / 2, (1 + level) / 2])
        figures = (first_values[metric][samples], second_values[metric][samples], gaps[samples], low, high)
        differences[metric] = Difference(*map(float, figures))
    return Comparison(differences, videos, samples, seed, level, names, notes)


def _meteor(
    runs: Sequence[Counts], weights: np.ndarray, program: Meteor | MeteorUnavailable, notes: list[str]
) -> list[np.ndarray | None]:
    """METEOR of both runs in percent for each row of weights [R, n], by METEOR itself from summed counts."""
    statistics = [run.captions.meteor_statistics for run in runs]
    found: list[np.ndarray | None] = [None] * len(runs)
    if not isinstance(program, MeteorUnavailable) and all(counts is not None for counts in statistics):
        try:
            found = [100 * program.scores(weights @ counts)[0] for counts in statistics]
        except MeteorUnavailable as error:
            notes.append(f"METEOR: not computed ({error})")
    return found
