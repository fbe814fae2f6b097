"""The colour of a person's skin, lips and eyes. Colours are sRGB, 0..1."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from . import canvas
from .streams import stream
from .traits import PersonTraits

SKIN_COLOURS = np.array(
    [
        [0.87, 0.70, 0.62],
        [0.82, 0.63, 0.53],
        [0.74, 0.55, 0.44],
        [0.63, 0.45, 0.34],
        [0.51, 0.35, 0.26],
        [0.39, 0.26, 0.19],
        [0.29, 0.19, 0.145],
    ]
)
"""From the lightest to the darkest."""

EYE_COLOURS = {
    "dark brown": (0.13, 0.08, 0.055),
    "brown": (0.24, 0.14, 0.08),
    "hazel": (0.36, 0.26, 0.13),
    "green": (0.31, 0.37, 0.23),
    "blue": (0.32, 0.44, 0.57),
    "grey": (0.43, 0.47, 0.5),
}
LIP_TINT = np.array([0.93, 0.66, 0.66])  # of the skin's colour
LIPSTICKS = ((0.62, 0.12, 0.15), (0.66, 0.26, 0.3), (0.45, 0.1, 0.17), (0.72, 0.4, 0.38))
LIPSTICK_RATE = 0.4  # of the women
FRECKLES_RATE, FRECKLES_UP_TO = 0.2, 0.4  # on skins no darker than the second
WRINKLE_SCALE = 2  # lines are drawn on a canvas that many times larger


@dataclass(frozen=True, kw_only=True, eq=False)
class Complexion:
    """The mean colour of the skin, the colours all over it, and those of lips and iris.

    iris_size: as a part of the radius of the eyeball. pupil_size: as a part of the iris. gloss: strength of highlights.
    """

    # base, lips, iris: (3,). skin: (ROWS, COLUMNS, 3) float32, on the canvas. gloss: 0..1.

    base: np.ndarray
    skin: np.ndarray
    lips: np.ndarray
    iris: np.ndarray
    iris_size: float
    pupil_size: float
    gloss: float


def paint_complexion(traits: PersonTraits) -> Complexion:
    """Skin without brows and beard."""
    generator = stream("skin", traits.seed)
    base = _skin_colour(traits.skin) * (1 + generator.standard_normal(3) * [0.03, 0.025, 0.04])
    base = np.clip(base, 0.08, 0.92)
    lines = (traits.age - 20) / 60
    skin = np.ones((canvas.ROWS, canvas.COLUMNS, 3), np.float32) * base.astype(np.float32)
    mottling = 0.02 * canvas.noise(generator, (6, 12, 24), 0.6)
    grain = (0.015 + 0.02 * lines) * canvas.noise(generator, (64, 128, 256), 0.9)
    skin *= 1 + (mottling + grain)[..., None]
    skin = _blush(skin, generator, traits.skin)
    skin = _shade_eye_sockets(skin, generator, traits, lines)
    wrinkles = _wrinkles(generator, lines)
    skin *= 1 - 0.34 * wrinkles[..., None] * np.float32([0.85, 1, 1])
    skin = _spots(skin, generator, traits.skin)
    lips = base * (LIP_TINT + 0.08 * generator.standard_normal(3) * [0.5, 1, 1])
    lipstick = np.array(LIPSTICKS[generator.integers(len(LIPSTICKS))])
    if traits.sex == "woman" and generator.random() < LIPSTICK_RATE:
        lips = lips + generator.uniform(0.4, 0.8) * (lipstick - lips)
    return Complexion(
        base=base,
        skin=np.clip(skin, 0.02, 0.97).astype(np.float32),
        lips=np.clip(lips, 0.05, 0.9),
        iris=np.array(EYE_COLOURS[traits.eyes]) * generator.uniform(0.85, 1.2),
        iris_size=generator.uniform(0.45, 0.51),
        pupil_size=generator.uniform(0.34, 0.46),
        gloss=generator.uniform(0.15, 0.45),
    )


def _skin_colour(darkness: float) -> np.ndarray:
    place = darkness * (len(SKIN_COLOURS) - 1)
    steps = np.arange(len(SKIN_COLOURS))
    return np.array([np.interp(place, steps, SKIN_COLOURS[:, channel]) for channel in range(3)])


def _blush(skin: np.ndarray, generator: np.random.Generator, darkness: float) -> np.ndarray:
    """Redder cheeks, nose, ears' height and chin."""
    cheeks, nose, chin = generator.uniform(0.3, 1.3), generator.uniform(0.3, 1.1), generator.uniform(0, 0.6)
    red = cheeks * canvas.both_sides(0.45, 6.95, 0.17, 0.14)
    red += nose * canvas.blob(0, 6.92, 0.1, 0.09) + chin * canvas.blob(0, 6.35, 0.15, 0.1)
    return skin * (1 + red[..., None] * np.float32([0.04, -0.06, -0.06]) * np.float32(1 - 0.6 * darkness))


