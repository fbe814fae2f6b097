"""What is kept: pure functions of a row of measurements and the thresholds."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import PromptError
from ..pipelines.prompt import TRIGGER, mark_identity
from .config import Keeping, Kind, Measuring
from .measure import Row

PORTRAIT = "A squared ID photo of a {word} " + TRIGGER + ", with pure black on two sides."
"""The standard caption of the paper's source B."""


@dataclass(frozen=True)
class Limit:
    """A number that must not be below `least` nor above `most`, both names of settings of `Keeping`."""

    name: str
    unit: str
    value: Callable[[Row, Keeping], float | None]
    """None where there is nothing to measure: another rule tells."""
    least: str | None = None
    most: str | None = None

    def distances(self, row: Row, keep: Keeping) -> dict[str, float]:
        """By the name of each threshold, how far inside of it a row is; below 0: outside."""
        value = self.value(row, keep)
        if value is None:
            return {}
        least = {} if self.least is None else {self.least: value - getattr(keep, self.least)}
        return least | ({} if self.most is None else {self.most: getattr(keep, self.most) - value})

    def broken(self, row: Row, keep: Keeping) -> str | None:
        value = self.value(row, keep)
        if value is not None and self.least is not None and value < getattr(keep, self.least):
            return f"{value:g} {self.unit}, less than {self.least} {getattr(keep, self.least):g}"
        if value is not None and self.most is not None and value > getattr(keep, self.most):
            return f"{value:g} {self.unit}, more than {self.most} {getattr(keep, self.most):g}"
        return None


@dataclass(frozen=True)
class Check:
    """Anything else: what is wrong, or None."""

    name: str
    broken: Callable[[Row, Keeping], str | None]


def faces_of(row: Row, keep: Keeping) -> list[list[Row]]:
    """The finds that count as faces, in each look at an item; the person first."""
    return [[face for face in look if face["score"] >= keep.min_score] for look in row["looks"]]


def _of_face(name: str) -> Callable[[Row, Keeping], float | None]:
    """The median of a number over the looks that show the face, without its sign."""

    def value(row: Row, keep: Keeping) -> float | None:
        numbers = sorted(abs(look[0][name]) for look in faces_of(row, keep) if look)
        return numbers[len(numbers) // 2] if numbers else None

    return value


def _score(row: Row, keep: Keeping) -> float:
    return max((face["score"] for look in row["looks"] for face in look[:1]), default=0.0)


def _number_of_faces(row: Row, keep: Keeping) -> float | None:
    """The most faces that are seen together."""
    counts = [
        sum(face["size"] >= keep.other_face * max(each["size"] for each in look) for face in look)
        for look in faces_of(row, keep)
        if look
    ]
    return max(counts, default=None)


def _seen(row: Row, keep: Keeping) -> float:
    looks = faces_of(row, keep)
    return sum(map(bool, looks)) / len(looks)


def _lost(row: Row, keep: Keeping) -> str | None:
    """A face may be lost where the head turns away, at either end of a gap; not otherwise."""
    yaws = [abs(look[0]["yaw"]) if look else None for look in faces_of(row, keep)]
    for first, last in _gaps(yaws):
        ends = [yaws[place] for place in (first - 1, last) if 0 <= place < len(yaws)]
        if not any(yaw >= keep.turned for yaw in ends):
            return f"the face is lost in look {first + 1} of {len(yaws)}, without turning away"
    return None


def _gaps(values: list[Any]) -> Iterator[tuple[int, int]]:
    """First and one past the last of each run of None."""
    start = None
    for place, value in enumerate([*values, ...]):
        if value is None and start is None:
            start = place
        elif value is not None and start is not None:
            yield start, place
            start = None


def _caption(row: Row, keep: Keeping) -> str | None:
    caption = row["caption"]
    if not caption:
        return "there is none"
    for word in keep.banned_words:
        if re.search(rf"\b{re.escape(word)}\b", caption, re.IGNORECASE):
            return f'it has the word "{word}"'
    try:
        mark_identity(caption)
    except PromptError as error:
        return str(error)
    return None


def _unsafe(row: Row, keep: Keeping) -> float | None:
    return max((score for label, score in row.get("labels", {}).items() if label in keep.refused_labels), default=None)


_PICTURE = [
    Limit("lines", "px", lambda row, keep: min(row["size"]), "min_lines"),
    Limit("face", "score", _score, "min_score"),
    Limit("faces", "seen together", _number_of_faces, most="max_faces"),
    Limit("face size", "px", _of_face("size"), "min_face_size"),
    Limit("text", "percent of the picture", lambda row, keep: row.get("text"), most="max_text"),
    Limit("sharpness", "variance", _of_face("sharpness"), "min_sharpness"),
]
_POSE = [
    Limit("yaw", "degrees", _of_face("yaw"), most="max_yaw"),
    Limit("roll", "degrees", _of_face("roll"), most="max_roll"),
]
_SAFE = Limit("safety", "score", _unsafe, most="max_unsafe")
_CAPTION = Check("caption", _caption)


def rules(kind: Kind, measure: Measuring) -> list[Limit | Check]:
    """In the order in which they are asked: the first that is broken is why an item goes."""
    if kind == "video":
        slow = Check("rate", lambda row, keep: _slow(row, measure.fps))
        motion = Limit("motion", "percent a frame", lambda row, keep: row["motion"], "min_motion", "max_motion")
        same = Limit("one person", "cosine", lambda row, keep: row["same"], "min_same_face")
        seen = Limit("seen", "of the frames", _seen, "min_seen")
        lost = Check("lost", _lost)
        return [slow, *_PICTURE, lost, seen, same, motion, _SAFE, _CAPTION]
    if kind == "pairs":
        pair = Limit("pair", "cosine", lambda row, keep: row.get("cosine"), "min_pair_cosine")
        return [*_PICTURE, *_POSE, pair, _SAFE, _CAPTION]
    return [*_PICTURE, *_POSE, _SAFE, *([_CAPTION] if kind == "pictures" else [])]


def _slow(row: Row, fps: float) -> str | None:
    wrong = row["rate"] < 0.99 * fps
    return f"{row['rate']:g} frames a second, fewer than the {fps:g} of a clip" if wrong else None


def judged(row: Row, asked: list[Limit | Check], keep: Keeping) -> tuple[str, str] | None:
    """The rule that an item breaks first, and how; None if it is kept."""
    if "error" in row:
        return row["error"][0], row["error"][1]
    for rule in asked:
        why = rule.broken(row, keep)
        if why is not None:
            return rule.name, why
    return None


def marked(caption: str) -> str:
    """A caption that names a person, with the trigger after their word, as the trainer reads it."""
    found = mark_identity(caption)
    return f"{found.text[: found.end]} {TRIGGER}{found.text[found.end :]}"


def portrait_caption(caption: str | None) -> str:
    """The standard one, with the word that a given caption has for the person."""
    try:
        return PORTRAIT.format(word=mark_identity(caption or "").noun.lower())
    except PromptError:
        return PORTRAIT.format(word="person")
