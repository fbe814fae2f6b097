"""Glasses: thin tubes for rims, bridge and temples, without lenses."""

from __future__ import annotations

import numpy as np

from .attachment import Attachment, joined, sheet
from .geometry import EYE_X, EYE_Y, Material, load_head
from .streams import stream
from .traits import PersonTraits

FRAME_COLOURS = ((0.05, 0.05, 0.06), (0.05, 0.05, 0.06), (0.22, 0.12, 0.07), (0.45, 0.42, 0.4), (0.35, 0.08, 0.09))
CURVE = 0.25  # how fast the rims recede to the sides, 1/decimetre
RIM_POINTS, TUBE_SIDES = 28, 6
EAR_X, EAR_Y, EAR_Z = 0.78, 7.34, 0.35
IN_FRONT = 0.05  # decimetres between the rims and what they rest on


def make_glasses(traits: PersonTraits, rest: np.ndarray) -> tuple[Attachment, np.ndarray]:
    """Glasses that fit a head, and their colour, (3,) sRGB.

    rest: (P, 3), the person's drawn positions without expression.
    """
    generator = stream("glasses", traits.seed)
    colour = np.array(FRAME_COLOURS[generator.integers(len(FRAME_COLOURS))])
    width, height = generator.uniform(0.2, 0.235), generator.uniform(0.13, 0.19)
    squareness = generator.uniform(2, 5)  # exponent of a superellipse: 2 is round
    thickness = generator.uniform(0.012, 0.024)
    head = load_head()
    skin = head.vertex_materials == Material.SKIN
    around_eyes = skin & (np.abs(rest[:, 1] - EYE_Y) < height) & (np.abs(rest[:, 0]) > EYE_X - width - 0.02)
    around_eyes &= np.abs(rest[:, 0]) < EYE_X + width
    front = float((rest[around_eyes, 2] + CURVE * rest[around_eyes, 0] ** 2).max()) + IN_FRONT
    temples = skin & (np.abs(rest[:, 1] - EAR_Y) < 0.1) & (np.abs(rest[:, 2] - 0.8) < 0.15)
    half_head = float(np.abs(rest[temples, 0]).max()) + 0.02
    angle = np.linspace(0, 2 * np.pi, RIM_POINTS, endpoint=False)
    across = width * np.sign(np.cos(angle)) * np.abs(np.cos(angle)) ** (2 / squareness)
    down = height * np.sign(np.sin(angle)) * np.abs(np.sin(angle)) ** (2 / squareness)
    tubes = []
    for side in (-1, 1):
        x = side * (EYE_X + 0.01) + across
        # Rims follow the curve of the face.
        rim = np.stack([x, EYE_Y - 0.03 + down, front - CURVE * x**2], axis=1)
        outer = side * (EYE_X + 0.01 + width)
        hinge = [outer, EYE_Y + 0.04, front - CURVE * outer**2]
        temple = [hinge, [side * half_head, EYE_Y + 0.05, 0.9], [side * max(half_head, EAR_X), EAR_Y, EAR_Z]]
        tubes += [tube(rim, thickness, closed=True), tube(np.array(temple), thickness, closed=False)]
    inner = EYE_X + 0.01 - width
    bridge = [[x, EYE_Y + 0.02 + 0.03 * (1 - (x / inner) ** 2), front] for x in np.linspace(-inner, inner, 7)]
    tubes.append(tube(np.array(bridge), thickness, closed=False))
    return joined(tubes), colour


def tube(path: np.ndarray, radius: float, closed: bool) -> Attachment:
    """A tube along (K, 3) places."""
    ahead = np.roll(path, -1, 0) - np.roll(path, 1, 0)
    if not closed:
        ahead[0], ahead[-1] = path[1] - path[0], path[-1] - path[-2]
    ahead /= np.linalg.norm(ahead, axis=1, keepdims=True)
    # Any direction across will do that is nowhere along the path: glasses run sideways, down or back.
    sideways = np.cross(ahead, np.array([0.31, 0.27, 0.91]))
    sideways /= np.linalg.norm(sideways, axis=1, keepdims=True)
    upward = np.cross(sideways, ahead)
    turn = np.linspace(0, 2 * np.pi, TUBE_SIDES, endpoint=False)[None, :, None]
    positions = path[:, None] + radius * (np.cos(turn) * sideways[:, None] + np.sin(turn) * upward[:, None])
    return sheet(positions, tube=True, ring=closed)
