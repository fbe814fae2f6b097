"""How well a photo shows a face: sharpness, exposure and covered parts of the aligned face."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping

import numpy as np

ALIGNED_SIZE = 112  # pixels: the aligned crop that ArcFace sees
WHITE = 250  # of 255, in all channels: nothing is left to see
_FACE = (slice(20, 108), slice(16, 96))  # rows and columns of the aligned crop that are face, not background
_ALL, _EYES, _MOUTH = slice(14, 98), slice(38, 64), slice(72, 112)
PARTS = {"eyes": (_EYES, _ALL), "mouth": (_MOUTH, _ALL)}
HALVES = {"left half": (slice(20, 112), slice(0, 56)), "right half": (slice(20, 112), slice(56, 112))}
# Cosine between a face and itself without a part. Of 20 uncovered faces, 2% blur or twice the light included: eyes at
# most .73, mouth .81, halves .33 to .85; with seven kinds of mask the mouth had .82 to .99, with bars the eyes .85 to
# 1.00 (.77 to .88 with a patterned one), a covered half .72 to .98 and the other half .01 to .37.
_NOTHING_THERE = {"eyes": 0.78, "mouth": 0.82}
_HALF_IS_NOTHING, _HALF_IS_ALL = 0.72, 0.40
_REACH = 2  # sizes of the face around its centre: more than any alignment takes


def around(image: np.ndarray, box: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The part of a picture that a face's alignment looks at, as a view, and its left upper corner, (2,) float32.

    Alignment works on that: OpenCV's takes no pictures of more than 32,767 px, and copies of a photo cost memory.
    """
    height, width = image.shape[:2]
    centre, reach = (box[:2] + box[2:]) / 2, _REACH * float((box[2:] - box[:2]).max())
    left, top = (int(np.clip(at - reach, 0, end - 1)) for at, end in zip(centre, (width, height), strict=True))
    right, bottom = (int(np.clip(at + reach, 0, end - 1)) + 1 for at, end in zip(centre, (width, height), strict=True))
    return image[top:bottom, left:right], np.float32([left, top])


def aligned(image: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
    """(112, 112, 3) uint8 RGB: the face as ArcFace sees it, with the picture's edge repeated outside.

    image: (H, W, 3) uint8 RGB. landmarks: (5, 2) in its pixels.
    """
    import cv2
    from insightface.utils import face_align

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # insightface's, about its own call of scikit-image
        matrix = face_align.estimate_norm(landmarks, ALIGNED_SIZE)
        # Align at a whole multiple and shrink by area: sampling a large face at 112 px would invent sharpness.
        multiple = max(1, round(1 / float(np.hypot(matrix[0, 0], matrix[1, 0]))))
        matrix = face_align.estimate_norm(landmarks, ALIGNED_SIZE * multiple)
    size = (ALIGNED_SIZE * multiple, ALIGNED_SIZE * multiple)
    # Replicated, not black: the rim of a tight crop would count as the sharpest edge of the face.
    face = cv2.warpAffine(image, matrix, size, borderMode=cv2.BORDER_REPLICATE)
    return cv2.resize(face, (ALIGNED_SIZE, ALIGNED_SIZE), interpolation=cv2.INTER_AREA)


def norm_crop(image: np.ndarray, landmarks: np.ndarray, size: int) -> np.ndarray:
    """(size, size, 3) uint8: insightface's own crop for recognisers, black outside of the picture. As `aligned`."""
    from insightface.utils import face_align

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # as above
        return face_align.norm_crop(image, landmarks, size)


def measure(image: np.ndarray, landmarks: np.ndarray) -> tuple[float, float, float]:
    """`Face`'s sharpness, blown and brightest of the face at these landmarks."""
    import cv2

    face = aligned(image, landmarks)
    grey = cv2.cvtColor(face, cv2.COLOR_RGB2GRAY)
    sharpness = float(cv2.Laplacian(grey, cv2.CV_64F).var())
    blown = float((face[_FACE].min(axis=-1) >= WHITE).mean())
    return sharpness, blown, float(np.percentile(grey[_FACE], 95))


def without_parts(face: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """An aligned face, (112, 112, 3) uint8, with one part after the other in the face's mean colour."""
    mean = face[_FACE].mean(axis=(0, 1))
    for name, part in (PARTS | HALVES).items():
        without = face.copy()
        without[part] = mean
        yield name, without


def covered_part(cosines: Mapping[str, float]) -> str | None:
    """The part that shows nothing of the person, by the cosines between the face and itself without each part."""
    for name, limit in _NOTHING_THERE.items():
        if cosines[name] >= limit:
            return name
    one, other = HALVES
    for half, rest in ((one, other), (other, one)):
        if cosines[half] >= _HALF_IS_NOTHING and cosines[rest] <= _HALF_IS_ALL:
            return half
    return None
