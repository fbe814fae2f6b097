"""The faces that were found in a photo, drawn into a small copy of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .analysis import Face

MAX_SIDE = 768  # pixels
TAKEN, OTHER, NUMBER = "#00c853", "#ffffff", "#000000"
LABEL = 24  # pixels, the square behind a number
_OUTLINE, _TAKEN_OUTLINE = 2, 5  # pixels


def draw_faces(image: np.ndarray, faces: Sequence[Face], taken: Face | None) -> np.ndarray:
    """The picture, (H, W, 3) uint8 RGB, with its faces framed; its larger side at most MAX_SIDE.

    faces: as the analyzer gives them; each gets a frame and its number, counted from zero at the left.
    taken: the one among them whose frame is green and thick; None if none was taken.
    """
    picture = Image.fromarray(image)
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    scale = np.tile(np.array(picture.size) / (image.shape[1], image.shape[0]), 2)
    limit = np.tile(np.array(picture.size) - 1, 2)
    pen = ImageDraw.Draw(picture)
    boxes = [(face.box * scale).clip(0, limit).tolist() for face in faces]  # a box may reach outside the photo
    # The taken one last, above its neighbours.
    for number in sorted(range(len(faces)), key=lambda number: faces[number] is taken):
        colour, width = (TAKEN, _TAKEN_OUTLINE) if faces[number] is taken else (OTHER, _OUTLINE)
        pen.rectangle(boxes[number], outline=NUMBER, width=width + 2)  # seen on a background of the same colour
        pen.rectangle(boxes[number], outline=colour, width=width)
    for number, (left, top, _, _) in enumerate(boxes):
        left, top = (max(0.0, min(at, end - LABEL)) for at, end in zip((left, top), picture.size, strict=True))
        pen.rectangle((left, top, left + LABEL - 1, top + LABEL - 1), TAKEN if faces[number] is taken else OTHER)
        centre = (left + LABEL / 2, top + LABEL / 2)
        pen.text(centre, str(number), NUMBER, ImageFont.load_default(18), anchor="mm")
    return np.array(picture)
