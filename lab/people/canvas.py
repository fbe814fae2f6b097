"""The sheet that skin and hair are painted on: the head at rest, unrolled from a vertical cylinder.

Columns are angles about the cylinder's axis (the middle column is the face's, the first and last meet at the back),
rows are heights. Positions are decimetres of the head at rest, so what is painted follows every change of shape.
"""

from __future__ import annotations

import math

import cv2
import numpy as np

ROWS, COLUMNS = 384, 768
AXIS_Z = 0.35
BOTTOM, TOP = 5.6, 8.7
FACE_Z = 1.35
ROWS_PER_DM = ROWS / (TOP - BOTTOM)
COLUMNS_PER_RADIAN = COLUMNS / (2 * math.pi)
COLUMNS_PER_DM = COLUMNS_PER_RADIAN / (FACE_Z - AXIS_Z)  # on the face
FRACTION_BITS = 4
"""Of the coordinates handed to OpenCV's drawing functions."""

_rows, _columns = np.mgrid[0:ROWS, 0:COLUMNS].astype(np.float32)
ANGLE = ((_columns + 0.5) / COLUMNS - 0.5) * np.float32(2 * math.pi)
"""(ROWS, COLUMNS) float32 radians, positive to the right of the viewer, who sees the face at zero."""
Y = TOP - (_rows + 0.5) / np.float32(ROWS_PER_DM)
"""(ROWS, COLUMNS) float32, height."""
X = np.sin(np.clip(ANGLE, -math.pi / 2, math.pi / 2))
"""(ROWS, COLUMNS) float32, the place across the face: minus one at and behind an ear, one at the other."""


def column_of(x: np.ndarray | float, z: np.ndarray | float = FACE_Z) -> np.ndarray:
    """Column, with fraction, of a place."""
    return (np.arctan2(x, np.asarray(z) - AXIS_Z) / (2 * math.pi) + 0.5) * COLUMNS


def row_of(y: np.ndarray | float) -> np.ndarray:
    """Row, with fraction, of a height."""
    return (TOP - np.asarray(y)) * ROWS_PER_DM


def fixed_point(x: np.ndarray | float, y: np.ndarray | float) -> np.ndarray:
    """Places on the face, (..., 2) int32, as the drawing functions want them: with bits for fractions."""
    return np.round(np.stack([column_of(x), row_of(y)], axis=-1) * (1 << FRACTION_BITS)).astype(np.int32)


def blank() -> np.ndarray:
    """(ROWS, COLUMNS) float32 of zeros."""
    return np.zeros((ROWS, COLUMNS), np.float32)


def blob(x: float, y: float, width: float, height: float) -> np.ndarray:
    """A Gaussian on the face with these standard deviations in decimetres, 1 at its middle."""
    across = (_columns - column_of(x)) / (width * COLUMNS_PER_DM)
    down = (_rows - row_of(y)) / (height * ROWS_PER_DM)
    return np.exp(-0.5 * (across**2 + down**2)).astype(np.float32)


def both_sides(x: float, y: float, width: float, height: float) -> np.ndarray:
    """A blob and its mirror image."""
    return blob(x, y, width, height) + blob(-x, y, width, height)


def noise(generator: np.random.Generator, cells: tuple[int, ...], decay: float) -> np.ndarray:
    """Smooth noise of standard deviation 1: a sum of grids that many cells wide, each `decay` times the one before."""
    total, amplitude = blank(), 1.0
    for count in cells:
        grid = generator.standard_normal((max(2, count * ROWS // COLUMNS + 1), count + 1), np.float32)
        total += amplitude * cv2.resize(grid, (COLUMNS, ROWS), interpolation=cv2.INTER_CUBIC)
        amplitude *= decay
    return total / total.std()


def smoothstep(value: np.ndarray, low: float, high: float) -> np.ndarray:
    """0 up to low, 1 from high, smooth in between."""
    part = np.clip((value - low) / (high - low), 0, 1)
    return part * part * (3 - 2 * part)


def over(picture: np.ndarray, colour: np.ndarray, opacity: np.ndarray) -> np.ndarray:
    """Lay a colour, of one or of each place, over a picture; the opacity of each place is from 0 to 1."""
    # colour: (3,) or (ROWS, COLUMNS, 3). opacity: (ROWS, COLUMNS).
    return picture + opacity[..., None] * (np.asarray(colour, np.float32) - picture)
