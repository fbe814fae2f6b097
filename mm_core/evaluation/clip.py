"""The frames of a clip become arrays: the person's face in every frame, and the optical flow between frames."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import MagicMirrorError
from ..faces.analysis import Face, FaceAnalyzer
from ..faces.tracking import find_faces, follow
from .flow import FlowFunction, FlowMeter
from .opens2v import MotionAmplitude
from .recognisers import Judge, describe


@dataclass(frozen=True, kw_only=True, eq=False)
class ClipAnalysis:
    """What was found in a clip of F frames. Coordinates are in pixels of the frames; rows without a face are NaN.

    size: width and height of the frames in pixels.
    boxes: (F, 4) float32, left, top, right and bottom.
    landmarks: (F, 5, 2) float32, as those of a face.
    embeddings: (F, C) float32, not normalised; C is zero if no frame has a face.
    yaws: (F,) degrees. judged: the same faces by each of the other judges, by its name; as embeddings.
    amplitude: OpenS2V-Eval's motion amplitude, in pixels.
    strengths: (F - 1,) of the flow between one frame and the next, in pixels.
    consistencies: (F - 2,) of one flow and the next, 0 to 1.
    """

    size: tuple[int, int]
    boxes: np.ndarray
    landmarks: np.ndarray
    embeddings: np.ndarray
    yaws: np.ndarray
    judged: dict[str, np.ndarray]
    amplitude: float
    strengths: np.ndarray
    consistencies: np.ndarray

    def __len__(self) -> int:
        return len(self.boxes)

    @property
    def found(self) -> np.ndarray:
        """(F,) bool: which frames show the face."""
        return ~np.isnan(self.boxes[:, 0])


def analyse_clip(
    analyzer: FaceAnalyzer,
    frames: Iterable[np.ndarray],
    flow_between: FlowFunction | None = None,
    judges: Sequence[Judge] = (),
) -> ClipAnalysis:
    """Follow the person through the frames, (H, W, 3) uint8 RGB each, all of one size.

    flow_between: the optical flow to use; by default the one that needs no weights. judges: others who see the faces.

    Raises MagicMirrorError if there are no frames, or of different sizes.
    """
    faces: list[Face | None] = []
    last: Face | None = None
    judged: dict[str, list[np.ndarray | None]] = {judge.name: [] for judge in judges}
    flow, amplitude = FlowMeter(flow_between), MotionAmplitude()
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
        for judge in judges:
            judged[judge.name].append(face and describe(judge, frame, face))
        flow.add(frame)
        amplitude.add(frame)
    if size is None:
        raise MagicMirrorError("the video holds no frame. Make or copy the file again")
    return ClipAnalysis(
        size=size,
        boxes=_rows([face and face.box for face in faces], (4,)),
        landmarks=_rows([face and face.landmarks for face in faces], (5, 2)),
        embeddings=_rows([face and face.embedding for face in faces]),
        yaws=_rows([face and np.array(face.yaw) for face in faces], ()),
        judged={name: _rows(values) for name, values in judged.items()},
        amplitude=amplitude.value,
        strengths=np.asarray(flow.strengths, np.float64),
        consistencies=np.asarray(flow.consistencies, np.float64),
    )


def _rows(values: list[np.ndarray | None], shape: tuple[int, ...] | None = None) -> np.ndarray:
    """(len(values), *shape) float32, NaN where there is no value. shape: by default theirs, (0,) if there are none."""
    if shape is None:
        shape = next((value.shape for value in values if value is not None), (0,))
    rows = np.full((len(values), *shape), np.nan, np.float32)
    for index, value in enumerate(values):
        if value is not None:
            rows[index] = value
    return rows
