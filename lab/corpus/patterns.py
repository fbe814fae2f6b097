"""Patterns without a letter, of which some look like writing to a machine: to stand behind a person, or be worn."""

from __future__ import annotations

import cv2
import numpy as np

from ..people.streams import stream

PATTERNS = ("grid", "stripes", "bricks", "beads")


def pattern(what: str, seed: int, size: int) -> np.ndarray:
    """(size, size, 3) uint8 RGB of one of `PATTERNS`, for each seed another one."""
    generator = stream(f"corpus {what}", seed)
    ground, colour = generator.integers(0, 256, (2, 3))
    step, angle = generator.uniform(size / 60, size / 8), generator.uniform(0, np.pi)
    if what == "bricks":
        angle = 0.0
    y, x = np.mgrid[:size, :size]
    across = (np.cos(angle) * x + np.sin(angle) * y) / step
    along = (np.cos(angle) * y - np.sin(angle) * x) / step
    share = generator.uniform(0.15, 0.5)
    if what == "stripes":
        inside = across % 1 < share
    elif what == "grid":
        inside = (across % 1 < share / 2) | (along % 1 < share / 2)
    elif what == "bricks":
        row = np.floor(along)
        inside = (along % 1 < share / 3) | ((across / 2 + row / 2) % 1 < share / 6)
    else:  # beads, as dots and rings
        distance = np.hypot(across % 1 - 0.5, along % 1 - 0.5)
        inside = (distance < share) & (distance > generator.choice([0, 0.5]) * share)
    drawn = np.where(inside[..., None], colour, ground).astype(np.uint8)
    return cv2.GaussianBlur(drawn, (0, 0), 0.7)
