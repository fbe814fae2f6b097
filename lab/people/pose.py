"""From the head at rest to the picture: eyes, neck, camera."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit

from .geometry import HeadGeometry, Material

NECK_BELOW_EYES, NECK_BEHIND_EYES = 1.1, 1.05  # decimetres: what the head turns about
NECK_FROM, NECK_TO = -0.55, 0.25  # about that point the neck's skin passes from the body's to the head's motion
VIEW_WIDTH = 2.4  # decimetres across the picture at zoom 1
FOLLOW = 0.55  # how far the camera follows the eyes
CAMERA_RAISED = 0.0  # decimetres above that
PERSPECTIVE = 0.06  # a decimetre nearer is that much larger
EYES_HOLD = 0.3  # of the head's turn that the eyes undo, looking at the camera


@dataclass(frozen=True, kw_only=True)
class Pose:
    """Degrees; positive: the face turned to the picture's right, up, tilted clockwise in the picture."""

    yaw: float
    pitch: float
    roll: float


@dataclass(frozen=True, kw_only=True, eq=False)
class View:
    """centred: (N, 3) float32 decimetres about the middle of the picture. screen: (N, 3) float32, x and y in pixels."""

    centred: np.ndarray
    screen: np.ndarray


def rotation(pose: Pose) -> np.ndarray:
    """(3, 3) float32, to be multiplied with columns: x to the right, y up, and z towards the viewer."""
    yaw, pitch, roll = np.radians([pose.yaw, -pose.pitch, -pose.roll])
    cy, sy, cp, sp, cr, sr = np.cos(yaw), np.sin(yaw), np.cos(pitch), np.sin(pitch), np.cos(roll), np.sin(roll)
    turn = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    nod = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    tilt = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    return (tilt @ nod @ turn).astype(np.float32)


def turn_eyes(positions: np.ndarray, head: HeadGeometry, pose: Pose) -> np.ndarray:
    """(P, 3) with both eyeballs turned back towards the camera, each about its own middle."""
    turned = positions.copy()
    back = rotation(Pose(yaw=-EYES_HOLD * pose.yaw, pitch=-EYES_HOLD * pose.pitch, roll=0.0))
    for side in (-1, 1):
        eye = (head.vertex_materials == Material.EYE) & (head.rest[:, 0] * side > 0)
        middle = positions[eye].mean(0)
        turned[eye] = np.einsum("ij,nj->ni", back, positions[eye] - middle) + middle
    return turned


def view(points: np.ndarray, eyes: np.ndarray, pose: Pose, zoom: float, size: int) -> View:
    """points: (N, 3) of the whole mesh; eyes: (3,), the middle between the eyes; size: pixels."""
    pivot = np.array([0, eyes[1] - NECK_BELOW_EYES, eyes[2] - NECK_BEHIND_EYES], np.float32)
    matrix = rotation(pose)
    middle = (matrix @ (eyes - pivot) * FOLLOW + pivot).astype(np.float32)
    middle[1] += CAMERA_RAISED
    centred, screen = np.empty_like(points), np.empty_like(points)
    _view(points, matrix, pivot, middle, np.float32(size / VIEW_WIDTH * zoom), np.float32(size / 2), centred, screen)
    return View(centred=centred, screen=screen)


@njit(cache=True)
def _view(points, matrix, pivot, middle, scale, half, centred, screen):  # pragma: no cover
    # Written out instead of handed to a BLAS, whose last bit may depend on its number of threads.
    for index in range(points.shape[0]):
        x, y, z = points[index, 0] - pivot[0], points[index, 1] - pivot[1], points[index, 2] - pivot[2]
        part = min(max((y - NECK_FROM) / (NECK_TO - NECK_FROM), 0.0), 1.0)
        follows = part * part * (3 - 2 * part)
        for axis in range(3):
            own = points[index, axis]
            turned = matrix[axis, 0] * x + matrix[axis, 1] * y + matrix[axis, 2] * z + pivot[axis]
            centred[index, axis] = own + follows * (turned - own) - middle[axis]
        nearness = 1 / (1 - centred[index, 2] * PERSPECTIVE)
        screen[index, 0] = half + centred[index, 0] * nearness * scale
        screen[index, 1] = half - centred[index, 1] * nearness * scale
        screen[index, 2] = centred[index, 2]
