"""Frames of footage as others make it: turned, tagged in every way, with oblong pixels, interlaced, HDR."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from mm_core.errors import MagicMirrorError
from mm_core.video import write_video
from mm_core.video_reader import read_frames

COLOURS = [(40, 160, 60), (200, 30, 30), (30, 30, 200), (224, 172, 140), (250, 240, 20), (10, 200, 220)]
BT709, BT601, FULL = 1, 5, 2


def footage(
    path: Path, *, height: int = 64, matrix: int = BT709, full: bool = False, tagged: bool = True, **of: Any
) -> Path:
    """Two frames of the colours from left to right, black below. of: attributes of the encoder, or its options."""
    clip = np.repeat(np.array(COLOURS, np.uint8), 16, axis=0)[None].repeat(height, axis=0)
    clip[height // 2 :] = 0
    options = {name: of.pop(name) for name in ("flags", "x264-params") if name in of}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "4"} | options)
        stream.width, stream.height, stream.pix_fmt = clip.shape[1], height, "yuv420p"
        tags = {"colorspace": matrix, "color_range": FULL if full else 1} if tagged else {}
        for name, value in (tags | of).items():
            setattr(stream.codec_context, name, value)
        frame = av.VideoFrame.from_ndarray(clip, format="rgb24").reformat(
            format="yuv420p", dst_colorspace=matrix, dst_color_range=FULL if full else None
        )
        frame.colorspace, frame.color_range = (matrix, FULL if full else 1) if tagged else (2, 0)
        for number in range(2):
            frame.pts, frame.time_base = number, Fraction(1, 8)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def turned(path: Path, matrix: tuple[int, int, int, int]) -> Path:
    """A telephone's file: the display matrix in an mp4's header, after 40 bytes of it."""
    content = bytearray(path.read_bytes())
    start = content.index(b"tkhd") + 44
    a, b, c, d = (value << 16 for value in matrix)
    content[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "of",
    [dict(), dict(full=True), dict(matrix=BT601), dict(tagged=False, height=720), dict(tagged=False, matrix=BT601)],
    ids=str,
)
def test_colours_by_the_tags_and_without_them_by_the_size(tmp_path: Path, of: dict[str, Any]) -> None:
    first = next(read_frames(footage(tmp_path / "a.mp4", **of)))
    assert np.abs(first[len(first) // 4, 8::16].astype(int) - COLOURS).max() <= 4


def test_nothing_becomes_darker(tmp_path: Path) -> None:
    """On average over many colours; curated footage is read twice."""
    soft = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    clip = np.array(Image.fromarray(soft).resize((192, 128), Image.Resampling.BICUBIC))[None]
    read = next(read_frames(write_video(tmp_path / "a.mp4", clip, 8, quality=100)))
    difference = read.astype(float) - clip[0]
    assert np.abs(difference.mean((0, 1))).max() < 0.25


@pytest.mark.parametrize(
    ("matrix", "as_seen"),
    [
        ((0, 1, -1, 0), lambda stored: np.rot90(stored, -1)),  # a telephone held upright
        ((0, -1, 1, 0), np.rot90),
        ((-1, 0, 0, -1), lambda stored: np.rot90(stored, 2)),
        ((-1, 0, 0, 1), np.fliplr),  # a mirrored selfie
        ((0, 1, 1, 0), lambda stored: stored.swapaxes(0, 1)),
    ],
)
def test_footage_is_turned_as_it_is_to_be_seen(tmp_path: Path, matrix: tuple[int, ...], as_seen: Any) -> None:
    path = footage(tmp_path / "a.mp4")
    stored = next(read_frames(path))
    assert np.array_equal(next(read_frames(turned(path, matrix))), as_seen(stored))


def test_pixels_are_made_square(tmp_path: Path) -> None:
    wide = next(read_frames(footage(tmp_path / "a.mp4", sample_aspect_ratio=Fraction(4, 3))))
    assert wide.shape == (64, 128, 3)


@pytest.mark.parametrize(
    ("of", "said"),
    [
        ({"flags": "+ildct+ilme", "x264-params": "tff=1"}, "interlaced"),
        ({"color_trc": 18}, "HLG"),
        ({"color_trc": 16}, "PQ"),
    ],
)
def test_what_no_picture_of_one_moment_shows_is_refused(tmp_path: Path, of: dict[str, Any], said: str) -> None:
    with pytest.raises(MagicMirrorError, match=f"a.mp4 is .*{said}"):
        next(read_frames(footage(tmp_path / "a.mp4", **of)))
