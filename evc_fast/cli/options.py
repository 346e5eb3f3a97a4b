"""Options that several commands have, and what their values stand for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from evc_fast.cli.command import UsageError

if TYPE_CHECKING:
    from evc_fast.data.captions import CaptionSet
    from evc_fast.data.clip import ClipTowers
    from evc_fast.data.emotions import EmotionDictionary

TOY = "toy"
"""Names the small CLIP that the package ships."""

CAPTIONS_HELP = (
    "File of captions: EmVidCap's CSV (VideoID,EmCaptions) or COCO-caption JSON; may be given several times."
)

Clip = Annotated[
    str,
    typer.Option(
        "--clip",
        help="CLIP towers: a local folder, a name on the Hugging Face hub, or `toy`, the small CLIP of the package.",
    ),
]
CaptionFiles = Annotated[
    list[Path] | None, typer.Option("--captions", metavar="<path>", help=CAPTIONS_HELP, show_default=False)
]
Prefixes = Annotated[
    list[str] | None,
    typer.Option(
        "--id-prefix",
        metavar="<text>",
        help="Put before every video id of the captions that lacks it, such as `vid`; given several times, one for each"
        " file in turn, training captions before validation or factual ones.",
        show_default=False,
    ),
]
Mapping = Annotated[
    Path | None,
    typer.Option(
        "--mapping", help="File of two columns: video id, and the name of its file (EmVidCap's YouTube names)."
    ),
]
Workers = Annotated[int | None, typer.Option("--workers", min=1, help="Processes; one a core unless given.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.")]
Emotions = Annotated[
    Path | None,
    typer.Option(
        "--emotions", help="Folder of an emotion dictionary, a text file a category; the package's own if left out."
    ),
]
TruncatedToo = Annotated[
    bool, typer.Option("--allow-truncated", help="Take what decodes of a video that breaks off, rather than refuse it.")
]

DEFAULT_CLIP = "openai/clip-vit-base-patch32"


def work_offline(*names: str | os.PathLike[str] | None) -> None:
    """Keeps the Hugging Face libraries off the network where every model named is a folder here, or none is.

    To be called before they are imported: they read the setting once.
    """
    if all(name is None or os.path.isdir(name) for name in names):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")


def silence_transformers() -> None:
    """No load reports, no progress bars, no warnings to its callers; what fails is raised all the same."""
    import warnings

    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def clip_source(name: str) -> str:
    """The folder or the hub's name of the towers that `--clip` names."""
    if name != TOY:
        return name
    from evc_fast.data.toy.assets import CLIP_ASSETS

    return os.fspath(CLIP_ASSETS)


def load_towers(name: str, device: str = "auto") -> ClipTowers:
    """The towers that `--clip` names; errors as of `ClipTowers.from_pretrained` and `choose_device`."""
    source = clip_source(name)
    work_offline(source)
    silence_transformers()
    from evc_fast.data.clip import ClipTowers

    return ClipTowers.from_pretrained(source, device=choose_device(device))


def choose_device(device: str) -> str:
    """ "auto" as the device that it stands for. Raises UsageError for what PyTorch does not know or have."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise UsageError(f"--device must be auto, cpu, or cuda, not {device!r}") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {device}: PyTorch finds no GPU here")
    return device


def id_prefixes(files: Sequence[Path], prefixes: Sequence[str] | None) -> list[str]:
    """The prefix of each file of `prefixes`: none, one for all, or one a file. Raises UsageError for another number."""
    if not prefixes or len(prefixes) == 1:
        return [*(prefixes or [""])] * len(files)
    if len(prefixes) != len(files):
        raise UsageError(f"give --id-prefix once, or once a file of captions, not {len(prefixes)} for {len(files)}")
    return list(prefixes)


def read_all_captions(files: Sequence[Path], prefixes: Sequence[str] | None) -> CaptionSet:
    """The captions of several files as one set."""
    from evc_fast.data.captions import merge_captions, read_captions

    given = id_prefixes(files, prefixes)
    sets = (read_captions(path, id_prefix=prefix) for path, prefix in zip(files, given, strict=True))
    return merge_captions(*sets, names=[str(path) for path in files])


def require_file(path: Path) -> None:
    """Raises where no file can be written at `path`: before the work rather than after it.

    Folders that lack are made when it is written, by `write_document` or `write_report`.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder: name the file to write")
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is no regular file: name the file to write")
    folder = next(above for above in path.absolute().parents if above.exists())
    if not folder.is_dir():
        raise UsageError(f"{folder} is a file: {path} cannot be written")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"nothing may be written to {folder}, where {path} would go")


def write_document(path: Path, content: object) -> None:
    """Writes a JSON document in one step; folders that lack are made."""
    from evc_fast.data.files import write_json

    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)


def source_files(sources: Sequence[Path]) -> list[Path]:
    """The videos below folders, and the files given by name.

    Raises UsageError where there are none, FileNotFoundError for a path that leads nowhere.
    """
    from evc_fast.data.captions import video_files

    nowhere = [str(source) for source in sources if not source.exists()]
    if nowhere:
        raise FileNotFoundError(f"there is no file or folder {', '.join(nowhere)}")
    found = [path for source in sources for path in (video_files(source) if source.is_dir() else [source])]
    if not found:
        raise UsageError(f"there are no videos in {', '.join(map(str, sources))}")
    return found


def unwritable_name(path: Path) -> str | None:
    """What is wrong with a name that is not UTF-8, and so could stand in no list, page or terminal; else None."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return f"the name of {str(path)!a} is not UTF-8: rename it"
    return None


def find_videos(
    sources: Sequence[Path],
    captions: Sequence[Path] | None,
    prefixes: Sequence[str] | None = None,
    mapping: Path | None = None,
    skip_missing: bool = False,
) -> tuple[dict[str, Path], list[str]]:
    """Video id -> file of the videos below folders, or of files given by name; and the ids that have no file.

    With captions those videos alone that they are of, with a mapping those that it names; else all, each by its file's
    name without suffix. Raises UsageError where two are of one name, or a name is not UTF-8, CaptionError as
    `locate_videos`, and as `source_files`.
    """
    from evc_fast.data.captions import locate_videos, read_name_mapping, video_files

    files = source_files(sources)
    names = None if mapping is None else read_name_mapping(mapping)
    wanted = None
    if captions:
        wanted = list(read_all_captions(captions, prefixes).video_ids)
    elif names is not None:
        wanted = list(names)
    if wanted is not None:
        if len(sources) != 1 or not sources[0].is_dir():
            raise UsageError("with --captions or --mapping, name the one folder that all the videos are in")
        missing: list[str] = []
        if skip_missing:
            there = {path.stem for path in video_files(sources[0])}
            missing = [video_id for video_id in wanted if (names or {}).get(video_id, video_id) not in there]
            wanted = [video_id for video_id in wanted if video_id not in set(missing)]
        return locate_videos(wanted, sources[0], names), missing
    found: dict[str, Path] = {}
    for path in files:
        if wrong := unwritable_name(path):
            raise UsageError(wrong)
        if path.stem in found:
            raise UsageError(f"{found[path.stem]} and {path} would both be video {path.stem!r}: rename one of them")
        found[path.stem] = path
    return found, []


def read_dictionary(folder: Path | None) -> EmotionDictionary:
    """The emotion dictionary of a folder, or the package's own."""
    from evc_fast.data.emotions import EmotionDictionary

    return EmotionDictionary.default() if folder is None else EmotionDictionary.from_folder(folder)
