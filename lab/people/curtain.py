"""Hanging hair: a sheet round the sides and the back of the head."""

from __future__ import annotations

import math

import cv2
import numpy as np

from . import canvas
from .attachment import Attachment, sheet
from .geometry import Material, load_head

COLUMNS, ROWS, TOP = 72, 28, 8.05  # TOP in decimetres
WIDEST = 7.0  # decimetres: from here down the hair hangs
LENGTH_SPREAD, LOCKS = 0.1, 19  # decimetres between the lengths of so many locks
IN_FRONT_CLOSER, FRONT_PART = 0.1, 0.08

# The head's radius is tabulated from LOWEST up, by angle from the nose.
LOWEST, HEIGHT_STEP, HEIGHTS = 6.9, 0.1, 18
ANGLES = 25
ANGLE_STEP = math.pi / (ANGLES - 1)


def hang_curtain(
    generator: np.random.Generator, rest: np.ndarray, ends: tuple[float, float], volume: float
) -> Attachment:
    """A sheet that follows the head down to its widest, then hangs.

    rest: (P, 3), the person's drawn positions without expression. ends: range of heights that it ends at.
    volume: decimetres off the head.
    """
    end = generator.uniform(*ends)
    front = generator.uniform(0.66, 1.0)  # radians from the nose that the face is left open
    flare = generator.uniform(-0.12, 0.18)
    volume = volume * generator.uniform(0.65, 0.95)
    waves, phase = generator.uniform(0, 0.035), generator.uniform(0, 2 * math.pi)
    down, across = np.linspace(0, 1, ROWS), np.linspace(0, 1, COLUMNS)
    height = TOP + (end - TOP) * down
    open_angle = front + np.interp(height, (5.2, 6.4, 7.2, 7.8, 8.1), (-0.04, 0.03, 0.06, -0.05, -0.1))
    angle = open_angle[:, None] + across * (2 * math.pi - 2 * open_angle[:, None])  # (ROWS, COLUMNS)
    # At the top it lies below the layers that cover the scalp.
    above = volume * np.interp(height, (7.3, 8.05), (1, 0.15))[:, None]
    radius = np.maximum.accumulate(head_radius(rest, angle, height) + above, axis=0)
    # Hair in front lies closer, or it would stand off the cheeks and show the ears behind it.
    radius = radius * (1 - IN_FRONT_CLOSER * np.exp(-((across * (1 - across) / FRONT_PART) ** 2)))
    hang = np.clip((WIDEST - height) / 1.2, 0, 1.4)[:, None]
    radius = radius * (1 + flare * hang**1.5 * np.abs(np.cos(angle / 2)))
    radius = radius + waves * np.sin(14 * down[:, None] + phase + 3 * angle)
    locks = np.interp(across, np.linspace(0, 1, LOCKS), generator.standard_normal(LOCKS))
    y = height[:, None] + LENGTH_SPREAD * locks * down[:, None] ** 3
    return sheet(np.stack([radius * np.sin(angle), y, canvas.AXIS_Z + radius * np.cos(angle)], axis=-1))


def head_radius(rest: np.ndarray, angle: np.ndarray, height: np.ndarray) -> np.ndarray:
    """(rows, columns): the head's distance, ears included, from the canvas' axis.

    rest: (P, 3) positions; angle: (rows, columns) radians, 0..2 pi; height: (rows,) decimetres.
    """
    skin = load_head().vertex_materials == Material.SKIN
    x, y, z = rest[skin & (rest[:, 1] > LOWEST)].T
    rows = np.clip(np.round((y - LOWEST) / HEIGHT_STEP).astype(int), 0, HEIGHTS - 1)
    columns = np.round(np.arctan2(np.abs(x), z - canvas.AXIS_Z) / ANGLE_STEP).astype(int)
    table = np.zeros((HEIGHTS, ANGLES), np.float32)
    np.maximum.at(table, (rows, columns), np.hypot(x, z - canvas.AXIS_Z).astype(np.float32))
    table = cv2.GaussianBlur(cv2.dilate(table, np.ones((3, 3), np.uint8)), (0, 0), 1.0)
    column = np.where(angle > math.pi, 2 * math.pi - angle, angle) / ANGLE_STEP
    row = np.broadcast_to(np.clip((height[:, None] - LOWEST) / HEIGHT_STEP, 0, HEIGHTS - 1), angle.shape)
    return cv2.remap(table, column.astype(np.float32), row.astype(np.float32), cv2.INTER_LINEAR)
