"""The files that captions come in, read row by row, so that every error can say on which line it is."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evc_fast.data.text_files import parse_json, read_text, shortened
from evc_fast.model.decoders.vocabulary import caption_words

ID_COLUMN, CAPTION_COLUMN = "VideoID", "EmCaptions"

_QUOTED = re.compile(r'"((?:[^"]|"")*)"')
_NUMBERED = re.compile(r"(vid)?\d+")  # EmVidCap's ids; no name of YouTube's 11 characters with start and end is one


class CaptionError(ValueError):
    """Captions, ids or their files that cannot be used; one sentence with file and line, entry or id."""


def read_caption_rows(path: str | os.PathLike[str]) -> list[tuple[str, str]]:
    """(video id, caption) of each row of a CSV or COCO-caption JSON file, see `read_captions`."""
    path = Path(path)
    text = _read(path)
    rows = _coco_rows(text, path) if text.lstrip()[:1] in ("{", "[") else _csv_rows(text, path)
    found = []
    for where, video_id, caption in rows:
        if not video_id:
            raise CaptionError(f"{where}: the video id is empty")
        if not caption_words(caption):
            raise CaptionError(
                f"{where}: the caption of {shortened(video_id)} is empty, or without ASCII letters and digits"
            )
        found.append((video_id, caption))
    if not found:
        raise CaptionError(f"{path} holds no captions")
    return found


def _read(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    return read_text(path, CaptionError)


def _csv_rows(text: str, path: Path) -> Iterator[tuple[str, str, str]]:
    """(where, video id, caption) of each row. Empty lines are none."""
    records = _tab_records(text) if "\t" in text.partition("\n")[0] else _comma_records(text, path)
    line, header = next(records, (1, []))
    columns = [name.strip() for name in header]
    missing = [name for name in (ID_COLUMN, CAPTION_COLUMN) if name not in columns]
    if missing:
        found = shortened(", ".join(columns)) if columns else "nothing"
        raise CaptionError(
            f"{path}, line {line}: no column {' and no column '.join(missing)}; expected the header"
            f" {ID_COLUMN},{CAPTION_COLUMN}, separated by a comma or a tab, found {found}"
        )
    id_column, caption_column = columns.index(ID_COLUMN), columns.index(CAPTION_COLUMN)
    for line, fields in records:
        if len(fields) != len(columns):
            advice = ": a caption with a comma needs quotation marks" if len(fields) > len(columns) else ""
            raise CaptionError(
                f"{path}, line {line}: {len(fields)} fields, the header names {len(columns)} columns{advice}"
            )
        yield f"{path}, line {line}", fields[id_column].strip(), fields[caption_column].strip()


def _comma_records(text: str, path: Path) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise CaptionError(f"{path}, line {line}: not CSV ({error}); check the quotation marks") from None
        # An open quotation mark would swallow the rows below it up to the next one.
        if reader.line_num > line:
            raise CaptionError(
                f"{path}, line {line}: a caption goes on to line {reader.line_num}; expected one caption a line,"
                " check the quotation marks"
            )
        if fields:
            yield line, fields


def _tab_records(text: str) -> Iterator[tuple[int, list[str]]]:
    """Quotation marks count only around a whole field: captions that begin with a quoted word are no damage here."""
    for line, row in enumerate(text.split("\n"), start=1):
        if row.strip():
            yield line, [_unquote(field) for field in row.removesuffix("\r").split("\t")]


def _unquote(field: str) -> str:
    quoted = _QUOTED.fullmatch(field.strip())
    return quoted[1].replace('""', '"') if quoted else field


def _coco_rows(text: str, path: Path) -> Iterator[tuple[str, str, str]]:
    """(where, image id, caption) of each annotation."""
    content = parse_json(text, path, CaptionError)
    if not isinstance(content, dict) or "annotations" not in content or "images" not in content:
        raise CaptionError(f'{path} is not COCO-caption JSON: expected an object with "images" and "annotations"')
    known: set[str] = set()
    for where, image in _objects(content["images"], f"{path}: images", ("id",)):
        video_id = _identifier(image["id"], where)
        if video_id in known:
            raise CaptionError(f"{where}: id {shortened(video_id)} comes twice")
        known.add(video_id)
    for where, annotation in _objects(content["annotations"], f"{path}: annotations", ("image_id", "caption")):
        video_id = _identifier(annotation["image_id"], where)
        if video_id not in known:
            raise CaptionError(f'{where}: unknown image_id {shortened(video_id)}, no entry of "images" has it')
        yield where, video_id, _caption(annotation["caption"], where).strip()


def _objects(entries: Any, where: str, keys: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    if not isinstance(entries, list):
        raise CaptionError(f"{where}: expected a list of objects")
    for number, entry in enumerate(entries):
        place = f"{where}[{number}]"
        for key in keys:
            if not isinstance(entry, dict) or key not in entry:
                raise CaptionError(f"{place}: expected an object with {' and '.join(repr(name) for name in keys)}")
        yield place, entry


def _identifier(value: Any, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise CaptionError(f"{where}: an id must be a number or a string, found {shortened(str(value))}")
    return str(value).strip()


def _caption(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise CaptionError(f"{where}: a caption must be a string, found {shortened(str(value))}")
    return value


def read_name_mapping(path: str | os.PathLike[str]) -> dict[str, str]:
    """Video id -> name of its file on YouTube, from two columns separated by white space, a comma or a tab.

    The column whose entries all look like `vid12` or `12` is that of the ids; a first line with the word VideoID names
    it where the entries leave it open. Raises FileNotFoundError without the file; CaptionError, with file and line,
    for a line of other than two columns, an id or a name that comes twice, columns that cannot be told apart, and text
    that is not UTF-8.
    """
    path = Path(path)
    rows: list[tuple[int, list[str]]] = []
    for line, row in enumerate(_read(path).split("\n"), start=1):
        if row.strip():
            fields = [
                field.strip() for field in re.split(r"[,\t]" if re.search(r"[,\t]", row) else r"\s+", row.strip())
            ]
            if len(fields) != 2 or not all(fields):
                raise CaptionError(
                    f"{path}, line {line}: expected a video id and a name, found {shortened(row.strip())}"
                )
            rows.append((line, fields))
    column = None
    if rows and ID_COLUMN in rows[0][1]:
        column = rows.pop(0)[1].index(ID_COLUMN)
    if not rows:
        raise CaptionError(f"{path} names no videos")
    if column is None:
        numbered = [place for place in (0, 1) if all(_NUMBERED.fullmatch(fields[place]) for _, fields in rows)]
        if len(numbered) != 1:
            raise CaptionError(
                f"{path}, line {rows[0][0]}: which column holds ids is open; a first line with {ID_COLUMN} names it"
            )
        column = numbered[0]
    mapping: dict[str, str] = {}
    lines: dict[tuple[bool, str], int] = {}
    for line, fields in rows:
        video_id, name = fields[column], fields[1 - column]
        for entry in ((True, video_id), (False, name)):
            if entry in lines:
                raise CaptionError(
                    f"{path}, line {line}: {shortened(entry[1])} comes twice, first on line {lines[entry]}"
                )
            lines[entry] = line
        mapping[video_id] = name
    return mapping


def read_hypotheses(path: str | os.PathLike[str]) -> dict[str, str]:
    """Video id -> generated caption, which may be empty.

    JSON: an object id -> caption, COCO's results (a list of objects with "image_id" and "caption"), or what
    `Scores.to_json` wrote; or CSV as `read_captions` reads it, with one caption a video. Raises FileNotFoundError
    without the file; CaptionError, with file and line or entry, for an id that comes twice, and as `read_captions`.
    """
    path = Path(path)
    text = _read(path)
    if text.lstrip()[:1] not in ("{", "["):
        rows = _csv_rows(text, path)
    else:
        content = parse_json(text, path, CaptionError)
        if isinstance(content, dict):
            rows = _rows_of_object(content, path)
        else:
            entries = _objects(content, str(path), ("image_id", "caption"))
            rows = ((place, _identifier(e["image_id"], place), _caption(e["caption"], place)) for place, e in entries)
    found: dict[str, str] = {}
    for where, video_id, caption in rows:
        if not video_id:
            raise CaptionError(f"{where}: the video id is empty")
        if video_id in found:
            raise CaptionError(f"{where}: a second caption of video {shortened(video_id)}, expected one a video")
        found[video_id] = caption
    if not found:
        raise CaptionError(f"{path} holds no captions")
    return found


def _rows_of_object(content: dict[str, Any], path: Path) -> Iterator[tuple[str, str, str]]:
    scored = content.get("per_video")
    for video_id, caption in (scored if isinstance(scored, dict) else content).items():
        where = f"{path}: {shortened(video_id)}"
        if isinstance(scored, dict):
            caption = caption.get("hypothesis") if isinstance(caption, dict) else None
        yield where, video_id.strip(), _caption(caption, where)
