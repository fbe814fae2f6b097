"""What happens in a clip: the description that is rendered, captioned, saved, and that an evaluation can check.

All directions are the viewer's: a face that turns left turns towards the left edge of the picture.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .expressions import NEUTRAL
from .streams import pick, stream
from .traits import PersonTraits, sample_traits

COLOURS = {
    "white": (0.86, 0.86, 0.84),
    "grey": (0.47, 0.48, 0.49),
    "black": (0.07, 0.07, 0.08),
    "red": (0.66, 0.13, 0.12),
    "orange": (0.82, 0.45, 0.16),
    "yellow": (0.85, 0.72, 0.25),
    "green": (0.20, 0.46, 0.25),
    "light green": (0.58, 0.74, 0.52),
    "blue": (0.16, 0.31, 0.62),
    "light blue": (0.52, 0.68, 0.84),
    "purple": (0.41, 0.24, 0.52),
    "pink": (0.84, 0.55, 0.62),
    "brown": (0.40, 0.28, 0.19),
    "beige": (0.77, 0.69, 0.56),
}
"""sRGB of clothes and backgrounds, by name."""
COLOUR_SPREAD = 0.025

GARMENTS = {"T-shirt": 0.7, "turtleneck": 0.3}
TURN_RATE, NOD_RATE, TILT_RATE, EXPRESSION_RATE = 0.6, 0.25, 0.2, 0.75
YAW_LIMIT, PITCH_LIMIT, ROLL_LIMIT = 34.0, 13.0, 9.0  # degrees
TURN, NOD, TILT = (20.0, 60.0), (11.0, 22.0), (9.0, 16.0)
"""Degrees between start and end of a movement; without one the pose stays within STILL."""
STILL = 3.0
FIRST_EXPRESSIONS = {NEUTRAL: 0.62, "smile": 0.18, "open mouth": 0.06, "raised brows": 0.05, "closed eyes": 0.09}
LAST_EXPRESSIONS = {
    NEUTRAL: 0.1,
    "smile": 0.22,
    "grin": 0.16,
    "open mouth": 0.16,
    "raised brows": 0.12,
    "frown": 0.09,
    "closed eyes": 0.1,
    "pout": 0.05,
}

Path = tuple[float, float]
"""Value at the first and at the last frame."""


def at(path: Path, part: float) -> float:
    """Part of the way, 0..1; of an array of parts, an array."""
    return path[0] + part * (path[1] - path[0])


def eased(part: float) -> float:
    """How far pose and expression are at a part, 0..1, of the clip: they start and stop softly."""
    return part * part * (3 - 2 * part)


@dataclass(frozen=True, kw_only=True)
class Light:
    """azimuth: degrees, first and last frame, 0 from the camera, positive from the viewer's right.

    elevation: degrees above the horizon. strength: of the key light, 0.6..1.2. ambient: 0.3..0.6.
    warmth: -1 (bluish) .. 1 (reddish).
    """

    azimuth: Path
    elevation: float
    strength: float
    ambient: float
    warmth: float


@dataclass(frozen=True, kw_only=True)
class ClipDescription:
    """One clip of one person: `sample_clip(person, clip)` makes it, `render_clip` draws it, `caption` tells it.

    frames: 8N + 1. size: pixels, the side of the square picture.
    yaw, pitch, roll: degrees at the first and the last frame; positive: the face turned to the right of the picture,
    up, and tilted clockwise in the picture.
    expressions: their names at the first and the last frame; in between both are blended.
    clothes, background: the names of their colours, and these in this clip as numbers from 0 to 1.
    zoom: 1 shows 2.4 decimetres across. wording: chooses among the ways to say the same.
    """

    # Expressions are keys of EXPRESSIONS, colours of COLOURS; the fields that end in _colour are sRGB.

    person: PersonTraits
    clip: int
    frames: int
    size: int
    yaw: Path
    pitch: Path
    roll: Path
    expressions: tuple[str, str]
    light: Light
    garment: str
    clothes: str
    clothes_colour: tuple[float, float, float]
    background: str
    background_colour: tuple[float, float, float]
    zoom: float
    wording: int

    def to_json(self) -> dict[str, Any]:
        """Plain types, for a manifest."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ClipDescription:
        """The inverse of to_json."""
        fields = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
        person, light = dict(data["person"]), dict(data["light"])
        fields["person"] = PersonTraits(**person | {"ancestry": tuple(person["ancestry"])})
        fields["light"] = Light(**light | {"azimuth": tuple(light["azimuth"])})
        return cls(**fields)


def sample_clip(seed: int, clip: int, frames: int = 9, size: int = 64) -> ClipDescription:
    """The clip with this number of the person with this seed; frames and size change nothing else in it."""
    if frames < 9 or frames % 8 != 1:
        raise ValueError(f"a clip cannot have {frames} frames: video VAEs keep 8N + 1, such as 9 or 17")
    generator = stream("clip", seed, clip)
    yaw = _path(generator, TURN_RATE, TURN, YAW_LIMIT)
    pitch = _path(generator, NOD_RATE, NOD, PITCH_LIMIT)
    roll = _path(generator, TILT_RATE, TILT, ROLL_LIMIT)
    clothes, background = pick(generator, _evenly(COLOURS)), pick(generator, _evenly(COLOURS))
    return ClipDescription(
        person=sample_traits(seed),
        clip=clip,
        frames=frames,
        size=size,
        yaw=yaw,
        pitch=pitch,
        roll=roll,
        expressions=_expressions(generator),
        light=_light(generator),
        garment=pick(generator, GARMENTS),
        clothes=clothes,
        clothes_colour=_near(generator, COLOURS[clothes]),
        background=background,
        background_colour=_near(generator, COLOURS[background]),
        zoom=float(generator.uniform(0.94, 1.1)),
        wording=int(generator.integers(1 << 30)),
    )


def _path(generator: np.random.Generator, rate: float, distance: tuple[float, float], limit: float) -> Path:
    """A clear movement within the limits, or none: nothing in between that a caption could not name."""
    moves, amount, place = generator.random() < rate, generator.uniform(*distance), generator.random()
    direction, drift = generator.choice((-1, 1)), generator.uniform(-STILL, STILL) / 2
    if moves:
        low = -limit + place * (2 * limit - amount)
        return (low, low + amount) if direction > 0 else (low + amount, low)
    middle = (2 * place - 1) * (limit - STILL) * (1 - rate)
    return (middle - drift, middle + drift)


def _expressions(generator: np.random.Generator) -> tuple[str, str]:
    first, last = pick(generator, FIRST_EXPRESSIONS), pick(generator, LAST_EXPRESSIONS)
    return (first, last) if generator.random() < EXPRESSION_RATE else (first, first)


def _light(generator: np.random.Generator) -> Light:
    azimuth, drift = generator.uniform(-70, 70), generator.uniform(-15, 15)
    return Light(
        azimuth=(azimuth - drift, azimuth + drift),
        elevation=float(generator.uniform(15, 50)),
        strength=float(generator.uniform(0.65, 1.15)),
        ambient=float(generator.uniform(0.36, 0.6)),
        warmth=float(generator.uniform(-1, 1)),
    )


def _near(generator: np.random.Generator, colour: tuple[float, float, float]) -> tuple[float, float, float]:
    return tuple(float(value) for value in np.clip(colour + COLOUR_SPREAD * generator.standard_normal(3), 0.02, 0.95))


def _evenly(names: dict[str, Any]) -> dict[str, float]:
    return dict.fromkeys(names, 1.0)
