"""The emotion dictionary D_w and its vectors E_0, equation (2)."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from evc_fast.data.text_files import read_text, shortened
from evc_fast.model.decoders.vocabulary import caption_words

if TYPE_CHECKING:
    from evc_fast.data.clip import ClipTowers

__all__ = ["EMOTION_PROMPT", "EmotionDictionary", "EmotionError", "describe_with_clip", "read_word_vectors"]

EMOTION_PROMPT = "a photo of a person feeling {word}"

_OWN_WORDS = Path(__file__).parent / "emotion_words"


class EmotionError(ValueError):
    """An emotion dictionary or its word vectors that cannot be used; the message names file, line or word."""


class EmotionDictionary:
    """Emotion words in categories. A word may stand in several categories; equal dictionaries compare equal.

    Args:
        categories: name -> its words. Words are kept as captions hold them (`caption_words`): ASCII, lower case,
            without punctuation; one that stands twice in a category counts once.

    Attributes:
        categories: names in alphabetical order -> their words in alphabetical order
        words: the W distinct words, sorted: the order of the rows of E_0

    Raises EmotionError where there is no category, a category is empty or cannot be a file's name, or an entry is not
    one word.
    """

    def __init__(self, categories: Mapping[str, Iterable[str]]) -> None:
        if not categories:
            raise EmotionError("an emotion dictionary needs at least one category")
        self.categories: dict[str, tuple[str, ...]] = {}
        for name in sorted(categories):
            if not name or name != name.strip() or name.startswith(".") or "/" in name:
                raise EmotionError(f"a category's name must do as a file's name, {name!r} does not")
            if isinstance(categories[name], str):
                raise EmotionError(f"category {name!r} must be a list of words, not a str")
            words = {_one_word(entry, f"category {name!r}") for entry in categories[name]}
            if not words:
                raise EmotionError(f"category {name!r} has no words")
            self.categories[name] = tuple(sorted(words))
        places: dict[str, list[str]] = {}
        for name, words in self.categories.items():
            for word in words:
                places.setdefault(word, []).append(name)
        self.words: tuple[str, ...] = tuple(sorted(places))
        self._categories_of = {word: tuple(names) for word, names in places.items()}

    @classmethod
    def default(cls) -> EmotionDictionary:
        """The dictionary that comes with the package, made for it: 34 categories, 179 distinct words."""
        return cls.from_folder(_OWN_WORDS)

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> EmotionDictionary:
        """A folder of one text file a category (its name, without .txt, is the category's), one word a line.

        Empty lines do not count. Where any file ends in .txt only those are read, else all files without a suffix;
        hidden files and folders never. Raises FileNotFoundError without the folder, EmotionError with file and line
        for a file that is empty or not UTF-8 and a line that is not one word.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder of emotion words {folder}")
        files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
        texts = [path for path in files if path.suffix == ".txt"] or [path for path in files if not path.suffix]
        if not texts:
            raise EmotionError(f"{folder} holds no emotion words: expected one text file a category, one word a line")
        categories: dict[str, list[str]] = {}
        for path in texts:
            lines = enumerate(read_text(path, EmotionError).splitlines(), start=1)
            categories[path.stem] = [_one_word(line, f"{path}, line {n}") for n, line in lines if line.strip()]
            if not categories[path.stem]:
                raise EmotionError(f"{path} is empty: expected one word a line")
        return cls(categories)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the format that `from_folder` reads into a folder, which is made if absent and must be empty.

        Raises EmotionError where it is not: a file left over would be a category more.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise EmotionError(f"{folder} must be empty to save an emotion dictionary into")
        for name, words in self.categories.items():
            (folder / f"{name}.txt").write_text("\n".join(words) + "\n", encoding="utf-8")

    def of(self, word: str) -> tuple[str, ...]:
        """The categories of a word in alphabetical order; none where it is not in the dictionary."""
        return self._categories_of.get(word, ())

    def find(self, text: str) -> list[str]:
        """The emotion words of a caption in its order, repeats included; whole words of its first 15, no stemming."""
        return [word for word in caption_words(text) if word in self._categories_of]

    def __len__(self) -> int:
        return len(self.words)

    def __contains__(self, word: object) -> bool:
        return word in self._categories_of

    def __eq__(self, other: object) -> bool:
        return isinstance(other, EmotionDictionary) and self.categories == other.categories

    def __hash__(self) -> int:
        return hash(tuple(self.categories.items()))

    def __repr__(self) -> str:
        return f"EmotionDictionary({len(self.categories)} categories, {len(self)} words)"


def _one_word(entry: str, where: str) -> str:
    words = caption_words(entry, max_words=None)
    if len(words) != 1:
        raise EmotionError(f"{where}: expected one word, found {shortened(entry.strip())}")
    return words[0]


def read_word_vectors(
    path: str | os.PathLike[str],
    words: Sequence[str],
    *,
    dim: int | None = None,
    word_list: str | os.PathLike[str] | None = None,
) -> torch.Tensor:
    """E_0 (2): the vectors of `words` from a GloVe file, float32 [W, dim] in the order of `words`.

    path: a text file of lines `word v1 v2 ...` (a word2vec header is skipped), or a .npy file [n, dim] whose n words
        stand one a line in `word_list`, by default the .txt file of the same name beside it
    dim: the width expected; None takes that of the file. Of a word that comes twice the first vector counts.

    Raises FileNotFoundError without the file; EmotionError where the width is another, where words are missing (it
    lists all of them), and for vectors that are not finite numbers, with the line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of word vectors {path}")
    wanted = dict.fromkeys(words)
    if path.suffix == ".npy":
        found = _vectors_of_array(path, wanted, dim, Path(word_list) if word_list else path.with_suffix(".txt"))
    else:
        found = _vectors_of_text(path, wanted, dim)
    missing = [word for word in wanted if word not in found]
    if missing:
        raise EmotionError(f"{path} has no vector for {len(missing)} of {len(wanted)} words: {', '.join(missing)}")
    return torch.from_numpy(np.stack([found[word] for word in words]))


def _vectors_of_text(path: Path, words: Iterable[str], dim: int | None) -> dict[str, np.ndarray]:
    # Bytes, and only the wanted lines parsed: of gigabytes, a few hundred lines count.
    wanted = {word.encode(): word for word in words}
    found: dict[str, np.ndarray] = {}
    width: int | None = None
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            word, _, rest = line.strip().partition(b" ")
            if number == 1:
                values = rest.split()
                if len(values) == 1 and word.isdigit() and values[0].isdigit():
                    continue  # word2vec's header: how many words, how wide
            if width is None:  # a file of another width is refused at once, not at the first word that it shares
                width = len(_parse(rest.split(), f"{path}, line {number}"))
                if dim not in (None, width):
                    raise EmotionError(f"{path}, line {number}: the vectors are {width} wide, expected {dim}")
            if word not in wanted or wanted[word] in found:
                continue
            where = f"{path}, line {number}: the vector of {wanted[word]!r}"
            vector = _parse(rest.split(), where)
            if len(vector) != width:
                raise EmotionError(f"{where} is {len(vector)} wide, expected {width}")
            found[wanted[word]] = vector
            if len(found) == len(wanted):
                break
    return found


def _parse(values: list[bytes], where: str) -> np.ndarray:
    try:
        with np.errstate(over="ignore"):  # it becomes infinite, which is refused below
            vector = np.array([float(value) for value in values], dtype=np.float32)
    except ValueError:
        vector = np.array([math.nan], dtype=np.float32)
    if not len(vector) or not np.isfinite(vector).all():
        raise EmotionError(f"{where} is not `word v1 v2 ...` with finite numbers")
    return vector


def _vectors_of_array(path: Path, words: Iterable[str], dim: int | None, word_list: Path) -> dict[str, np.ndarray]:
    if not word_list.is_file():
        raise FileNotFoundError(f"there is no word list {word_list} for {path}: expected one word a line, in its order")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise EmotionError(f"{path} is not a .npy file of numbers: {error}") from error
    if array.ndim != 2 or array.dtype.kind != "f":
        raise EmotionError(f"{path} must hold floating-point numbers [words, dim], found {array.dtype} {array.shape}")
    if dim is not None and array.shape[1] != dim:
        raise EmotionError(f"{path}: the vectors are {array.shape[1]} wide, expected {dim}")
    # Only line feeds part lines: words of the large GloVe files hold other separators.
    listed = read_text(word_list, EmotionError).removesuffix("\n").split("\n")
    if len(listed) != len(array):
        raise EmotionError(f"{word_list} lists {len(listed)} words, {path} holds {len(array)} vectors")
    rows: dict[str, int] = {}
    for row, word in enumerate(listed):
        rows.setdefault(word.strip(), row)
    found = {word: np.asarray(array[rows[word]], dtype=np.float32) for word in words if word in rows}
    for word, vector in found.items():
        if not np.isfinite(vector).all():
            raise EmotionError(f"{path}, row {rows[word]}: the vector of {word!r} is not finite")
    return found


def describe_with_clip(words: Sequence[str], towers: ClipTowers) -> torch.Tensor:
    """E_0 (2) without a GloVe file: CLIP's text features of "a photo of a person feeling {word}", float32 [W, D_t]."""
    return towers.encode_text([EMOTION_PROMPT.format(word=word) for word in words])
