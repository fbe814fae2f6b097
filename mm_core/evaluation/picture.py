"""Likeness over time as a picture: a curve for each clip, the threshold, the worst frame of each."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .best_of import BestOf
from .plot import HIGHEST, LOWEST

WIDTH, HEIGHT = 768, 320  # pixels of the curves
LEFT, RIGHT, TOP, BOTTOM = 48, 16, 16, 28  # margins
THUMBNAIL, COLUMNS = 120, 6  # pixels, and how many side by side
COLOURS = ("#1565c0", "#2e7d32", "#6a1b9a", "#ef6c00", "#00838f", "#ad1457", "#4e342e", "#546e7a")
GREY, THRESHOLD, MISSING = "#dddddd", "#cc8800", "#b00020"


def draw(result: BestOf, clips: Sequence[np.ndarray]) -> np.ndarray:
    """(H, W, 3) uint8. clips: the N clips that were compared, (F, H, W, 3) uint8 RGB each.

    Frames without a face are gaps, with a red mark below; the best clip is drawn thicker.
    """
    rows = -(-len(clips) // COLUMNS)
    picture = Image.new("RGB", (WIDTH, HEIGHT + rows * (THUMBNAIL + 24)), "white")
    pen = ImageDraw.Draw(picture)
    _draw_grid(pen, result)
    for number, similarity in enumerate(result.similarity):
        _draw_curve(pen, similarity, COLOURS[number % len(COLOURS)], 4 if number == result.best else 2)
    for number, clip in enumerate(clips):
        corner = (LEFT + number % COLUMNS * THUMBNAIL, HEIGHT + number // COLUMNS * (THUMBNAIL + 24))
        index = _worst(result.similarity[number])
        thumbnail = Image.fromarray(clip[index])
        thumbnail.thumbnail((THUMBNAIL - 8, THUMBNAIL - 8))
        picture.paste(thumbnail, corner)
        star = " *" if number == result.best else ""
        text, colour = f"{number}{star}: {result.scores[number]:.2f}, frame {index}", COLOURS[number % len(COLOURS)]
        pen.text((corner[0], corner[1] + THUMBNAIL - 6), text, colour, ImageFont.load_default(12))
    return np.asarray(picture)


def _worst(similarity: np.ndarray) -> int:
    """The frame that is least alike; the first without a face if there is no other."""
    return 0 if np.isnan(similarity).all() else int(np.nanargmin(similarity))


def _draw_grid(pen: ImageDraw.ImageDraw, result: BestOf) -> None:
    font = ImageFont.load_default(12)
    for value in np.arange(LOWEST, HIGHEST + 0.01, 0.2):
        y = _y(value)
        pen.line((LEFT, y, WIDTH - RIGHT, y), GREY)
        pen.text((LEFT - 8, y), f"{value + 0:.1f}", "#555555", font, anchor="rm")
    frames = result.similarity.shape[1]
    for index in sorted({0, (frames - 1) // 2, frames - 1}):
        pen.text((_x(index, frames), HEIGHT - 8), str(index), "#555555", font, anchor="ms")
    y = _y(result.threshold)
    pen.line((LEFT, y, WIDTH - RIGHT, y), THRESHOLD, 2)


def _draw_curve(pen: ImageDraw.ImageDraw, similarity: np.ndarray, colour: str, width: int) -> None:
    points = [(_x(index, len(similarity)), _y(value)) for index, value in enumerate(similarity)]
    for before, now in pairwise(points):
        if not np.isnan([before[1], now[1]]).any():
            pen.line((*before, *now), colour, width)
    for value, (x, y) in zip(similarity, points):
        if np.isnan(value):
            pen.line((x, HEIGHT - BOTTOM - 8, x, HEIGHT - BOTTOM), MISSING, 2)
        else:
            pen.ellipse((x - width, y - width, x + width, y + width), colour)


def _x(index: int, frames: int) -> float:
    return LEFT + 8 + (WIDTH - LEFT - RIGHT - 16) * index / max(1, frames - 1)


def _y(value: float) -> float:
    part = (HIGHEST - np.clip(value, LOWEST, HIGHEST)) / (HIGHEST - LOWEST)
    return float(TOP + (HEIGHT - TOP - BOTTOM) * part)
