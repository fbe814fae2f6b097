"""The frames of a clip become arrays: the person's face in every frame, and the optical flow between frames."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ..errors import MagicMirrorError
from ..faces.analysis import Face, FaceAnalyzer
from ..faces.tracking import find_faces, follow
from .flow import FlowFunction, FlowMeter


@dataclass(frozen=True, kw_only=True, eq=False)
class ClipAnalysis:
    """What was found in a clip of F frames. Coordinates are in pixels of the frames; rows without a face are NaN.

    size: width and height of the frames in pixels.
    boxes: (F, 4) float32, left, top, right and bottom.
    landmarks: (F, 5, 2) float32, as those of a face.
    embeddings: (F, C) float32, not normalised; C is zero if no frame has a face.
    strengths: (F - 1,) of the flow between one frame and the next, in pixels.
    consistencies: (F - 2,) of one flow and the next, 0 to 1.
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


def analyse_clip(
    analyzer: FaceAnalyzer, frames: Iterable[np.ndarray], flow_between: FlowFunction | None = None
) -> ClipAnalysis:
    """Follow the person through the frames, (H, W, 3) uint8 RGB each, all of one size.

    flow_between: the optical flow to use; by default the one that needs no weights.

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


def _rows(values: list[np.ndarray | None], shape: tuple[int, ...]) -> np.ndarray:
    """(len(values), *shape) float32, NaN where there is no value."""
    rows = np.full((len(values), *shape), np.nan, np.float32)
    for row, value in zip(rows, values):
        if value is not None:
            row[:] = value
    return rows
