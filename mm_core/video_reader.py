"""A video file to frames as they are meant to be seen: upright, in their shape and their colours."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer

from .errors import MagicMirrorError

_CONTAINERS = "mov,matroska,avi,gif"
"""What video files are read as, by FFmpeg's names; mp4 is mov, webm matroska."""
# By FFmpeg's numbers.
_BT709, _BT601, _FULL_RANGE = 1, 5, 2
_MATRICES = {1: _BT709, 4: 4, 5: _BT601, 6: _BT601, 7: 7, 9: 9, 10: 9}
_HDR = {16: "PQ", 18: "HLG"}
# Bicubic, accurate rounding, all of the colours: the default rounds down, by a level on average, and repeats colours
# stored for 2 x 2 pixels. By numbers, since older releases of PyAV have no names for all of them.
_EXACT = 0x4 | 0x40000 | 0x2000 | 0x4000
_HD_LINES = 720
"""From so many on a stream without tags is taken for BT.709, as players do."""
_SQUARE = 0.02
"""By so little a pixel's sides may differ before a frame is stretched: encoders round."""


def open_video(path: Path) -> InputContainer:
    """PyAV's handle of a video file, of a listed container only: others, such as playlists, name further files.

    Raises av.FFmpegError or OSError.
    """
    return av.open(str(path), options={"format_whitelist": _CONTAINERS})


def read_frames(path: Path) -> Iterator[np.ndarray]:
    """The frames of a video file, one after the other, as `rgb` has them.

    Raises MagicMirrorError if the file is missing, damaged, no video, or as `rgb`.
    """
    try:
        with open_video(path) as container:
            if not container.streams.video:
                raise MagicMirrorError(f"{path} holds no pictures, only sound or data. Use a video file")
            for frame in container.decode(video=0):
                yield rgb(frame, container)
    except (av.FFmpegError, OSError) as error:
        raise MagicMirrorError(f"cannot read the video {path}: {error}. Make or copy the file again") from error


def rgb(frame: av.VideoFrame, container: InputContainer) -> np.ndarray:
    """A frame that was decoded of a container's first stream of pictures: (H, W, 3) uint8 RGB.

    Turned as a telephone's file says, its pixels made square, its colours by the matrix and range that it is tagged
    with. Raises MagicMirrorError for what cannot be seen in one such picture: interlaced frames, and HDR.
    """
    stream, name = container.streams.video[0], Path(container.name).name
    if frame.interlaced_frame:
        raise MagicMirrorError(f"{name} is interlaced: a frame shows two moments. Deinterlace it, as by FFmpeg's bwdif")
    if hdr := _HDR.get(stream.codec_context.color_trc):
        raise MagicMirrorError(f"{name} is HDR ({hdr}), whose colours would be pale. Convert it to SDR by tone mapping")
    aspect = float(stream.sample_aspect_ratio or 1)
    width = round(frame.width * aspect) if abs(aspect - 1) > _SQUARE else frame.width
    return _upright(frame.to_ndarray(format="rgb24", width=width, interpolation=_EXACT, **_colours(frame)), frame)


def _colours(frame: av.VideoFrame) -> dict[str, int | None]:
    """For PyAV, which before its version 17 takes every frame for BT.601 unless it is told to change the matrix."""
    if frame.format.is_rgb:
        return {}
    matrix = _MATRICES.get(frame.colorspace, _BT709 if frame.height >= _HD_LINES else _BT601)
    other = _BT601 if matrix == _BT709 else _BT709  # RGB has none, but there must be a change
    full = _FULL_RANGE if frame.color_range == _FULL_RANGE else None
    return {"src_colorspace": matrix, "dst_colorspace": other, "src_color_range": full}


def _upright(picture: np.ndarray, frame: av.VideoFrame) -> np.ndarray:
    """Turned and mirrored by quarters, as the display matrix says: x and y of what is seen are those of the rows of
    ((a, b), (c, d)) by x and y of what is stored."""
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            a, b, _, c, d = np.frombuffer(data, "=i4")[:5].tolist()
            if abs(b) > abs(a):
                picture, a, d = picture.swapaxes(0, 1), c, b
            return np.ascontiguousarray(picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])
    return picture
