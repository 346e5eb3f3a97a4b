"""Words of the small decoders, and the one place that says how a caption becomes words."""

from __future__ import annotations

import json
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["MAX_CAPTION_WORDS", "PAPER_VOCABULARY_SIZE", "Vocabulary", "caption_words", "check_captions", "cut_words"]

MAX_CAPTION_WORDS = 15  # "the maximum length of captions is set to 15": words, not tokens
PAPER_VOCABULARY_SIZE = 14_034  # of EVC-Combine, which has the most words
SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def caption_words(text: str, max_words: int | None = MAX_CAPTION_WORDS) -> list[str]:
    """The words of a caption: ASCII, lower case, punctuation deleted, split on white space, cut to `max_words`.

    Accents are taken off their letters; what then is not ASCII is deleted. `max_words=None` does not cut.
    """
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode("ascii")
    return ascii_text.lower().translate(_NO_PUNCTUATION).split()[:max_words]


def cut_words(text: str, max_words: int | None = MAX_CAPTION_WORDS) -> str:
    """`text` cut after `max_words` words (split on white space, otherwise as written); None does not cut."""
    return " ".join(text.split()[:max_words])


def check_captions(captions: Iterable[str]) -> list[str]:
    """The captions as a list. Raises ValueError unless they are several strings; a bare string is not."""
    found = type(captions).__name__
    if not isinstance(captions, str) and isinstance(captions, Iterable):
        captions = list(captions)
        others = [type(caption).__name__ for caption in captions if not isinstance(caption, str)]
        if not others:
            return captions
        found = f"one that holds a {others[0]}"
    raise ValueError(f"captions must be a list of strings, got {'a str' if found == 'str' else found}")


class Vocabulary:
    """Words and their ids; ids 0..3 are <pad>, <bos>, <eos>, <unk>.

    Args:
        words: distinct words without the specials; word i gets id 4 + i.
        random: the words are placeholders "<id>" that stand in where there are no captions.
    """

    pad_id, bos_id, eos_id, unk_id = range(4)

    def __init__(self, words: Iterable[str], *, random: bool = False) -> None:
        self.words: tuple[str, ...] = (*SPECIALS, *words)
        self.random = random
        self._ids = {word: index for index, word in enumerate(self.words)}
        if len(self._ids) != len(self.words):
            twice = sorted(word for word, count in Counter(self.words).items() if count > 1)
            raise ValueError(f"words must be distinct and none of {SPECIALS}, these come more than once: {twice[:10]}")
        for word in self.words[len(SPECIALS) :]:
            if not isinstance(word, str) or not word or word.split() != [word]:
                raise ValueError(f"words must be non-empty strings without white space, got {word!r}")

    @classmethod
    def from_captions(
        cls, captions: Iterable[str], dictionary: Iterable[str] = (), *, min_count: int = 1
    ) -> Vocabulary:
        """Words that the training captions hold at least `min_count` times, and all words of the emotion dictionary.

        Captions are cut to 15 words first. The order is alphabetical, so the same words give the same ids.
        """
        if min_count < 1:
            raise ValueError(f"min_count must be at least 1, got {min_count}")
        counts = Counter(word for caption in captions for word in caption_words(caption))
        words = {word for word, count in counts.items() if count >= min_count}
        words.update(word for entry in dictionary for word in caption_words(entry, max_words=None))
        return cls(sorted(words))

    @classmethod
    def placeholder(cls, size: int = PAPER_VOCABULARY_SIZE) -> Vocabulary:
        """`size` entries, specials included, whose words are their own ids, "<4>", "<5>", ...: for timing alone."""
        if size <= len(SPECIALS):
            raise ValueError(f"size must be more than the {len(SPECIALS)} specials, got {size}")
        return cls((f"<{index}>" for index in range(len(SPECIALS), size)), random=True)

    def __len__(self) -> int:
        return len(self.words)

    def __contains__(self, word: object) -> bool:
        return word in self._ids

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and (self.words, self.random) == (other.words, other.random)

    __hash__ = None  # type: ignore[assignment]

    def id_of(self, word: str) -> int:
        """Id of a word, that of <unk> where it is not known."""
        return self._ids.get(word, self.unk_id)

    def encode(self, caption: str, max_words: int | None = MAX_CAPTION_WORDS) -> list[int]:
        """Ids of the caption's words, then <eos>."""
        return [*(self.id_of(word) for word in caption_words(caption, max_words)), self.eos_id]

    def encode_batch(self, captions: Sequence[str], max_words: int | None = MAX_CAPTION_WORDS) -> Tensor:
        """Target ids [B, T] int64 of a list of captions, each ending in <eos>, then <pad>."""
        return pad_sequences([self.encode(caption, max_words) for caption in check_captions(captions)], self.pad_id)

    def decode(self, ids: Sequence[int], max_words: int | None = MAX_CAPTION_WORDS) -> str:
        """The words up to <eos>, without <pad> and <bos>, cut to `max_words`. Raises ValueError on an unknown id."""
        words = []
        for index in ids:
            if not 0 <= index < len(self.words):
                raise ValueError(f"ids must lie in 0..{len(self.words) - 1}, got {index}")
            if index == self.eos_id:
                break
            if index not in (self.pad_id, self.bos_id):
                words.append(self.words[index])
        return " ".join(words[:max_words])

    def save(self, path: str | Path) -> None:
        """Write JSON: {"random": bool, "words": [...]}, the words without the specials, in the order of their ids."""
        content = {"random": self.random, "words": self.words[len(SPECIALS) :]}
        Path(path).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Vocabulary:
        """Read what `save` wrote. Raises ValueError where the file is something else."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not a vocabulary: not JSON ({error})") from error
        if not isinstance(content, dict) or set(content) != {"random", "words"}:
            raise ValueError(f'{path} is not a vocabulary: expected a JSON object with "random" and "words"')
        if not isinstance(content["words"], list) or not isinstance(content["random"], bool):
            raise ValueError(f'{path} is not a vocabulary: "words" must be a list and "random" true or false')
        return cls(content["words"], random=content["random"])


def pad_sequences(sequences: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    """Stack lists of ids into int64 [B, longest], filled up with `pad_id`."""
    longest = max((len(sequence) for sequence in sequences), default=0)
    ids = torch.full((len(sequences), longest), pad_id, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.int64)
    return ids
