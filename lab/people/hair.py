"""The hair of the head: layers above the scalp for the top, and a curtain that hangs from it for longer styles."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from . import canvas
from .curtain import Attachment, hang_curtain
from .streams import stream
from .traits import PersonTraits

HAIR_COLOURS = {
    "black": (0.095, 0.085, 0.08),
    "dark brown": (0.16, 0.11, 0.085),
    "brown": (0.26, 0.175, 0.12),
    "light brown": (0.40, 0.285, 0.185),
    "blond": (0.68, 0.54, 0.35),
    "red": (0.45, 0.20, 0.10),
    "grey": (0.52, 0.51, 0.50),
    "white": (0.70, 0.69, 0.67),
}
VOLUMES = {"short": 0.17, "cropped": 0.045, "medium": 0.18, "long": 0.15, "curly": 0.42, "bald": 0.0}
"""Decimetres above the scalp at the top of the head."""
LAYERS = (0.04, 0.14, 0.28, 0.44, 0.6, 0.76, 0.9)
"""Of the greatest height."""
HANGING = {"medium": (6.15, 6.6), "long": (5.2, 5.75)}
"""Styles whose hair hangs, and the range of heights, decimetres, that it ends at."""

_HAIRLINE_ANGLES = (0, 0.35, 0.6, 0.85, 1.1, 1.3, 1.5, 1.9, 2.4, 3.2)
_SIDEBURN_Y = 7.05
FOREHEAD_Y, FOREHEAD_SPREAD = 7.98, 0.08
FRINGE_Y = 7.66


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadHair:
    """The hair of a head: its mean colour, and maps over the canvas.

    map: the colour of the strands at each place.
    height: decimetres above the scalp, zero where there is none.
    cover: how much of the colour of the scalp the roots hide, from none to all of it.
    curtain: the hanging hair, or None.
    """

    # colour: (3,) sRGB. map: (ROWS, COLUMNS, 3), height and cover: (ROWS, COLUMNS), float32; cover 0..1.

    colour: np.ndarray
    map: np.ndarray
    height: np.ndarray
    cover: np.ndarray
    curtain: Attachment | None


def grow_hair(traits: PersonTraits, rest: np.ndarray) -> HeadHair:
    """rest: (P, 3), the person's drawn positions without expression."""
    generator = stream("hair", traits.seed)
    colour = np.array(HAIR_COLOURS[traits.hair_colour]) * generator.uniform(0.88, 1.15)
    strands = _strands(generator, traits.hair)
    edge = canvas.Y - _hairline(generator, traits) + 0.015 * canvas.noise(generator, (192, 384), 0.9)
    if traits.hair == "bald":
        cover, height = canvas.smoothstep(edge, 0, 0.3) * generator.uniform(0, 0.15), canvas.blank()
    else:
        cover = canvas.smoothstep(edge, -0.02, 0.08) * 0.92
        height = _height(generator, traits, edge, strands)
    shade = 0.72 + 0.56 * strands
    curtain = None
    if traits.hair in HANGING:
        curtain = hang_curtain(generator, rest, HANGING[traits.hair], VOLUMES[traits.hair])
    return HeadHair(
        colour=colour,
        map=np.clip(shade[..., None] * colour, 0, 1).astype(np.float32),
        height=height.astype(np.float32),
        cover=cover.astype(np.float32),
        curtain=curtain,
    )


def _strands(generator: np.random.Generator, hair: str) -> np.ndarray:
    """How light the strands are at each place, from 0 to 1: they run down, and aside in front; curls are grains."""
    # (ROWS, COLUMNS)
    if hair == "curly":
        return np.clip(0.5 + 0.25 * canvas.noise(generator, (96, 192), 0.8), 0, 1)
    lengthwise = generator.random((10, canvas.COLUMNS // 2), np.float32)
    strands = cv2.resize(lengthwise, (canvas.COLUMNS, canvas.ROWS), interpolation=cv2.INTER_CUBIC)
    shear = generator.uniform(-2, 2)
    rows, columns = np.mgrid[0 : canvas.ROWS, 0 : canvas.COLUMNS].astype(np.float32)
    columns = (columns + shear * (rows - 100) * np.clip(canvas.Y - 7.6, 0, 1)) % (canvas.COLUMNS - 1)
    strands = cv2.remap(strands, columns.astype(np.float32), rows, cv2.INTER_LINEAR)
    return np.clip(strands * 0.75 + 0.125 + 0.06 * canvas.noise(generator, (12, 24), 0.7), 0, 1)


def _hairline(generator: np.random.Generator, traits: PersonTraits) -> np.ndarray:
    """(ROWS, COLUMNS) decimetres: the height at which the hair begins, for each angle."""
    man = traits.sex == "man"
    years = max(0, traits.age - 35) / 40
    receding = max(0.0, generator.standard_normal() * 0.07 + 0.22 * years) if man else 0.0
    forehead = FOREHEAD_Y + generator.uniform(-FOREHEAD_SPREAD, FOREHEAD_SPREAD)
    peak = generator.uniform(0, 0.04)
    front = (forehead + receding * 0.3 - peak, forehead + receding * 0.6, forehead - 0.04 + receding)
    if traits.fringe:
        front = (FRINGE_Y, FRINGE_Y - 0.01, FRINGE_Y - 0.04)
    back = (7.72 + receding * 0.6, 7.42 + receding * 0.2, 7.22, _SIDEBURN_Y, 6.75, 6.45, 6.35)
    return np.interp(np.abs(canvas.ANGLE), _HAIRLINE_ANGLES, (*front, *back)).astype(np.float32)


def _height(generator: np.random.Generator, traits: PersonTraits, edge: np.ndarray, strands: np.ndarray) -> np.ndarray:
    volume = VOLUMES[traits.hair] * generator.uniform(0.75, 1.3)
    if traits.hair in ("short", "cropped"):
        by_height = np.interp(canvas.Y, (6.4, 7.2, 7.7, 8.3), (0.25, 0.35, 0.75, 1.0))
    else:
        by_height = np.interp(canvas.Y, (6.4, 7.2, 8.4), (0.75, 0.9, 1.0))
    lumps = np.clip(0.5 + 0.25 * canvas.noise(generator, (16, 32, 64), 0.6), 0, 1)
    rise = np.clip(edge / 0.22, 0.2, 1) if not traits.fringe else np.clip(edge / 0.1, 0.3, 1)
    relief = 0.62 + 0.2 * strands + 0.18 * lumps if traits.hair != "curly" else 0.45 + 0.3 * strands + 0.25 * lumps
    return np.where(edge > 0, volume * by_height * rise * relief, 0)
