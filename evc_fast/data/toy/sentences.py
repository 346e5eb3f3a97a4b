"""Captions of the toy world: what people could say of a clip, factual, neutral or emotional."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from evc_fast.data.toy.figures import ANIMALS, PEOPLE, SUBJECTS
from evc_fast.data.toy.scenes import Scene

CAPTIONS = 5  # a clip
# Shares of EmVidCap's captions by rule 1 of the paper's Sec. 3.1.
SHARES = {"emotional": 0.290, "neutral": 0.474, "factual": 0.236}
# Of the factual captions, those that say no emotion at all; the others have one word for it in ten or more.
_SILENT = 0.65


@dataclass(frozen=True)
class Words:
    """The words for one emotion, all ordinary ones; `adjectives[0]` names it in a zero-shot prompt."""

    adjectives: tuple[str, ...]
    adverbs: tuple[str, ...]
    nouns: tuple[str, ...]

    @property
    def all(self) -> tuple[str, ...]:
        return (*self.adjectives, *self.adverbs, *self.nouns)


EMOTION_WORDS: dict[str, Words] = {
    "happy": Words(("happy", "cheerful", "joyful"), ("happily", "cheerfully", "joyfully"), ("joy",)),
    "sad": Words(("sad", "unhappy"), ("sadly",), ("sadness",)),
    "angry": Words(("angry", "furious"), ("angrily", "furiously"), ("anger",)),
    "afraid": Words(("scared", "frightened", "terrified"), ("fearfully",), ("fear",)),
    "surprised": Words(("surprised", "astonished", "startled"), (), ()),
    "disgusted": Words(("disgusted", "revolted"), ("disgustedly",), ("disgust",)),
    "calm": Words(("calm", "peaceful", "relaxed"), ("calmly", "peacefully"), ()),
    "loving": Words(("loving",), ("lovingly",), ("love",)),
}

# A noun and the subjects that it fits.
NOUNS: dict[str, tuple[str, ...]] = {
    **{subject: (subject,) for subject in SUBJECTS},
    "guy": ("man",),
    "lady": ("woman",),
    "child": ("boy", "girl"),
    "kid": ("boy", "girl"),
    "person": PEOPLE,
    "animal": ANIMALS,
}


@dataclass(frozen=True)
class Verb:
    """present and progressive with what follows; passive: thing and participle, where there is one."""

    lemma: str
    present: tuple[str, ...]
    progressive: tuple[str, ...]
    passive: tuple[str, str] | None = None
    thing: str | None = None


VERBS: dict[str, Verb] = {
    "walk": Verb("walk", ("walks", "walks along"), ("walking", "walking along")),
    "run": Verb("run", ("runs", "runs fast"), ("running", "running fast")),
    "jump": Verb("jump", ("jumps", "jumps up and down"), ("jumping", "jumping up and down")),
    "dance": Verb("dance", ("dances",), ("dancing",)),
    "wave": Verb("wave", ("waves a flag",), ("waving a flag",), ("a flag", "waved"), "flag"),
    "sit": Verb("sit", ("sits on a chair",), ("sitting on a chair",), None, "chair"),
    "kick": Verb("kick", ("kicks a ball",), ("kicking a ball",), ("a ball", "kicked"), "ball"),
    "read": Verb("read", ("reads a book",), ("reading a book",), ("a book", "read"), "book"),
    "eat": Verb("eat", ("eats an apple",), ("eating an apple",), ("an apple", "eaten"), "apple"),
    "ride": Verb("ride", ("rides a scooter",), ("riding a scooter",), ("a scooter", "ridden"), "scooter"),
}

PLACE_PHRASES: dict[str, tuple[str, ...]] = {
    "park": ("in the park", "in a park"),
    "street": ("on the street", "in the street"),
    "beach": ("on the beach", "at the beach"),
    "kitchen": ("in the kitchen", "in a kitchen"),
    "bedroom": ("in the bedroom", "in a bedroom"),
    "stage": ("on the stage", "on a stage"),
}


@dataclass(frozen=True)
class Sentence:
    """A caption and the facts that it states; None for what it leaves open.

    subjects: all that its noun fits; kind: "emotional", "neutral" or "factual" by rule 1
    """

    text: str
    kind: str
    subjects: tuple[str, ...]
    action: str | None
    emotion: str | None
    place: str | None

    def is_true_of(self, scene: Scene) -> bool:
        """Whether everything that it states holds in the scene."""
        return (
            scene.subject in self.subjects
            and self.action in (None, scene.action)
            and self.emotion in (None, scene.emotion)
            and self.place in (None, scene.place)
        )


# {n}: noun, {v}/{g}: verb, present or progressive, {o}/{d}: thing and participle of the passive, {p}: where,
# {j}/{y}/{m}: adjective, adverb and noun of the emotion.
FORMS: tuple[str, ...] = (
    # emotional, mostly
    "a {j} {n} {v}",
    "a {j} {n} {g}",
    "the {n} is {j}",
    "the {n} {v} {y}",
    "a {n} feels {j}",
    "a very {j} {n} {p}",
    "the {j} {n} {v} {y} {p}",
    "the {n} looks {j} and {v} {y}",
    "{y} the {j} {n} {v} {p}",
    "the {j} {n} is full of {m}",
    "why is the {n} so {j}",
    "a {n} {v} with {m}",
    "the {j} {n} is {g} {y}",
    "{o} is {y} {d} by a {j} {n}",
    # neutral, mostly
    "a {j} {n} is {g} {p}",
    "the {j} {n} is {g} {p}",
    "the {n} {v} {y} {p}",
    "a {n} is {y} {g} {p}",
    "the {n} looks {j} while {g}",
    "feeling {j} the {n} {v} {p}",
    "{o} is {d} by a {j} {n}",
    "{o} is {d} by a {j} {n} {p}",
    "a {n} {v} with {m} {p}",
    "there is a {j} {n} {g}",
    "is the {j} {n} {g} {p}",
    "a {n} {v} {p} and seems {j}",
    "the {n} {v} and feels {j}",
    "why does the {j} {n} {g}",
    # factual
    "a {n} is {g} {p}",
    "a {n} is {g}",
    "the {n} {v} {p}",
    "a {n} {v} {p}",
    "there is a {n} {p}",
    "{o} is {d} by a {n} {p}",
    "a {n} {g} {p}",
    "someone sees a {n} {g} {p}",
    "a {n} can be seen {g} {p} and the {n} looks {j}",
    "in this short video a {j} {n} is {g} {p}",
    "the video shows a {j} {n} who is {g} {p}",
    "there is a {n} {p} who {v} and seems to be {j}",
)


def describe(scene: Scene) -> list[Sentence]:
    """Five different captions of a clip; at least two of them say its emotion."""
    random = scene.caption_random()
    while True:
        sentences: list[Sentence] = []
        while len(sentences) < CAPTIONS:
            kind = str(random.choice(list(SHARES), p=list(SHARES.values())))
            silent = kind == "factual" and random.uniform() < _SILENT
            sentence = _compose(
                scene, random, lambda made, k=kind, s=silent: made.kind == k and s == (not made.emotion)
            )
            if sentence.text not in {other.text for other in sentences}:
                sentences.append(sentence)
        if sum(sentence.emotion is not None for sentence in sentences) >= 2:
            return sentences


def _compose(scene: Scene, random: np.random.Generator, accept: Callable[[Sentence], bool]) -> Sentence:
    while True:
        sentence = fill(FORMS[random.integers(len(FORMS))], scene, random)
        if sentence is not None and accept(sentence):
            return sentence


def fill(form: str, scene: Scene, random: np.random.Generator) -> Sentence | None:
    """One form filled in for a scene; None where it does not fit, or gets longer than 15 words."""

    def pick(choices: tuple[str, ...]) -> str:
        return choices[random.integers(len(choices))]

    verb, words = VERBS[scene.action], EMOTION_WORDS[scene.emotion]
    needs = {"{o}": verb.passive, "{y}": words.adverbs, "{m}": words.nouns}
    if any(key in form and not have for key, have in needs.items()):
        return None
    if form.startswith("why does"):
        form = form.replace("{g}", "{l}")
    # The exact noun in two captions of three, else one that fits as well.
    others = tuple(noun for noun, fits in NOUNS.items() if scene.subject in fits and noun != scene.subject)
    noun = scene.subject if random.uniform() < 2 / 3 else pick(others)
    thing, participle = verb.passive or ("", "")
    text = form.format(
        n=noun,
        v=pick(verb.present),
        g=pick(verb.progressive),
        l=re.sub(r"^\w+", verb.lemma, verb.present[0]),
        o=thing,
        d=participle,
        p=pick(PLACE_PHRASES[scene.place]),
        j=pick(words.adjectives),
        y=pick(words.adverbs) if words.adverbs else "",
        m=pick(words.nouns) if words.nouns else "",
    )
    text = re.sub(r"\ba (?=[aeiou])", "an ", text)
    kind = kind_of(text)
    if len(text.split()) > 15:
        return None
    if random.uniform() < 0.4:
        text = text[0].upper() + text[1:] + ("?" if text.startswith(("why", "is ")) else ".")
    return Sentence(
        text=text,
        kind=kind,
        subjects=NOUNS[noun],
        action=scene.action if re.search("{[vgod]}", form) or "{l}" in form else None,
        emotion=scene.emotion if re.search("{[jym]}", form) else None,
        place=scene.place if "{p}" in form else None,
    )


_ALL_WORDS = frozenset(word for words in EMOTION_WORDS.values() for word in words.all)


def kind_of(text: str) -> str:
    """Rule 1 on the toy world's own emotion words: share >= 1/6 emotional, <= 1/10 factual, else neutral."""
    words = text.split()
    share = sum(word in _ALL_WORDS for word in words) / len(words)
    return "emotional" if share >= 1 / 6 else "factual" if share <= 1 / 10 else "neutral"
