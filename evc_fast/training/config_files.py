"""YAML files of a configuration: presets, lines for messages, overrides. Knows no key but "preset"."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

try:
    import yaml
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("training needs PyYAML: pip install 'evc-fast[train]'", name=error.name) from error

__all__ = ["PRESETS", "ConfigError", "Origin", "apply_override", "plain_yaml", "preset_path", "read_layers"]

Keys = tuple[str | int, ...]

_MOST_KEYS = 10_000
"""Of a file: far more than a configuration has, far fewer than aliases of aliases can make."""

_FOLDER = Path(__file__).resolve().parent.parent / "configs"
PRESETS = tuple(sorted(path.stem for path in _FOLDER.glob("*.yaml")))


class ConfigError(ValueError):
    """A configuration that cannot be used: what is wrong, and in which file and line, or which override."""


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, to which 7e-4 is a number too: YAML 1.1 wants 7.0e-4 and reads the other as text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


class Origin:
    """Where each key was set, for messages."""

    def __init__(self) -> None:
        self._places: dict[Keys, str] = {}

    def set(self, places: Mapping[Keys, str]) -> None:
        """The place, "run.yaml, line 3", of every key that is set. Forgets what stood below them."""
        kept = (keys for keys in self._places if not any(keys[:depth] in places for depth in range(1, len(keys) + 1)))
        self._places = {keys: self._places[keys] for keys in kept} | dict(places)

    def of(self, keys: Keys) -> str:
        """The place and the key, "run.yaml, line 3: trainer.epochs"; of what is nearest where the key has none."""
        places = [self._places.get(keys[:depth]) for depth in range(len(keys), 0, -1)]
        # A section may have been made by an override of a key in it.
        places += [place for each, place in self._places.items() if each[: len(keys)] == keys]
        place = next(filter(None, places), None)
        return dotted(keys) if place is None else f"{place}: {dotted(keys)}"

    def unknown(self, keys: Keys, siblings: Sequence[str], everything: Sequence[str]) -> str:
        """What to say of a key that there is not: the nearest that there is, in its section if any comes near."""
        name, section = str(keys[-1]), dotted(keys[:-1])
        near = difflib.get_close_matches(name, siblings, n=1)
        elsewhere = [path for path in everything if path.rpartition(".")[2] == name]
        if near:
            nearest = f"{section}.{near[0]}" if section else near[0]
        elif elsewhere:
            nearest = elsewhere[0]
        else:
            nearest = difflib.get_close_matches(dotted(keys), everything, n=1, cutoff=0)[0]
        return f"{self.of(keys)} is not a key of the configuration; the nearest is {nearest}"


def dotted(keys: Keys) -> str:
    """("data", "captions", 0) -> "data.captions.0"."""
    return ".".join(map(str, keys))


def preset_path(source: str | os.PathLike[str]) -> Path:
    """The file that ``source`` names: a file, or else a preset of the package.

    Raises FileNotFoundError, which lists the presets.
    """
    path = Path(source)
    if path.is_file():
        return path
    if str(source).lower() in PRESETS:
        return _FOLDER / f"{str(source).lower()}.yaml"
    raise FileNotFoundError(
        f"there is no configuration file {source}, and no preset of this name: presets are {', '.join(PRESETS)}"
    )


def read_layers(path: Path) -> tuple[dict[str, Any], Origin]:
    """The tree of a file, laid over that of the preset it names, and where each key was set. Raises ConfigError."""
    tree, places = _read_yaml(path)
    origin = Origin()
    base = tree.pop("preset", None)
    if base is None:
        merged: dict[str, Any] = {}
    elif isinstance(base, str) and base.lower() in PRESETS:
        merged, origin = read_layers(preset_path(base))
    else:
        raise ConfigError(f"{places['preset',]}: preset must be one of {', '.join(PRESETS)}, got {base!r}")
    _lay_over(merged, tree)
    origin.set(places)
    return merged, origin


def apply_override(tree: dict[str, Any], override: str, origin: Origin) -> None:
    """Set one "a.b=value" in the tree. Raises ConfigError where it is not of this form, or its path leads nowhere."""
    path, equals, text = override.partition("=")
    names = path.strip().split(".")
    if not equals or not all(names):
        raise ConfigError(f"the override {override!r} must have the form section.key=value")
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=_Loader)):
            raise ConfigError(f"the override {override!r} holds an alias, which only a file may")
        value = yaml.load(text, Loader=_Loader) if text.strip() else None
    except yaml.YAMLError as error:
        raise ConfigError(f"the value of the override {override!r} is not YAML: {_said(error)}") from None
    except RecursionError:
        raise ConfigError(f"the value of the override to {path.strip()} is nested too deeply") from None
    keys: Keys = tuple(int(name) if name.isdecimal() else name for name in names)
    node: Any = tree
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(node, list) and isinstance(key, int) and key <= len(node):
            if key == len(node):
                node.append({})
        elif not isinstance(node, dict) or isinstance(key, int):
            raise ConfigError(f"the override {override!r}: {dotted(keys[:depth])} holds no {key}")
        if last:
            node[key] = value
        elif isinstance(node, dict):
            following = [] if isinstance(keys[depth + 1], int) else {}
            node = node[key] if node.get(key) is not None else node.setdefault(key, following)
        else:
            node = node[key]
    origin.set({keys: f"override {override!r}"})


def plain_yaml(tree: dict[str, Any]) -> str:
    """The tree as YAML, keys in their order."""
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=120)


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[Keys, str]]:
    """The tree of a file, and the line of each of its keys."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from None
    places: dict[Keys, str] = {}
    try:
        node = yaml.compose(text, Loader=_Loader)
        if node is not None:
            _walk(node, (), path, places)
        tree = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {_said(error)}") from None
    except RecursionError:
        raise ConfigError(f"{path} is nested too deeply") from None
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold sections with keys, it holds a {type(tree).__name__}")
    return tree, places


def _walk(node: yaml.Node, keys: Keys, path: Path, places: dict[Keys, str], above: tuple[yaml.Node, ...] = ()) -> None:
    """Note the line of every key below.

    A key that is there twice, of which YAML keeps the last, is refused, and a section that an alias puts into itself.
    """
    if len(places) > _MOST_KEYS:
        raise ConfigError(f"{path} holds more than {_MOST_KEYS:,} keys, aliases written out")
    if any(node is each for each in above):
        raise ConfigError(f"{places[keys]}: {dotted(keys)} is an alias of what it stands in")
    above = (*above, node)
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            below = (*keys, str(key_node.value))
            place = f"{path}, line {key_node.start_mark.line + 1}"
            if below in places:
                raise ConfigError(f"{place}: {dotted(below)} is there already ({places[below]})")
            places[below] = place
            _walk(value_node, below, path, places, above)
    elif isinstance(node, yaml.SequenceNode):
        for number, value_node in enumerate(node.value):
            places[*keys, number] = f"{path}, line {value_node.start_mark.line + 1}"
            _walk(value_node, (*keys, number), path, places, above)


def _lay_over(base: dict[str, Any], tree: dict[str, Any]) -> None:
    """Put the keys of ``tree`` into ``base``; sections are merged, anything else is replaced."""
    for key, value in tree.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _lay_over(base[key], value)
        else:
            base[key] = value


def _said(error: yaml.YAMLError) -> str:
    """PyYAML's message on one line, with its line and column."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    where = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
    return where + (problem or " ".join(str(error).split()))
