"""Frames from any video file: N frames at index floor(i (n - 1) / (N - 1)) of n decoded ones.

What a container declares (frame count, duration, index) is never trusted, and nothing is sought. A first pass reads the
packets without decoding them, a second decodes and converts only the wanted frames; where the decoder gave another
number of frames than there were packets (damage, recordings that start between key frames), it decodes once more with
the number it now knows. So the indices are exact for variable frame rates, unseekable containers and wrong headers
alike, and no more than the wanted frames are held.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple

import av
import numpy as np
import torch

from evc_fast.data.truncation import missing_bytes
from evc_fast.data.video_errors import (
    EmptyVideo,
    NoVideoStream,
    OutOfMemory,
    TruncatedVideo,
    UnreadableVideo,
    VideoError,
)

__all__ = [
    "EmptyVideo",
    "NoVideoStream",
    "OutOfMemory",
    "TruncatedVideo",
    "UnreadableVideo",
    "VideoError",
    "VideoFrames",
    "frame_indices",
    "read_frames",
]

_SPOOL_BYTES = 64 << 20  # a pipe's bytes are kept in memory up to here, beyond on disk
_MAX_REORDER = 16  # no codec delays a frame by more: damage among the last 16 frames cannot be told from a break
_MAX_PASSES = 4


class VideoFrames(NamedTuple):
    """N sampled frames and what is known of the video they come from.

    frames: uint8 [N, H, W, 3], RGB, upright (the container's rotation and mirroring applied), contiguous
    times: float64 [N], seconds after the first decoded frame, as the file's time stamps have it
    num_decoded: n, the frames that the decoder gave
    duration: seconds from the first frame's start to the last frame's end
    fps: n / duration, the mean frame rate (0 where the duration is unknown)
    damaged: packets and frames that were lost or that the decoder marked as corrupt
    """

    frames: torch.Tensor
    times: torch.Tensor
    num_decoded: int
    duration: float
    fps: float
    damaged: int


def frame_indices(num_decoded: int, num_frames: int) -> list[int]:
    """Index floor(i (n - 1) / (N - 1)) for i = 0 .. N - 1 of n = `num_decoded` frames; N = 1 takes the middle one."""
    if num_frames == 1:
        return [(num_decoded - 1) // 2]
    return [i * (num_decoded - 1) // (num_frames - 1) for i in range(num_frames)]


def read_frames(
    source: str | os.PathLike[str] | BinaryIO,
    num_frames: int = 16,
    *,
    allow_truncated: bool = False,
    threads: int = 0,
) -> VideoFrames:
    """Samples `num_frames` frames of a video: a path, a pipe, or a binary file object (read from its start, left open).

    A source that cannot seek (pipe, socket, standard input) is first copied to memory, beyond 64 MB to a temporary
    file. A still image is a video of one frame. Frames repeat where the video has fewer than `num_frames`. A stream
    that changes its size is scaled to the size of its first sampled frame. Damage in the middle of a stream is passed
    over, as players do, and counted in `damaged`.

    A file that breaks off is refused, since its sample would cover only a part of the video; with
    `allow_truncated=True` what can be decoded is taken as the whole. A break is recognised by the container's own
    lengths (MP4, MOV, Matroska, WebM, AVI) or by damage that reaches the last frames; a stream without such lengths
    (MPEG-TS, FLV, GIF, raw) that was cut exactly between two frames cannot be told from a shorter one.

    `threads` of the decoder: 0 takes as many as it finds cores; the frames are the same.

    Raises FileNotFoundError, TypeError and ValueError for the arguments, and the kinds of VideoError: UnreadableVideo,
    EmptyVideo, NoVideoStream, TruncatedVideo, OutOfMemory. What a file object raises while it is read is passed on.
    """
    if isinstance(num_frames, bool) or not isinstance(num_frames, int) or num_frames < 1:
        raise ValueError(f"num_frames must be an integer of at least 1, not {num_frames!r}")
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 0:
        raise ValueError(f"threads must be an integer of at least 0, not {threads!r}")
    with _seekable(source) as video:
        video.threads = threads
        missing = missing_bytes(video.file)
        if missing and not allow_truncated:
            raise TruncatedVideo(
                f"{video.name} breaks off: it has {video.size} bytes and its container promises at least {missing} more"
            )
        try:
            return _read(video, num_frames, allow_truncated)
        except (NoVideoStream, UnreadableVideo) as error:
            if not missing:
                raise
            raise TruncatedVideo(f"{video.name} breaks off before its first whole frame") from error
        except MemoryError as error:
            raise OutOfMemory(f"decoding {video.name} takes more memory than there is") from error


@dataclass
class _Source:
    """What can be opened again and again: `target` is for PyAV, `file` is a seekable view of the same bytes."""

    name: str
    target: str | BinaryIO
    file: BinaryIO
    size: int
    threads: int = 0


@contextmanager
def _seekable(source: str | os.PathLike[str] | BinaryIO) -> Iterator[_Source]:
    with ExitStack() as stack:
        if isinstance(source, (str, os.PathLike)):
            name = os.fspath(source)
            try:
                mode = os.stat(name).st_mode
            except FileNotFoundError:
                raise FileNotFoundError(f"there is no video file {name}") from None
            if stat.S_ISDIR(mode):
                raise UnreadableVideo(f"{name} is a folder, not a video file")
            file = stack.enter_context(open(name, "rb"))
            # "file:" keeps FFmpeg from reading a protocol into a name with a colon; its own reader needs no Python.
            target: str | BinaryIO = f"file:{name}"
            can_seek = stat.S_ISREG(mode)
        elif hasattr(source, "read"):
            name, file, target = str(getattr(source, "name", "the video stream")), source, source
            can_seek = bool(getattr(source, "seekable", lambda: False)())
        else:
            raise TypeError(f"source must be a path or a binary file object, not {type(source).__name__}")
        if not can_seek:
            spool = stack.enter_context(tempfile.SpooledTemporaryFile(max_size=_SPOOL_BYTES))
            shutil.copyfileobj(file, spool)
            file = target = spool
        size = file.seek(0, os.SEEK_END)
        if size == 0:
            raise EmptyVideo(f"{name} is empty: it has 0 bytes")
        yield _Source(name, target, file, size)


@contextmanager
def _opened(video: _Source) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    video.file.seek(0)
    try:
        container = av.open(video.target, "r")
    except MemoryError:  # PyAV's own is an FFmpegError too
        raise
    except (av.FFmpegError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UnreadableVideo(f"{video.name} is not a video that FFmpeg can read: {reason}") from error
    with container:
        stream = container.streams.best("video")
        if container.format.name == "tty":  # FFmpeg takes any text for terminal art
            raise UnreadableVideo(f"{video.name} is a text file, not a video")
        if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
            kinds = sorted({other.type for other in container.streams if other is not stream}) or ["no"]
            raise NoVideoStream(f"{video.name} has no video stream: it holds {', '.join(kinds)} streams only")
        if stream.codec_context is None:
            raise UnreadableVideo(f"{video.name} holds a video stream that this FFmpeg has no decoder for")
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = video.threads
        yield container, stream


def _read(video: _Source, num_frames: int, allow_truncated: bool) -> VideoFrames:
    expected = _count_packets(video)
    for _ in range(_MAX_PASSES):
        sample = _decode_sample(video, expected, num_frames)
        if sample.num_decoded == 0:
            raise UnreadableVideo(f"{video.name} holds a video stream, but not one frame of it decodes")
        if sample.health.breaks_off(sample.num_decoded) and not allow_truncated:
            raise TruncatedVideo(f"{video.name} breaks off: the last of its {sample.num_decoded} frames are damaged")
        if sample.num_decoded == expected:
            return sample.finish(num_frames)
        expected = sample.num_decoded
    raise UnreadableVideo(f"{video.name} is damaged: each time it is decoded another number of frames comes out of it")


def _count_packets(video: _Source) -> int:
    """Packets that a frame is to be shown for: a guess at n that costs no decoding."""
    with _opened(video) as (container, stream):
        return sum(1 for packet in _demux(container, stream, _Health()) if packet.size and not packet.is_discard)


@dataclass
class _Health:
    """Where a stream was damaged, so that a break at its end can be told from a scratch in the middle."""

    damaged: int = 0
    last_packet_damaged: bool = False
    last_packet_pts: int | None = None
    corrupt_frames: list[tuple[int, int | None]] = field(default_factory=list)  # index, time stamp

    def breaks_off(self, num_decoded: int) -> bool:
        def at_end(index: int, pts: int | None) -> bool:
            if pts is None or self.last_packet_pts is None:
                return index >= num_decoded - _MAX_REORDER
            return pts >= self.last_packet_pts or index == num_decoded - 1

        return self.last_packet_damaged or any(at_end(index, pts) for index, pts in self.corrupt_frames)


def _demux(container: av.container.InputContainer, stream: av.VideoStream, health: _Health) -> Iterator[av.Packet]:
    """The stream's packets and the empty one that flushes the decoder; a reading error ends them as damage."""
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            return
        except IndexError:  # PyAV's, at a packet of a stream that has only now begun: not ours, and reading goes on
            packets = container.demux(stream)
            continue
        except MemoryError:  # a lack of memory is no damage that could be passed over
            raise
        except av.FFmpegError:
            health.damaged, health.last_packet_damaged = health.damaged + 1, True
            yield av.Packet()
            return
        if packet.size:
            health.last_packet_damaged = packet.is_corrupt
            health.last_packet_pts = packet.pts
            health.damaged += packet.is_corrupt
        yield packet


def _decode(container: av.container.InputContainer, stream: av.VideoStream, health: _Health) -> Iterator[av.VideoFrame]:
    """Every frame that the decoder gives, in the order of presentation; what it refuses is counted and passed over."""
    index = 0
    for packet in _demux(container, stream, health):
        try:
            frames = stream.decode(packet if packet.size else None)
        except av.error.EOFError:
            return
        except MemoryError:
            raise
        except av.FFmpegError:
            health.damaged, health.last_packet_damaged = health.damaged + 1, True
            continue
        for frame in frames:
            if frame.is_corrupt:
                health.damaged += 1
                health.corrupt_frames.append((index, frame.pts))
            yield frame
            index += 1


@dataclass
class _Sample:
    """The distinct wanted frames of one decoding pass, as long as its guess at n has not been confirmed."""

    indices: list[int]  # N, ascending, with repeats
    health: _Health = field(default_factory=_Health)
    frames: dict[int, torch.Tensor] = field(default_factory=dict)  # by index: uint8 [H, W, 3]
    times: dict[int, float] = field(default_factory=dict)
    num_decoded: int = 0
    first_time: float = 0.0
    end_time: float = 0.0

    def finish(self, num_frames: int) -> VideoFrames:
        duration = max(0.0, self.end_time - self.first_time)
        return VideoFrames(
            frames=torch.stack([self.frames[index] for index in self.indices]),
            times=torch.tensor([self.times[index] - self.first_time for index in self.indices], dtype=torch.float64),
            num_decoded=self.num_decoded,
            duration=duration,
            fps=self.num_decoded / duration if duration > 0 else 0.0,
            damaged=self.health.damaged,
        )


def _decode_sample(video: _Source, expected: int, num_frames: int) -> _Sample:
    """Decodes the whole stream, converts the frames that are wanted if it has `expected` of them, and counts all."""
    sample = _Sample(frame_indices(expected, num_frames) if expected else [])
    wanted = set(sample.indices)
    size: tuple[int, int] | None = None
    with _opened(video) as (container, stream):
        rate = float(stream.guessed_rate or 25)  # spaces frames without time stamps (raw streams)
        for index, frame in enumerate(_decode(container, stream, sample.health)):
            # Not frame.time: frames that the flush brings out do not know their time base.
            time = index / rate if frame.pts is None else float(frame.pts * stream.time_base)
            if index == 0:
                sample.first_time = time
            length = float(frame.duration * stream.time_base) if frame.duration else 1 / rate
            sample.end_time = max(sample.end_time, time + length) if index else time + length
            sample.num_decoded = index + 1
            if index in wanted:
                size = size or (frame.width, frame.height)
                sample.frames[index] = _to_rgb(frame, *size)
                sample.times[index] = time
    return sample


def _to_rgb(frame: av.VideoFrame, width: int, height: int) -> torch.Tensor:
    """One decoded frame -> uint8 [H, W, 3], upright."""
    pixels = torch.from_numpy(frame.reformat(width=width, height=height, format="rgb24", threads=1).to_ndarray())
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return pixels
    # Row vectors times [[a, b, u], [c, d, v], [x, y, w]]: a point (x, y) is shown at (a x + c y, b x + d y).
    # Other than right angles do not occur in recorded video; they go to the nearest one.
    a, b, _, c, d = np.frombuffer(bytes(matrix), dtype=np.int32)[:5].tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):
        pixels = pixels.transpose(0, 1)
        flip_x, flip_y = c < 0, b < 0
    else:
        flip_x, flip_y = a < 0, d < 0
    flips = [axis for axis, flipped in ((0, flip_y), (1, flip_x)) if flipped]
    return pixels.flip(flips).contiguous() if flips else pixels.contiguous()
