"""Frames and numbers of faces: exact pixels on plain pictures, no models."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from PIL import ImageColor

from mm_core.faces.analysis import Face
from mm_core.faces.drawing import LABEL, MAX_SIDE, OTHER, TAKEN, draw_faces

GREY = np.full((300, 500, 3), 120, np.uint8)


def face(*box: float) -> Face:
    return Face(
        box=np.float32(box), landmarks=np.zeros((5, 2), np.float32), score=0.8, embedding=np.zeros(0, np.float32),
        yaw=0.0, pitch=0.0, roll=0.0, size=100.0, sharpness=300.0,
    )  # fmt: skip


LEFT, RIGHT = face(50, 100, 150, 240), face(300, 80, 400, 200)


def colour_at(picture: np.ndarray, x: float, y: float) -> tuple[int, ...]:
    return tuple(picture[round(y), round(x)].tolist())


def label(picture: np.ndarray, box: np.ndarray) -> np.ndarray:
    """The square with the number of a face."""
    left, top = (round(float(value)) for value in box[:2])
    return picture[top : top + LABEL, left : left + LABEL]


def test_the_taken_face_stands_out() -> None:
    for taken, other in ((LEFT, RIGHT), (RIGHT, LEFT)):
        picture = draw_faces(GREY, [LEFT, RIGHT], taken)
        for drawn, colour in ((taken, TAKEN), (other, OTHER)):
            x0, y0, x1, y1 = drawn.box.tolist()
            for x, y in ((x0, (y0 + y1) / 2), (x1, (y0 + y1) / 2), ((x0 + x1) / 2, y0), ((x0 + x1) / 2, y1)):
                assert colour_at(picture, x, y) == ImageColor.getrgb(colour)
            assert colour_at(picture, (x0 + x1) / 2, (y0 + y1) / 2) == (120, 120, 120)  # the face itself is left alone
    nobody = draw_faces(GREY, [LEFT, RIGHT], None)
    assert not (nobody == ImageColor.getrgb(TAKEN)).all(axis=-1).any()


def test_faces_are_numbered_in_their_order_from_zero() -> None:
    both, alone = draw_faces(GREY, [LEFT, RIGHT], None), draw_faces(GREY, [RIGHT], None)
    other_zero = draw_faces(GREY, [LEFT], None)
    zero, one = label(both, LEFT.box), label(both, RIGHT.box)
    assert not np.array_equal(zero, one)
    assert np.array_equal(label(alone, RIGHT.box), zero) and np.array_equal(label(other_zero, LEFT.box), zero)


def test_a_large_photo_becomes_a_small_picture() -> None:
    large = GREY.repeat(8, axis=0).repeat(8, axis=1)  # 4000 x 2400
    drawn = replace(RIGHT, box=RIGHT.box * 8)
    picture = draw_faces(large, [drawn], drawn)
    assert picture.shape == (461, MAX_SIDE, 3) and picture.dtype == np.uint8
    x0, _, _, y1 = (drawn.box * MAX_SIDE / 4000).tolist()
    frame = (picture == ImageColor.getrgb(TAKEN)).all(axis=-1)
    rows, columns = np.nonzero(frame)
    assert abs(columns.min() - x0) <= 1.5 and abs(rows.max() - y1) <= 1.5
    assert (large == 120).all()  # the photo is not drawn into


def test_a_face_beyond_the_edge_keeps_its_number_in_the_picture() -> None:
    corner = face(-40, -60, 90, 80)
    picture = draw_faces(GREY, [corner], corner)
    assert np.array_equal(label(picture, np.zeros(4)), label(draw_faces(GREY, [LEFT], LEFT), LEFT.box))
    far = face(490, 290, 700, 600)
    label_at = np.float32([500 - LABEL, 300 - LABEL, 0, 0])
    assert np.array_equal(label(draw_faces(GREY, [far], far), label_at), label(picture, np.zeros(4)))


def test_without_faces_the_photo_is_shown_as_it_is() -> None:
    assert np.array_equal(draw_faces(GREY, [], None), GREY)
