"""Frames carry their index as a row of black and white blocks: tests read from the pixels which frame they got."""

from __future__ import annotations

import io
import os
import struct
import threading
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from evc_fast.data import video
from evc_fast.data.video import (
    EmptyVideo,
    NoVideoStream,
    TruncatedVideo,
    UnreadableVideo,
    VideoError,
    frame_indices,
    read_frames,
)

BITS = 8
WIDTH, HEIGHT = 96, 64  # the code fills the upper half, noise the next quarter, a white block marks the lower right


def marked(index: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    pixels = np.zeros((height, width, 3), np.uint8)
    edges = np.linspace(0, width, BITS + 1).astype(int)
    for bit in range(BITS):
        if index >> bit & 1:
            pixels[: height // 2, edges[bit] : edges[bit + 1]] = 255
    # Noise gives every frame bytes of its own: a file cut at a share of its bytes loses about that share of its frames.
    noise = np.random.default_rng(index).integers(0, 256, (3 * height // 4 - height // 2, width, 3), np.uint8)
    pixels[height // 2 : 3 * height // 4] = noise
    pixels[3 * height // 4 :, edges[BITS - 2] :] = 255
    return pixels


def index_of(frame: torch.Tensor) -> int:
    height, width = frame.shape[:2]
    edges = np.linspace(0, width, BITS + 1).astype(int)
    lit = [frame[height // 4, (edges[bit] + edges[bit + 1]) // 2].float().mean() > 127 for bit in range(BITS)]
    assert frame[-height // 8, -width // 8].float().mean() > 127, "the corner mark is not at the lower right"
    assert frame[-height // 8, width // 8].float().mean() < 127, "the corner mark is mirrored"
    return sum(1 << bit for bit, on in enumerate(lit) if on)


def indices_of(frames: torch.Tensor) -> list[int]:
    return [index_of(frame) for frame in frames]


def write(
    target, count=40, codec="libx264", pixel_format="yuv420p", rate=25, size=(WIDTH, HEIGHT), stamps=None, orient=None,
    container=None, options=None, codec_options=None, images=None,
):  # fmt: skip
    with av.open(target, "w", format=container, options=options or {}) as output:
        stream = output.add_stream(codec, rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt = pixel_format
        stream.options = codec_options or {}
        if orient is not None:
            stream.set_display_rotation(orient[0], hflip=orient[1])
        for position in range(count):
            image = marked(position, *size) if images is None else images[position]
            frame = av.VideoFrame.from_ndarray(image, "rgb24").reformat(format=pixel_format)
            frame.pts = position if stamps is None else stamps[position]
            frame.time_base = Fraction(1, rate)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return target


CONTAINERS = {
    "mp4": dict(name="a.mp4"),
    "mp4-index-first": dict(name="a.mp4", options={"movflags": "faststart"}),
    "mp4-fragmented": dict(name="a.mp4", options={"movflags": "frag_keyframe+empty_moov"}, codec_options={"g": "10"}),
    "mkv": dict(name="a.mkv"),
    "mkv-live": dict(name="a.mkv", options={"live": "1"}),
    "mpegts": dict(name="a.ts"),
    "raw-h264": dict(name="a.h264"),
    "flv": dict(name="a.flv"),
    "webm-vp8": dict(name="a.webm", codec="libvpx"),
    "webm-vp9": dict(name="a.webm", codec="libvpx-vp9", codec_options={"deadline": "realtime", "cpu-used": "8"}),
    "avi-mjpeg": dict(name="a.avi", codec="mjpeg", pixel_format="yuvj420p"),
    "avi-mpeg4": dict(name="a.avi", codec="mpeg4"),
    "mpeg2": dict(name="a.mpg", codec="mpeg2video"),
    "y4m": dict(name="a.y4m", codec="rawvideo"),
    "gif": dict(name="a.gif", codec="gif", pixel_format="rgb8"),
}


def read_bytes(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def clip(folder, kind, **changes):
    options = {**CONTAINERS[kind], **changes}
    return str(write(str(folder / options.pop("name")), **options))


@pytest.mark.parametrize(
    ("num_decoded", "num_frames", "expected"),
    [
        (10, 1, [4]), (1, 1, [0]), (2, 1, [0]), (3, 1, [1]), (10, 2, [0, 9]), (10, 4, [0, 3, 6, 9]),
        (5, 4, [0, 1, 2, 4]), (3, 5, [0, 0, 1, 1, 2]), (1, 3, [0, 0, 0]),
    ],
)  # fmt: skip
def test_frame_indices(num_decoded, num_frames, expected):
    assert frame_indices(num_decoded, num_frames) == expected


@pytest.mark.parametrize("kind", CONTAINERS)
def test_exact_frames_of_every_container(tmp_path, kind):
    path = clip(tmp_path, kind)
    for num_frames in (16, 1, 7):
        sampled = read_frames(path, num_frames)
        assert indices_of(sampled.frames) == frame_indices(40, num_frames)
        assert sampled.frames.shape == (num_frames, HEIGHT, WIDTH, 3)
        assert sampled.frames.dtype == torch.uint8 and sampled.frames.is_contiguous()
        assert sampled.num_decoded == 40 and sampled.damaged == 0
        seconds = torch.tensor(frame_indices(40, num_frames), dtype=torch.float64) / 25
        torch.testing.assert_close(sampled.times, seconds, rtol=0, atol=2e-3)
    assert sampled.duration == pytest.approx(40 / 25, abs=0.045)
    assert sampled.fps == pytest.approx(25, abs=0.7)


def test_more_frames_than_the_video_has(tmp_path):
    sampled = read_frames(clip(tmp_path, "mp4", count=3), 8)
    assert indices_of(sampled.frames) == [0, 0, 0, 0, 1, 1, 1, 2]
    assert read_frames(clip(tmp_path, "mp4", count=1), 3).num_decoded == 1


def test_variable_frame_rate(tmp_path):
    stamps = [0, 1, 2, 3, 50, 51, 90, 200, 201, 400]  # at 1/100 s
    path = write(str(tmp_path / "vfr.mp4"), count=10, rate=100, stamps=stamps)
    sampled = read_frames(path, 5)
    assert indices_of(sampled.frames) == frame_indices(10, 5) == [0, 2, 4, 6, 9]
    assert sampled.times.tolist() == pytest.approx([0.0, 0.02, 0.5, 0.9, 4.0], abs=1e-6)
    assert sampled.duration >= 4.0


def test_time_starts_at_the_first_frame(tmp_path):
    path = write(str(tmp_path / "late.ts"), count=10, stamps=[500 + index for index in range(10)])
    assert read_frames(path, 2).times.tolist() == pytest.approx([0.0, 9 / 25], abs=1e-6)


@pytest.mark.parametrize("degrees", [0, 90, 180, -90])
@pytest.mark.parametrize(
    ("name", "mirrored"),
    [("turned.mp4", False), ("turned.mp4", True), ("turned.mkv", False)],  # Matroska holds an angle, no mirror image
)
def test_display_matrix_is_applied(tmp_path, name, degrees, mirrored):
    # The encoder is given the picture as a turned camera would see it: the matrix must bring the upright one back.
    stored = []
    for index in range(6):
        image = marked(index)
        if mirrored:
            image = image[:, ::-1]  # the mirror comes after the turn
        stored.append(np.ascontiguousarray(np.rot90(image, -degrees // 90)))
    height, width = stored[0].shape[:2]
    path = write(str(tmp_path / name), 6, size=(width, height), images=stored, orient=(degrees, mirrored))
    sampled = read_frames(path, 3)
    assert sampled.frames.shape == (3, HEIGHT, WIDTH, 3)
    assert indices_of(sampled.frames) == [0, 2, 5]


@pytest.mark.parametrize("size", [(97, 65), (33, 47), (17, 129)])
def test_odd_sizes(tmp_path, size):
    path = write(str(tmp_path / "odd.mkv"), 9, pixel_format="yuv444p", size=size)
    sampled = read_frames(path, 4)
    assert sampled.frames.shape == (4, size[1], size[0], 3)
    assert indices_of(sampled.frames) == frame_indices(9, 4)


def test_stream_that_changes_its_size(tmp_path):
    first, second = io.BytesIO(), io.BytesIO()
    write(first, 8, container="h264")
    write(second, 8, container="h264", size=(192, 128))
    path = tmp_path / "both.h264"
    path.write_bytes(first.getvalue() + second.getvalue())
    sampled = read_frames(path, 4)
    assert sampled.num_decoded == 16 and sampled.frames.shape == (4, HEIGHT, WIDTH, 3)
    assert indices_of(sampled.frames) == [0, 5, 2, 7]


def test_colours(tmp_path):
    image = np.zeros((64, 96, 3), np.uint8)
    image[:, :48], image[:, 48:] = (200, 30, 40), (20, 180, 90)
    path = write(str(tmp_path / "rgb.mkv"), 2, codec="ffv1", pixel_format="bgr0", images=[image] * 2)
    np.testing.assert_array_equal(read_frames(path, 1).frames[0].numpy(), image)


class _Unseekable(io.RawIOBase):
    def __init__(self, data: bytes) -> None:
        self._bytes = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        return self._bytes.readinto(memoryview(buffer)[:1000])


@pytest.mark.parametrize("kind", ["mp4", "mp4-fragmented", "mpegts", "mkv-live", "raw-h264", "avi-mjpeg"])
def test_sources_that_cannot_seek(tmp_path, kind):
    path = clip(tmp_path, kind)
    data = read_bytes(path)
    assert indices_of(read_frames(_Unseekable(data), 5).frames) == frame_indices(40, 5)
    fifo = str(tmp_path / "fifo")
    os.mkfifo(fifo)

    def feed() -> None:
        with open(fifo, "wb") as pipe:
            pipe.write(data)

    writer = threading.Thread(target=feed)
    writer.start()
    sampled = read_frames(fifo, 5)
    writer.join()
    assert indices_of(sampled.frames) == frame_indices(40, 5)


def test_file_object_is_left_open_and_can_be_read_again(tmp_path):
    with open(clip(tmp_path, "mp4"), "rb") as file:
        file.seek(100)
        assert indices_of(read_frames(file, 3).frames) == [0, 19, 39]
        assert indices_of(read_frames(file, 3).frames) == [0, 19, 39]
        assert not file.closed


def test_reading_errors_of_a_file_object_reach_the_caller(tmp_path):
    class Failing(io.BytesIO):
        def read(self, size=-1):
            if self.tell() > 3000:
                raise ConnectionError("the line went dead")
            return super().read(size)

    data = read_bytes(clip(tmp_path, "mpegts"))
    with pytest.raises(ConnectionError, match="the line went dead"):
        read_frames(Failing(data))


def test_a_name_with_a_colon_is_no_protocol(tmp_path):
    path = write(str(tmp_path / "a.mp4"), 4)
    odd = tmp_path / "http:%03d.mp4"
    os.rename(path, odd)
    assert indices_of(read_frames(odd, 4).frames) == [0, 1, 2, 3]


@pytest.mark.parametrize("declared", [0, 5, 100000])
def test_declared_frame_counts_are_not_believed(tmp_path, declared):
    path = clip(tmp_path, "avi-mjpeg")
    data = bytearray(read_bytes(path))
    total, length = data.index(b"avih") + 8 + 16, data.index(b"strh") + 8 + 32
    assert struct.unpack_from("<I", data, total) == struct.unpack_from("<I", data, length) == (40,)
    struct.pack_into("<I", data, total, declared)
    struct.pack_into("<I", data, length, declared)
    assert indices_of(read_frames(io.BytesIO(data), 16).frames) == frame_indices(40, 16)


def _packets_less(path: str, out: str, shift: int) -> str:
    """Copies a stream with its time stamps `shift` ticks earlier: what falls before 0 is in the file but not shown."""
    with av.open(path) as source, av.open(out, "w") as output:
        stream = source.streams.video[0]
        copy = output.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.size:
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
                output.mux(packet)
    return out


def test_frames_cut_off_by_an_edit_list_do_not_count(tmp_path):
    path = clip(tmp_path, "mp4")
    with av.open(path) as container:
        tick = int(1 / (25 * container.streams.video[0].time_base))
    sampled = read_frames(_packets_less(path, str(tmp_path / "cut.mp4"), 10 * tick), 7)
    assert sampled.num_decoded == 30
    assert indices_of(sampled.frames) == [10 + index for index in frame_indices(30, 7)]


def test_recording_that_starts_between_key_frames(tmp_path, monkeypatch):
    # The decoder gives fewer frames than there are packets, so that the first guess at n is wrong.
    data = read_bytes(clip(tmp_path, "mpegts", count=100, codec_options={"g": "25"}))
    path = tmp_path / "late.ts"
    path.write_bytes(data[: 188 * 3] + data[len(data) // 2 // 188 * 188 :])
    guesses = []
    original = video._decode_sample
    monkeypatch.setattr(video, "_decode_sample", lambda *args: guesses.append(args[1]) or original(*args))
    sampled = read_frames(path, 8)
    shown = [index_of(frame) for frame in read_frames(path, sampled.num_decoded).frames]
    assert guesses[0] > guesses[1] == sampled.num_decoded == len(shown)
    assert shown == list(range(100 - len(shown), 100))
    assert indices_of(sampled.frames) == [shown[index] for index in frame_indices(len(shown), 8)]


def test_a_stream_that_begins_later_is_passed_over(tmp_path):
    # One frame's packet is renumbered: MPEG-TS takes it for a stream of its own, that nothing had announced.
    data = bytearray(read_bytes(clip(tmp_path, "mpegts", codec_options={"g": "1"})))
    number = slice(1, 3)  # of a packet's bytes: a bit that says that a frame starts here, and the stream's number
    starts = [at for at in range(0, len(data), 188) if data[at:][number] == b"\x41\x00"]
    assert len(starts) == 40
    data[starts[30] + 2] = 1
    sampled = read_frames(io.BytesIO(data), 4, allow_truncated=True)
    assert sampled.num_decoded >= 39
    assert index_of(sampled.frames[0]) == 0 and index_of(sampled.frames[-1]) == 39


def test_only_the_wanted_frames_are_converted(tmp_path, monkeypatch):
    converted = []
    original = video._to_rgb
    monkeypatch.setattr(video, "_to_rgb", lambda frame, *size: converted.append(1) or original(frame, *size))
    read_frames(clip(tmp_path, "mp4", count=100), 6)
    assert len(converted) == 6


TRUNCATED = [
    (kind, share)
    for kind in CONTAINERS
    if kind not in ("mkv-live", "raw-h264", "webm-vp9", "mpeg2", "y4m", "gif")
    for share in (0.03, 0.3, 0.6, 0.95)
]


@pytest.mark.parametrize(("kind", "share"), TRUNCATED)
def test_truncated_files(tmp_path, kind, share):
    path = clip(tmp_path, kind)
    data = read_bytes(path)
    name = os.path.join(tmp_path, "broken_" + os.path.basename(path))
    with open(name, "wb") as file:
        file.write(data[: int(share * len(data))])
    expected = (TruncatedVideo, UnreadableVideo) if share < 0.1 else TruncatedVideo
    with pytest.raises(expected, match="broken_"):
        read_frames(name)
    if kind == "mp4" or share < 0.1:
        return  # without its index nothing of an MP4 can be read
    sampled = read_frames(name, 4, allow_truncated=True)
    assert 0 < sampled.num_decoded <= 40
    if share == 0.6:
        assert indices_of(sampled.frames)[:2] == frame_indices(sampled.num_decoded, 4)[:2]


def test_truncated_before_the_first_frame_is_never_allowed(tmp_path):
    path = clip(tmp_path, "mp4")
    data = read_bytes(path)
    with pytest.raises(TruncatedVideo, match="before its first whole frame"):
        read_frames(io.BytesIO(data[: len(data) // 2]), allow_truncated=True)


def test_junk_behind_a_whole_file_is_no_truncation(tmp_path):
    data = read_bytes(clip(tmp_path, "mp4"))
    for junk in (bytes(100), b"ABCDEFGHIJKL" * 9):
        assert read_frames(io.BytesIO(data + junk), 2).num_decoded == 40


def test_damage_in_the_middle_is_passed_over_and_counted(tmp_path):
    data = bytearray(read_bytes(clip(tmp_path, "mpegts", count=200, codec_options={"g": "20"})))
    middle = len(data) // 2 // 188 * 188
    data[middle : middle + 10 * 188] = bytes(10 * 188)
    sampled = read_frames(io.BytesIO(data), 8)
    assert 150 < sampled.num_decoded <= 200 and sampled.damaged > 0
    assert index_of(sampled.frames[0]) == 0 and index_of(sampled.frames[-1]) == 199


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp"])
def test_a_still_image_is_one_frame(tmp_path, suffix):
    codec, pixel_format = {"png": ("png", "rgb24"), "jpg": ("mjpeg", "yuvj420p"), "bmp": ("bmp", "bgr24")}[suffix]
    path = str(tmp_path / f"still.{suffix}")
    write(path, 1, codec=codec, pixel_format=pixel_format, container="image2", images=[marked(77)])
    sampled = read_frames(path, 3)
    assert sampled.num_decoded == 1 and indices_of(sampled.frames) == [77] * 3
    assert torch.isfinite(sampled.times).all()


def _audio(path: str) -> str:
    with av.open(path, "w") as output:
        stream = output.add_stream("pcm_s16le" if path.endswith("wav") else "aac", rate=16000)
        stream.layout = "mono"
        for start in range(0, 16000, 1000):
            samples = np.zeros((1, 1000), np.int16 if path.endswith("wav") else np.float32)
            frame = av.AudioFrame.from_ndarray(samples, "s16" if path.endswith("wav") else "fltp", "mono")
            frame.sample_rate, frame.pts = 16000, start
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("name", ["sound.wav", "sound.m4a", "sound.mkv"])
def test_audio_alone(tmp_path, name):
    with pytest.raises(NoVideoStream, match=f"{name} has no video stream: it holds audio"):
        read_frames(_audio(str(tmp_path / name)))


def test_a_cover_image_is_not_a_video(tmp_path):
    path = str(tmp_path / "song.mp4")
    with av.open(path, "w") as output:
        sound = output.add_stream("aac", rate=16000)
        sound.layout = "mono"
        cover = output.add_stream("png")
        cover.width, cover.height, cover.pix_fmt = WIDTH, HEIGHT, "rgb24"
        cover.disposition = av.stream.Disposition.attached_pic
        output.mux(cover.encode(av.VideoFrame.from_ndarray(marked(1), "rgb24")))
        output.mux(cover.encode(None))
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate, frame.pts = 16000, 0
        output.mux(sound.encode(frame))
        output.mux(sound.encode(None))
    with pytest.raises(NoVideoStream, match=r"song\.mp4 has no video stream"):
        read_frames(path)


def test_files_that_are_no_video(tmp_path):
    contents = {
        "empty.mp4": (b"", EmptyVideo, "0 bytes"),
        "garbage.mp4": (np.random.default_rng(0).bytes(50_000), UnreadableVideo, "cannot|not a video"),
        "zeros.avi": (bytes(50_000), UnreadableVideo, "not a video"),
        "notes.txt": (b"a man is talking\n" * 50, UnreadableVideo, "text file"),
    }
    for name, (data, error, words) in contents.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(error, match=words) as caught:
            read_frames(tmp_path / name)
        assert name in str(caught.value) and isinstance(caught.value, VideoError)
    with pytest.raises(UnreadableVideo, match="is a folder"):
        read_frames(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no video file .*nothing\.mp4"):
        read_frames(tmp_path / "nothing.mp4")


@pytest.mark.parametrize("num_frames", [0, -1, 2.0, True, "16", None])
def test_num_frames_is_checked(num_frames):
    with pytest.raises(ValueError, match="num_frames must be an integer of at least 1"):
        read_frames("unread.mp4", num_frames)


def test_source_is_checked():
    with pytest.raises(TypeError, match="source must be a path or a binary file object, not int"):
        read_frames(3)
