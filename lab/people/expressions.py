"""Facial expressions by name: strengths of the head's ARKit units."""

from __future__ import annotations

NEUTRAL = "neutral"


def _both(**units: float) -> dict[str, float]:
    """Left and right of each unit."""
    return {f"{name}{side}": strength for name, strength in units.items() for side in ("Left", "Right")}


REST = _both(mouthSmile=0.18, browDown=-0.15, eyeWide=0.22) | {"browInnerUp": 0.08}
"""Added to every expression: without it the head at rest looks stern."""

EXPRESSIONS: dict[str, dict[str, float]] = {
    NEUTRAL: {},
    "smile": _both(mouthSmile=0.85, cheekSquint=0.45, mouthDimple=0.3),
    "grin": _both(mouthSmile=0.9, cheekSquint=0.5, mouthUpperUp=0.35, mouthLowerDown=0.25) | {"jawOpen": 0.2},
    "open mouth": {"jawOpen": 0.6},
    "raised brows": _both(browOuterUp=0.9, eyeWide=0.5) | {"browInnerUp": 0.95},
    "frown": _both(browDown=0.9, mouthFrown=0.6, noseSneer=0.2),
    "closed eyes": _both(eyeBlink=1.0),
    "pout": _both(mouthPress=0.1) | {"mouthPucker": 0.85, "mouthFunnel": 0.2},
}


def blended(start: str, end: str, part: float) -> dict[str, float]:
    """Unit strengths part of the way, 0..1, from one expression to another, REST included."""
    units = dict(REST)
    for name, share in ((start, 1 - part), (end, part)):
        for unit, strength in EXPRESSIONS[name].items():
            units[unit] = units.get(unit, 0.0) + share * strength
    return {unit: strength for unit, strength in units.items() if strength}
