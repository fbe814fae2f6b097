"""Looking for a face until it is found well: whole or in tiles, upright or turned."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from .analysis import MIN_FACE, Face, FaceAnalyzer, merged, number_of_tiles, seen_at

TURNS = (0, 90, 180, 270)  # degrees, clockwise
# The detector's score times the length of the embedding, measured with buffalo_sc on 20 faces of 13 people and on them
# turned: upright 16.9 to 23.6, false finds in turned photos at most 11.4, blurred ones of cosine .5 and less to 16.
FOUND_WELL = 14.0
WEAK = 12.0
_MAX_ROLL = 50.0  # degrees: a face that lies is seen better in the photo turned, though its landmarks may be right
_LYING = 0.6  # and counts less until then: up to 18.9 without
_TURN = 1.2  # a turned photo must be found better by this factor than the photo as it is
# How many pixels of the picture are seen in tiles, one after the other while no face is found well: 6 tiles, then 24.
# Finer ones find faces that are too small to be recognised in photos of up to 24 megapixels.
_FINER = (1_300_000, 5_200_000)
_MOST_TILES = 32  # of a look, in each orientation: a long strip is shrunk until so many show it
_FINER_BY = 1.2  # a look that is finer by less than this factor is left out


@dataclass(frozen=True, kw_only=True, eq=False)
class Look:
    """A picture, (H, W, 3) uint8 RGB, turned clockwise by `turned` degrees, and its faces from left to right."""

    image: np.ndarray
    faces: tuple[Face, ...] = ()
    turned: int = 0

    @property
    def evidence(self) -> float:
        """Of the face that is seen best; 0 without faces."""
        return max(map(evidence, self.faces), default=0.0)


def evidence(face: Face) -> float:
    """How sure it is that this is a face, upright and seen well enough to be recognised; see FOUND_WELL."""
    return face.score * float(np.linalg.norm(face.embedding)) * (1.0 if abs(face.roll) <= _MAX_ROLL else _LYING)


def find_faces_anyhow(analyzer: FaceAnalyzer, image: np.ndarray) -> Look:
    """The faces of a photo, (H, W, 3) uint8 RGB, and the photo as they are upright in it.

    A photo in which a face is found well is looked at once. Others are looked at in all four orientations, then at
    finer scales in tiles; the best look counts, without what is no face by its measure.
    """
    image_seen_at, best = 0.0, Look(image=image)
    found: dict[int, tuple[Face, ...]] = dict.fromkeys(TURNS, ())
    for scale in _scales(image.shape):
        if scale is not None and scale < image_seen_at * _FINER_BY:
            continue
        image_seen_at = seen_at(image.shape) if scale is None else scale
        for turned in TURNS:
            view = np.rot90(image, -turned // 90)
            faces = analyzer.detect(view) if scale is None else analyzer.detect_in_tiles(view, scale)
            found[turned] = tuple(merged((*found[turned], *faces)))
            look = Look(image=view, faces=found[turned], turned=turned)
            if turned == 0 and scale is None and look.evidence >= FOUND_WELL:
                return look
            if look.evidence > best.evidence * (_TURN if turned and not best.turned else 1.0):
                best = look
            if turned == 0 and best.evidence >= FOUND_WELL:
                break
        if best.evidence >= FOUND_WELL:
            break
    if best.evidence >= FOUND_WELL:
        best = replace(best, faces=tuple(face for face in best.faces if evidence(face) >= WEAK))
    return replace(best, image=np.ascontiguousarray(best.image))


def smallest_face(shape: tuple[int, ...]) -> int:
    """How large, in pixels, a face in a photo of this (H, W, ...) must be to be found."""
    finest = max(seen_at(shape) if scale is None else scale for scale in _scales(shape))
    return math.ceil(MIN_FACE / min(1.0, finest))


def _scales(shape: tuple[int, ...]) -> list[float | None]:
    """By how much a photo is shrunk in each look; None for the look at the whole of it."""
    pixels = max(1, shape[0] * shape[1])
    finer = [min(1.0, math.sqrt(limit / pixels)) for limit in _FINER]
    return [None, *(scale * min(1.0, _MOST_TILES / number_of_tiles(shape, scale)) for scale in finer)]
