"""A video file becomes arrays: the person's face in every frame, and the optical flow between frames."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import av
import numpy as np
from PIL import Image

from ..errors import MagicMirrorError
from ..faces.analysis import Face, FaceAnalyzer, select_face
from .flow import FlowFunction, FlowMeter

MIN_SIDE = 256  # pixels: smaller frames are enlarged before faces are looked for
MAX_STEP = 1.0  # of the face's size: a face farther from where the person was is another one, or there was a cut


@dataclass(frozen=True, kw_only=True, eq=False)
class ClipAnalysis:
    """What was found in a clip of F frames. Coordinates are in pixels of the frames; rows without a face are NaN.

    size: width and height of the frames in pixels.
    boxes: (F, 4) float32 x0 y0 x1 y1.
    landmarks: (F, 5, 2) float32 x y, as in `Face`.
    embeddings: (F, C) float32, not normalised; C is 0 if no frame has a face.
    strengths: (F - 1,) of `flow_strength`, pixels.
    consistencies: (F - 2,) of `flow_consistency`, 0 to 1.
    """

    size: tuple[int, int]
    boxes: np.ndarray
    landmarks: np.ndarray
    embeddings: np.ndarray
    strengths: np.ndarray
    consistencies: np.ndarray

    def __len__(self) -> int:
        return len(self.boxes)

    @property
    def found(self) -> np.ndarray:
        """(F,) bool: which frames show the face."""
        return ~np.isnan(self.boxes[:, 0])


def read_frames(path: Path) -> Iterator[np.ndarray]:
    """The frames of a video file, one after the other, (H, W, 3) uint8 RGB.

    Raises MagicMirrorError if the file is missing, damaged or no video.
    """
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise MagicMirrorError(f"{path} holds no pictures, only sound or data. Use a video file")
            for frame in container.decode(video=0):
                yield frame.to_ndarray(format="rgb24")
    except (av.FFmpegError, OSError) as error:
        raise MagicMirrorError(f"cannot read the video {path}: {error}. Make or copy the file again") from error


def analyse_clip(
    analyzer: FaceAnalyzer, frames: Iterable[np.ndarray], flow_between: FlowFunction | None = None
) -> ClipAnalysis:
    """Follow the person through the frames, (H, W, 3) uint8 RGB each, all of one size. flow_between: DIS by default.

    Raises MagicMirrorError if there are no frames, or of different sizes.
    """
    faces: list[Face | None] = []
    last: Face | None = None
    flow = FlowMeter(flow_between)
    size = None
    for frame in frames:
        now = (frame.shape[1], frame.shape[0])
        if size is not None and now != size:
            sizes = f"{size[0]} x {size[1]} and {now[0]} x {now[1]} px"
            raise MagicMirrorError(f"the frames differ in size, {sizes}. Write the clip again in one size")
        size = now
        face = follow(find_faces(analyzer, frame), last)
        last = face or last
        faces.append(face)
        flow.add(frame)
    if size is None:
        raise MagicMirrorError("the video holds no frame. Make or copy the file again")
    return ClipAnalysis(
        size=size,
        boxes=_rows([face and face.box for face in faces], (4,)),
        landmarks=_rows([face and face.landmarks for face in faces], (5, 2)),
        embeddings=_rows([face and face.embedding for face in faces], last.embedding.shape if last else (0,)),
        strengths=np.asarray(flow.strengths, np.float64),
        consistencies=np.asarray(flow.consistencies, np.float64),
    )


def find_faces(analyzer: FaceAnalyzer, frame: np.ndarray) -> list[Face]:
    """`FaceAnalyzer.detect`, on a frame whose shorter side is at least MIN_SIDE: smaller ones are enlarged for it.

    The faces' boxes, landmarks and sizes are in pixels of the frame as it was given.
    """
    height, width = frame.shape[:2]
    scale = math.ceil(MIN_SIDE / min(height, width))
    if scale == 1:
        return analyzer.detect(frame)
    enlarged = Image.fromarray(frame).resize((width * scale, height * scale), Image.Resampling.BICUBIC)
    return [
        replace(face, box=face.box / scale, landmarks=face.landmarks / scale, size=face.size / scale)
        for face in analyzer.detect(np.asarray(enlarged))
    ]


def follow(faces: list[Face], last: Face | None) -> Face | None:
    """The person among a frame's faces: the one nearest to where the person was last seen.

    The largest, if the person was not seen yet, or if no face is within MAX_STEP of its size: then there was a cut.
    None if there are no faces.
    """
    if not faces:
        return None
    if last is not None:
        nearest = min(faces, key=lambda face: _distance(face, last))
        if _distance(nearest, last) <= MAX_STEP * last.size:
            return nearest
    return select_face(faces, "largest")


def _distance(face: Face, other: Face) -> float:
    """Between the centres of the boxes, in pixels."""
    return float(np.linalg.norm((face.box[:2] + face.box[2:] - other.box[:2] - other.box[2:]) / 2))


def _rows(values: list[np.ndarray | None], shape: tuple[int, ...]) -> np.ndarray:
    """(len(values), *shape) float32, NaN where there is no value."""
    rows = np.full((len(values), *shape), np.nan, np.float32)
    for row, value in zip(rows, values):
        if value is not None:
            row[:] = value
    return rows
