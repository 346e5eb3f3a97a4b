"""Does a container hold all the bytes that it promises? Asked of the file itself: FFmpeg reads on in silence.

ISO media (MP4, MOV, 3GP) is a chain of boxes, Matroska and WebM one segment, RIFF (AVI, WebP) a chain of chunks: each
names its length in bytes, so that a download which broke off is recognised even where it broke between two frames.
"""

from __future__ import annotations

import os
from typing import BinaryIO

_ISO_BOXES = frozenset(
    {b"ftyp", b"moov", b"mdat", b"moof", b"mfra", b"free", b"skip", b"wide", b"styp"}
    | {b"sidx", b"ssix", b"uuid", b"meta", b"pdin", b"prft", b"emsg", b"pnot", b"udta"}
)
_EBML_HEADER = b"\x1a\x45\xdf\xa3"
_MATROSKA_SEGMENT = b"\x18\x53\x80\x67"


def missing_bytes(file: BinaryIO) -> int:
    """Bytes that the container's outermost lengths promise beyond the end of `file` (seekable, left at any position).

    0: nothing is missing, or the format makes no such promise (MPEG-TS, raw streams, FLV, GIF, live recordings).
    An ISO file that ends before its index (`moov`) misses at least one byte.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(12)
    if head[4:8] in _ISO_BOXES:
        return _missing_iso(file, size)
    if head[:4] == _EBML_HEADER:
        return _missing_matroska(file, size)
    if head[:4] == b"RIFF" and len(head) == 12:
        # Recorders that were never finalised leave 0 there, and files beyond 1 GB go on in further chunks.
        return max(0, int.from_bytes(head[4:8], "little") + 8 - size)
    return 0


def _missing_iso(file: BinaryIO, size: int) -> int:
    position, has_index = 0, False
    while position + 8 <= size:
        file.seek(position)
        header = file.read(16)
        length, kind = int.from_bytes(header[:4], "big"), header[4:8]
        if kind not in _ISO_BOXES:
            return 0  # junk behind the last box is not the file's promise
        if length == 1:
            length = int.from_bytes(header[8:16], "big")
        has_index |= kind == b"moov"
        if length < 8:  # 0 is "up to the end of the file", the rest is damage for the demuxer to judge
            return 0
        position += length
    return max(position - size, 0 if has_index else 1)


def _missing_matroska(file: BinaryIO, size: int) -> int:
    file.seek(len(_EBML_HEADER))
    header_length = _read_ebml_length(file)
    if header_length is None:
        return 0
    file.seek(header_length, os.SEEK_CUR)
    if file.read(4) != _MATROSKA_SEGMENT:
        return 0
    segment_length = _read_ebml_length(file)
    return 0 if segment_length is None else max(0, file.tell() + segment_length - size)


def _read_ebml_length(file: BinaryIO) -> int | None:
    """A variable-length integer: its first byte's leading zero bits count the bytes that follow; all ones: unknown."""
    first = file.read(1)
    if not first or first[0] == 0:
        return None
    width = 9 - first[0].bit_length()
    rest = file.read(width - 1)
    value = int.from_bytes(first + rest, "big") & ((1 << 7 * width) - 1)
    return None if len(rest) < width - 1 or value == (1 << 7 * width) - 1 else value
