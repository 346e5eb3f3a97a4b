"""Where containers keep what they claim: the sizes, durations, frame counts and dimensions in MP4, AVI and Matroska.

The soak test overwrites them. What is found is what FFmpeg's own muxers write; damaged files are not expected here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

CLAIMS = ("sizes", "durations", "frame counts", "dimensions")


class Field(NamedTuple):
    """A number of `width` bytes at `position`; "big" or "little" endian."""

    claim: str
    position: int
    width: int
    order: str


def header_fields(data: bytes) -> list[Field]:
    """The fields of a file's headers; empty for containers that have none (MPEG-TS, raw streams) or are not known."""
    if data[4:8] == b"ftyp":
        return list(_mp4(data, 0, len(data)))
    if data[:4] == b"RIFF":
        return list(_avi(data, 0, len(data)))
    if data[:4] == b"\x1a\x45\xdf\xa3":
        return list(_matroska(data, 0, len(data)))
    return []


_MP4_PARENTS = {b"moov": 8, b"trak": 8, b"edts": 8, b"mdia": 8, b"minf": 8, b"stbl": 8, b"stsd": 16, b"avc1": 86}
# Box -> (claim, offset, width) of the fields it has once, ISO/IEC 14496-12, version 0.
_MP4_FIELDS: dict[bytes, tuple[tuple[str, int, int], ...]] = {
    b"mvhd": (("durations", 20, 4), ("durations", 24, 4)),
    b"mdhd": (("durations", 20, 4), ("durations", 24, 4)),
    b"tkhd": (("durations", 28, 4), ("dimensions", 84, 4), ("dimensions", 88, 4)),
    b"elst": (("frame counts", 12, 4),),
    b"stsz": (("sizes", 12, 4), ("frame counts", 16, 4)),
    b"stts": (("frame counts", 12, 4),),
    b"ctts": (("frame counts", 12, 4),),
    b"stsc": (("frame counts", 12, 4),),
    b"stco": (("frame counts", 12, 4),),
    b"stss": (("frame counts", 12, 4),),
    b"avc1": (("dimensions", 32, 2), ("dimensions", 34, 2)),
}
# Box -> (claim, offset of the first entry) of tables of 4-byte numbers that fill the rest of the box.
_MP4_TABLES = {
    b"elst": ("durations", 16),
    b"stsz": ("sizes", 20),
    b"stts": ("durations", 16),
    b"ctts": ("durations", 16),
    b"stsc": ("frame counts", 16),
    b"stco": ("sizes", 16),
}


def _mp4(data: bytes, start: int, end: int) -> Iterator[Field]:
    while start + 8 <= end:
        size, kind = struct.unpack_from(">I", data, start)[0], data[start + 4 : start + 8]
        if size < 8:
            return
        yield Field("sizes", start, 4, "big")
        for claim, offset, width in _MP4_FIELDS.get(kind, ()):
            yield Field(claim, start + offset, width, "big")
        if kind in _MP4_TABLES:
            claim, offset = _MP4_TABLES[kind]
            for position in range(start + offset, start + size - 3, 4):
                yield Field(claim, position, 4, "big")
        if kind == b"avcC":  # the sequence parameter set: the picture's true size, in H.264's own code
            for position in range(start + 8, start + size):
                yield Field("dimensions", position, 1, "big")
        if kind in _MP4_PARENTS:
            yield from _mp4(data, start + _MP4_PARENTS[kind], start + size)
        start += size


_AVI_FIELDS: dict[bytes, tuple[tuple[str, int], ...]] = {
    b"avih": (("durations", 8), ("frame counts", 24), ("sizes", 36), ("dimensions", 40), ("dimensions", 44)),
    b"strh": (("durations", 28), ("durations", 32), ("frame counts", 40), ("sizes", 44)),
    b"strf": (("sizes", 8), ("dimensions", 12), ("dimensions", 16), ("sizes", 28)),
}


def _avi(data: bytes, start: int, end: int) -> Iterator[Field]:
    while start + 8 <= end:
        kind, size = data[start : start + 4], struct.unpack_from("<I", data, start + 4)[0]
        yield Field("sizes", start + 4, 4, "little")
        for claim, offset in _AVI_FIELDS.get(kind, ()):
            yield Field(claim, start + offset, 4, "little")
        if kind in (b"RIFF", b"LIST"):
            yield from _avi(data, start + 12, start + 8 + size)
        if kind == b"idx1":
            for entry in range(start + 8, start + 8 + size - 15, 16):
                yield Field("sizes", entry + 8, 4, "little")
                yield Field("sizes", entry + 12, 4, "little")
        start += 8 + size + size % 2


_MATROSKA_PARENTS = {0x18538067, 0x1549A966, 0x1654AE6B, 0xAE, 0xE0, 0x1F43B675}
_MATROSKA_FIELDS = {
    0x2AD7B1: "durations",  # TimestampScale
    0x4489: "durations",  # Duration
    0x23E383: "durations",  # DefaultDuration
    0xE7: "durations",  # a cluster's timestamp
    0xB0: "dimensions",
    0xBA: "dimensions",
    0x54B0: "dimensions",
    0x54BA: "dimensions",
    0x63A2: "dimensions",  # CodecPrivate: H.264's sequence parameter set
}


def _matroska(data: bytes, start: int, end: int) -> Iterator[Field]:
    while start + 2 <= end:
        id_width = 9 - data[start].bit_length()
        element = int.from_bytes(data[start : start + id_width], "big")
        start += id_width
        width = 9 - data[start].bit_length()
        size = int.from_bytes(data[start : start + width], "big") & ((1 << 7 * width) - 1)
        yield Field("sizes", start, width, "big")
        start += width
        if element in _MATROSKA_FIELDS:
            if element == 0x63A2:
                yield from (Field("dimensions", position, 1, "big") for position in range(start, start + size))
            else:
                yield Field(_MATROSKA_FIELDS[element], start, size, "big")
        if element in _MATROSKA_PARENTS:
            yield from _matroska(data, start, min(start + size, end))
        start += size