def _shade_eye_sockets(
    skin: np.ndarray, generator: np.random.Generator, traits: PersonTraits, lines: float
) -> np.ndarray:
    """Shadows under the eyes, and eye make-up on some lids."""
    under = generator.uniform(0, 0.9) * (0.6 + lines)
    make_up = generator.uniform(0, 1.6) if traits.sex == "woman" else 0.0
    skin = skin * (1 - 0.1 * under * canvas.both_sides(0.3, 7.12, 0.12, 0.05)[..., None] * np.float32([0.8, 1, 0.9]))
    return skin * (1 - 0.13 * make_up * canvas.both_sides(0.31, 7.36, 0.13, 0.05)[..., None] * np.float32([0.8, 1, 1]))


def _wrinkles(generator: np.random.Generator, lines: float) -> np.ndarray:
    """(ROWS, COLUMNS), from 0 to 1: folds beside the mouth, under the eyes and on the forehead, deeper with age."""
    drawn = np.zeros((canvas.ROWS * WRINKLE_SCALE, canvas.COLUMNS * WRINKLE_SCALE), np.float32)
    depth = float(np.clip(0.02 + 0.75 * lines + 0.08 * generator.standard_normal(), 0.0, 0.9))
    fold, bags, forehead = generator.uniform(0.5, 1), generator.uniform(0.2, 0.8), generator.uniform(0.2, 0.7)
    offsets = generator.uniform(-0.03, 0.03, (3, 2))
    for side in (-1, 1):
        _line(drawn, [(side * 0.2, 6.96), (side * 0.3, 6.83), (side * 0.37, 6.68), (side * 0.37, 6.56)], depth * fold)
        _line(drawn, [(side * 0.14, 7.19), (side * 0.25, 7.1), (side * 0.37, 7.11)], depth * bags)
        for height in (7.3, 7.24, 7.18):
            _line(drawn, [(side * 0.52, 7.25), (side * 0.64, height + 0.02)], depth * bags * (lines > 0.45))
    for row, (low, high) in enumerate(offsets):
        y = 7.74 + 0.1 * row
        _line(drawn, [(-0.42, y + low), (-0.2, y + 0.02), (0, y), (0.2, y + 0.02), (0.42, y + high)], depth * forehead)
    drawn = cv2.GaussianBlur(drawn, (0, 0), 2.0)
    return np.clip(cv2.resize(drawn, (canvas.COLUMNS, canvas.ROWS), interpolation=cv2.INTER_AREA), 0, 1)


def _line(drawn: np.ndarray, places: list[tuple[float, float]], strength: float) -> None:
    points = np.array(places)
    steps = np.linspace(0, len(points) - 1, 24)
    xs, ys = (np.interp(steps, np.arange(len(points)), points[:, axis]) for axis in (0, 1))
    path = canvas.fixed_point(xs, ys) * WRINKLE_SCALE
    mark = np.zeros_like(drawn)
    cv2.polylines(mark, [path], False, strength, 3, cv2.LINE_AA, canvas.FRACTION_BITS)
    np.maximum(drawn, mark, out=drawn)


def _spots(skin: np.ndarray, generator: np.random.Generator, darkness: float) -> np.ndarray:
    """Freckles on some light skins, and a few moles."""
    freckled = generator.random() < FRECKLES_RATE and darkness < FRECKLES_UP_TO
    freckles = canvas.blank()
    for _ in range(int(generator.integers(80, 260)) if freckled else 0):
        place = (np.clip(generator.standard_normal() * 0.33, -0.9, 0.9), 6.98 + generator.standard_normal() * 0.18)
        _dot(freckles, place, generator.uniform(0.004, 0.011), generator.uniform(0.15, 0.5))
    moles = canvas.blank()
    for _ in range(int(generator.poisson(1.0))):
        place = (generator.uniform(-0.6, 0.6), generator.uniform(6.4, 7.95))
        _dot(moles, place, generator.uniform(0.01, 0.02), generator.uniform(0.4, 0.9))
    skin = skin * (1 - freckles[..., None] * np.float32([0.3, 0.45, 0.5]))
    return skin * (1 - 0.6 * moles[..., None])


def _dot(drawn: np.ndarray, place: tuple[float, float], radius: float, strength: float) -> None:
    """radius: decimetres."""
    centre = canvas.fixed_point(np.array(place[0]), np.array(place[1]))
    size = max(1, round(radius * canvas.ROWS_PER_DM * (1 << canvas.FRACTION_BITS)))
    cv2.circle(drawn, [int(value) for value in centre], size, strength, -1, cv2.LINE_AA, canvas.FRACTION_BITS)
