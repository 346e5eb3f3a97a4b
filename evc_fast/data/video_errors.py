"""What can be wrong with a video; apart, so that what guards a decoder loads none."""

from __future__ import annotations


class VideoError(ValueError):
    """A video that cannot be read; every kind of it below names the file and the reason in one sentence."""


class UnreadableVideo(VideoError):
    """No demuxer or no decoder takes the file, or not one of its frames decodes."""


class EmptyVideo(VideoError):
    """The file has no bytes."""


class NoVideoStream(VideoError):
    """The file has no moving or still picture: audio, subtitles, or a cover image beside audio only."""


class TruncatedVideo(VideoError):
    """The file breaks off before its end."""


class OutOfMemory(VideoError):
    """Decoding takes more memory than there is: a picture of enormous size, or a header that claims one."""
