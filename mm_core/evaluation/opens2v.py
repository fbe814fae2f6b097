"""What OpenS2V-Eval measures, as its published code does it, oddities included, so that numbers can be compared."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ..faces.analysis import FaceAnalyzer
from ..faces.quality import norm_crop
from ..picture_file import read_image
from .curricularface import CurricularFace

FRAMES = 32  # of a clip, evenly spaced; a shorter clip's frames count several times
DETECTION_SIZE = (320, 320)
_BORDER, _GREY = 0.25, 128  # around a picture without a find, for a second look
_ALIGNED_SIZE = 224
_MAP_WIDTH = 16

Description = tuple[np.ndarray, np.ndarray | None]  # of a face: by ArcFace, by CurricularFace where there are weights


class FaceSim:
    """FaceSim-Arc and, with weights, FaceSim-Cur: the one given picture against 32 frames of a clip.

    Published numbers are with insightface's buffalo_l.
    """

    def __init__(self, analyzer: FaceAnalyzer, curricularface: Path | None = None) -> None:
        self._analyzer = analyzer
        self._network = CurricularFace(curricularface) if curricularface else None
        self._known: dict[Path, Description | None] = {}

    def __call__(self, picture: Path, frames: Iterable[np.ndarray], count: int) -> tuple[float, float]:
        """Arc and Cur, 0 to 1 each: mean cosine, clamped at 0, over the frames with a face; 0 if none has one.

        frames: all `count` of the clip, (H, W, 3) uint8 RGB. NaN without CurricularFace's weights, and where the
        picture shows no face at this protocol's detection size.
        """
        if picture not in self._known:
            self._known[picture] = self._describe(read_image(picture))
        given = self._known[picture]
        if given is None:
            return float("nan"), float("nan")
        indices, times = np.unique(np.linspace(0, count - 1, FRAMES, dtype=int), return_counts=True)
        wanted = dict(zip(indices.tolist(), times.tolist()))
        seen = ((self._describe(frame), wanted[at]) for at, frame in enumerate(frames) if at in wanted)
        found = [(face, number) for face, number in seen if face is not None]
        arc = _mean([(_cosine(given[0], face[0]), number) for face, number in found])
        if self._network is None:
            return arc, float("nan")
        cosines = [(_cosine(given[1], face[1]), number) for face, number in found]
        return arc, _mean([(cosine, number) for cosine, number in cosines if cosine != 0])  # of Cur, not of Arc

    def _describe(self, image: np.ndarray) -> Description | None:
        """The largest face; None without one."""
        found, border = self._analyzer.largest_at(image, DETECTION_SIZE), np.zeros(2, int)
        if found is None:
            border = (np.array(image.shape[:2]) * _BORDER).astype(int)
            wider = np.pad(image, [(side, side) for side in border] + [(0, 0)], constant_values=_GREY)
            found = self._analyzer.largest_at(wider, DETECTION_SIZE)
        if found is None:
            return None
        landmarks, embedding = found
        return embedding, None if self._network is None else self._curricular(image, landmarks - border[::-1])

    def _curricular(self, image: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
        return self._network(norm_crop(image, landmarks, _ALIGNED_SIZE))


class MotionAmplitude:
    """OpenS2V-Eval's motion amplitude by Farneback's flow: `add` the frames in order, then ask for `value`.

    Pixels, 0 and up: the mean flow's size. Motion to the left cancels motion to the right.
    """

    def __init__(self) -> None:
        self._grey: np.ndarray | None = None
        self._maps: list[np.ndarray] = []

    def add(self, frame: np.ndarray) -> None:
        """The next frame, (H, W, 3) uint8 RGB, of the same size as the ones before."""
        import cv2

        grey = cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY)  # of RGB, as published
        if self._grey is not None:
            flow = cv2.calcOpticalFlowFarneback(self._grey, grey, None, 0.5, 3, 15, 3, 5, 1.2, 0)
            size = (_MAP_WIDTH, max(1, int(frame.shape[0] * (_MAP_WIDTH / frame.shape[1]))))
            self._maps.append(cv2.resize(flow, size, interpolation=cv2.INTER_AREA))
        self._grey = grey

    @property
    def value(self) -> float:
        """NaN for a single frame."""
        return float(abs(np.mean(self._maps))) if self._maps else float("nan")


def _cosine(one: np.ndarray, other: np.ndarray) -> float:
    return max(0.0, float(one @ other / np.linalg.norm(one) / np.linalg.norm(other)))


def _mean(weighted: list[tuple[float, int]]) -> float:
    values, weights = zip(*weighted) if weighted else ([0.0], [1])
    return float(np.average(values, weights=weights))
