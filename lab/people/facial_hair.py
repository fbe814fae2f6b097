"""Eyebrows and beards, painted on the skin's canvas; a full beard also stands off the skin a little."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from . import canvas
from .streams import stream
from .traits import PersonTraits

BROW_STROKES = 300
BROW_SCALE = 2
OPACITY = {"stubble": 0.42, "goatee": 0.8, "moustache": 0.85, "beard": 0.9}
BEARD_HEIGHTS = (0.015, 0.05)  # decimetres
_BEARD_ANGLES = (0, 0.25, 0.45, 0.7, 1.0, 1.3)
_BEARD_TOPS = (6.55, 6.62, 6.7, 6.78, 6.9, 7.12)
LIPS_Y, LIPS_HALF_WIDTH, LIPS_HALF_HEIGHT = 6.62, 0.22, 0.065
CHIN_BOTTOM = 6.13


@dataclass(frozen=True, kw_only=True)
class BrowShape:
    """Decimetres on the head at rest; `arch` and `tilt` are heights at the peak and at the outer end."""

    density: float
    thickness: float
    y: float
    inner: float
    outer: float
    arch: float
    tilt: float
    peak: float


def paint_brows(skin: np.ndarray, hair_colour: np.ndarray, traits: PersonTraits) -> np.ndarray:
    """The canvas with both brows: many short strokes."""
    generator = stream("brows", traits.seed)
    man = traits.sex == "man"
    shape = BrowShape(
        density=generator.uniform(0.45, 1.25) * (1.1 if man else 0.95),
        thickness=generator.uniform(0.03, 0.075) * (1.15 if man else 0.85),
        y=7.5 + generator.uniform(-0.02, 0.05),
        inner=generator.uniform(0.11, 0.18),
        outer=generator.uniform(0.5, 0.6),
        arch=generator.uniform(0.01, 0.07),
        tilt=generator.uniform(-0.06, 0.0),
        peak=generator.uniform(0.5, 0.75),
    )
    colour = np.clip(hair_colour * generator.uniform(0.6, 0.95), 0.03, 0.6)
    strokes = np.zeros((canvas.ROWS * BROW_SCALE, canvas.COLUMNS * BROW_SCALE), np.float32)
    for side in (-1, 1):
        for start, end, opacity in zip(*_brow_strokes(shape, generator, side)):
            cv2.line(strokes, start.tolist(), end.tolist(), opacity, 1, cv2.LINE_AA, canvas.FRACTION_BITS)
    strokes = cv2.resize(strokes, (canvas.COLUMNS, canvas.ROWS), interpolation=cv2.INTER_AREA)
    opacity = np.clip(strokes * 0.95 + 0.4 * cv2.GaussianBlur(strokes, (0, 0), 2.0), 0, 0.85)
    return canvas.over(skin, colour, opacity)


def _brow_strokes(
    shape: BrowShape, generator: np.random.Generator, side: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Starts and ends (N, 2) for OpenCV and opacities (N,) of one brow's strokes."""
    count = int(BROW_STROKES * shape.density)
    along = generator.random(count)  # 0 at the nose, 1 at the temple
    x = shape.inner + (shape.outer - shape.inner) * along
    taper = (1 - 0.7 * np.clip((along - shape.peak) / (1 - shape.peak), 0, 1)) * (0.7 + 0.3 * np.clip(along * 5, 0, 1))
    phase = np.where(along < shape.peak, along / shape.peak, 1 + (along - shape.peak) / (1 - shape.peak))
    y = shape.y + shape.tilt * along + shape.arch * np.sin(np.pi / 2 * phase)
    y = y + generator.uniform(-0.5, 0.5, count) * shape.thickness * taper
    angle = np.radians(70 - 70 * np.clip(along * 1.4, 0, 1) + 12 * generator.standard_normal(count))
    length = generator.uniform(0.03, 0.06, count)
    start = canvas.fixed_point(side * x, y) * BROW_SCALE
    end = canvas.fixed_point(side * (x + length * np.cos(angle)), y + length * np.sin(angle) * 0.6) * BROW_SCALE
    return start, end, generator.uniform(0.5, 1, count)


def paint_beard(skin: np.ndarray, hair_colour: np.ndarray, traits: PersonTraits) -> tuple[np.ndarray, np.ndarray]:
    """The canvas with the beard, and the beard's height over the skin, (ROWS, COLUMNS) decimetres."""
    if traits.beard == "none":
        return skin, canvas.blank()
    generator = stream("beard", traits.seed)
    region = np.clip(cv2.GaussianBlur(_beard_region(traits.beard).astype(np.float32), (0, 0), 2.5), 0, 1)
    lips = np.hypot(canvas.X / LIPS_HALF_WIDTH, (canvas.Y - LIPS_Y) / LIPS_HALF_HEIGHT)
    region *= 1 - np.exp(-0.5 * lips**6)
    grain = cv2.GaussianBlur(generator.random(region.shape, np.float32), (0, 0), 0.7)
    grain = np.clip((grain - 0.5) * 2 + 0.5, 0, 1)
    full = traits.beard == "beard"
    opacity = region * OPACITY[traits.beard] * (0.7 + 0.6 * grain)
    opacity *= generator.uniform(0.8, 1)
    skin = canvas.over(skin, hair_colour * 0.9, np.clip(opacity, 0, 1))
    height = region * generator.uniform(*BEARD_HEIGHTS) * (0.5 + 0.5 * grain) * (region > 0.3)
    return skin, height.astype(np.float32) if full else canvas.blank()


def _beard_region(beard: str) -> np.ndarray:
    """(ROWS, COLUMNS), from 0 to 1; ends at the edge of the jaw, so that the neck stays bare."""
    angle, y = np.abs(canvas.ANGLE), canvas.Y
    jaw = np.interp(angle, (0, 0.5, 0.9, 1.3), (CHIN_BOTTOM, CHIN_BOTTOM + 0.03, 6.3, 6.6))
    cheeks = np.interp(angle, _BEARD_ANGLES, _BEARD_TOPS)
    full = np.clip((cheeks - y) / 0.05, 0, 1) * np.clip((y - jaw) / 0.05, 0, 1) * (angle < 1.35)
    moustache = np.exp(-0.5 * ((y - (6.79 - 0.09 * np.clip(angle / 0.33, 0, 1))) / 0.042) ** 4) * (angle < 0.33)
    chin = np.exp(-0.5 * np.hypot(canvas.X / 0.23, (y - 6.37) / 0.2) ** 6) * (y > CHIN_BOTTOM)
    sides = (np.abs(angle - 0.3) < 0.05) & (y < 6.8) & (y > 6.4)
    return {
        "stubble": np.maximum(full, moustache),
        "beard": np.maximum(full, moustache),
        "goatee": np.maximum(np.maximum(chin, sides), moustache),
        "moustache": moustache,
    }[beard]
