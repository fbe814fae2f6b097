"""One person through the frames of a clip."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from PIL import Image

from .analysis import Face, FaceAnalyzer, select_face

MIN_SIDE = 256  # pixels: smaller frames are enlarged before faces are looked for
LONGEST_SIDE = 4096  # pixels, of an enlarged frame: one line of 200,000 pixels would fill 39 GB
MAX_STEP = 1.0  # of the face's size: a face farther from where the person was is another one, or there was a cut


def find_faces(analyzer: FaceAnalyzer, frame: np.ndarray, recognise: bool = True) -> list[Face]:
    """`FaceAnalyzer.detect`, on a frame whose shorter side is at least MIN_SIDE: smaller ones are enlarged for it, as
    far as LONGEST_SIDE allows.

    The faces' boxes, landmarks and sizes are in pixels of the frame as it was given.
    """
    height, width = frame.shape[:2]
    scale = min(math.ceil(MIN_SIDE / min(height, width)), LONGEST_SIDE // max(height, width))
    if scale <= 1:
        return analyzer.detect(frame, recognise)
    enlarged = Image.fromarray(frame).resize((width * scale, height * scale), Image.Resampling.BICUBIC)
    return [
        replace(face, box=face.box / scale, landmarks=face.landmarks / scale, size=face.size / scale)
        for face in analyzer.detect(np.asarray(enlarged), recognise)
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
