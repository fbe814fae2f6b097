"""Footage with faults, and what should become of each clip: of rendered people, and a pan over a photograph."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from mm_core.video import write_video

from ..people.captions import caption
from ..people.person import Person
from ..people.render import paint_background, render_frame
from ..people.scene import sample_clip
from .letters import Letters, lettered
from .photographs import Album, resized
from .pictures import KEPT, OR, blurred, far, wall

FRAMES, FPS = 17, 8.0
"""Of a clip, as the corpus is curated: two seconds."""
RATE = 12
"""Of the footage."""
_LENGTH = 25  # frames of footage that hold a clip; faces are looked for in each sixth
_RENDERED, SIZE, _SAMPLES = 160, 320, 2
_TURN = 15.0  # degrees to either side
_AWAY = 55.0  # degrees: beyond `keep.turned` by more than the error of a pose, by which 45 is not
_BESIDE, _BEHIND = 120.0, 150.0  # degrees: hardly a face is seen; no head turns to the latter and back in two seconds


def shot(person: Person, number: int, yaws: Sequence[float] | None = None) -> tuple[np.ndarray, str]:
    """(25, 320, 320, 3) uint8 RGB of a person, and a caption. yaws: degrees at each frame."""
    clip = dataclasses.replace(sample_clip(person.traits.seed, number, size=_RENDERED), pitch=(0, 0), roll=(0, 0))
    # A clear movement, since a still one is planted where it is wanted, and no turning away.
    end = _TURN if clip.yaw[1] > clip.yaw[0] else -_TURN
    yaws = np.linspace(-end, end, _LENGTH) if yaws is None else yaws
    background = paint_background(clip, clip.size * _SAMPLES)
    frames = []
    for part, yaw in zip(np.linspace(0, 1, _LENGTH), yaws):
        turned = dataclasses.replace(clip, yaw=(float(yaw), float(yaw)))
        frames.append(resized(render_frame(person, turned, float(part), background, _SAMPLES), SIZE, SIZE))
    return np.stack(frames), caption(clip).replace(" img", "")


def _hidden(frames: np.ndarray, first: int, last: int, rises: bool = False) -> np.ndarray:
    """A plain wall slides over the person between two frames, from the side or from below, too slowly for a cut."""
    left = frames.copy()
    for place, frame in enumerate(left):
        covered = round(SIZE * np.clip((place - first) / (last - first), 0, 1))
        part = frame[SIZE - covered :] if rises else frame[:, :covered]
        part[:] = frames[0].mean((0, 1))
    return left


def _subtitled(frames: np.ndarray) -> np.ndarray:
    """In the second half."""
    at, letters = len(frames) // 2, Letters(text="Where have you been?", size=1 / 16, at=(0.5, 0.9))
    return np.concatenate([frames[:at], _each(lettered, frames[at:], letters)])


def _dissolved(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Between two looks, 6 and 12, and no cut either."""
    part = np.clip((np.arange(_LENGTH) - 6) / 6, 0, 1)[:, None, None, None]
    return ((1 - part) * one + part * other).astype(np.uint8)


def _moved(picture: np.ndarray) -> np.ndarray:
    """A camera that moves along a picture of more than 320 x 320 px."""
    return np.stack([picture[:SIZE, 2 * step : 2 * step + SIZE] for step in range(_LENGTH)])


def _each(change: object, frames: np.ndarray, *arguments: object) -> np.ndarray:
    return np.stack([change(frame, *arguments) for frame in frames])


def _turning(farthest: float) -> np.ndarray:
    """Yaw at each frame: to the side and back, as looks at every half second see it: away, the farthest, and back."""
    return np.interp(np.linspace(0, 4, _LENGTH), range(5), [0, _AWAY, farthest, _AWAY, 0])


def plant_footage(folder: Path, seed: int, album: Album | None) -> dict[str, str]:
    """As `plant_pictures`, footage, by name of the file and number of the clip in it. A face that is half hidden when
    it is looked at may be found, as somebody else's, or not. album: without, as many as a test has time for."""
    truth: dict[str, str] = {}
    folder.mkdir(parents=True, exist_ok=True)

    def put(what: str, rules: Sequence[str], frames: np.ndarray | bytes, text: str, rate: float = RATE) -> None:
        path = folder / f"{seed:05d}-{what}.mp4"
        if isinstance(frames, bytes):
            path.write_bytes(frames)
        else:
            write_video(path, frames, Fraction(rate), quality=90)
        path.with_suffix(".txt").write_text(text)
        truth.update({f"{path.name}#{number}": rule for number, rule in enumerate(rules)})

    person = Person.from_seed(seed)
    (good, text), (second, other_text) = shot(person, 0), shot(person, 1)
    turning, turning_text = shot(person, 2, _turning(_BESIDE))
    put("good", [KEPT], good, text)
    put("second", [KEPT], second, other_text)
    put("same", ["duplicate"], (folder / f"{seed:05d}-good.mp4").read_bytes(), text)
    put("near", ["near duplicate"], _each(resized, good, 288, 288), text)
    put("turning", [KEPT], turning, turning_text)
    put("subtitle", ["text"], _subtitled(good), text)
    put("static", ["motion"], np.repeat(good[:1], _LENGTH, 0), text)
    put("nobody", ["face"], _moved(wall(seed, 3, 2 * SIZE)), text)
    put("two", ["faces"], np.concatenate([good, second], axis=2), text)
    put("lost", ["lost"], _hidden(second, 6, 12), text)
    put("slow", ["rate"], good[::3], text, RATE / 3)
    put("short", ["short"], good[:12], text)
    put("corrupt", ["unreadable"], (folder / f"{seed:05d}-good.mp4").read_bytes()[:2000], text)
    put("text", ["caption"], second[::-1], "A man beside a text.")
    if album is None:
        return truth
    away = shot(person, 2, _turning(_BEHIND))[0][[*range(13), *([11, 12] * 6)]]
    put("away", ["seen" + OR + "lost"], away, turning_text)
    put("hidden", ["lost" + OR + "one person"], _hidden(second, 7, 16, rises=True), text)
    put("tiny", ["lines"], _each(resized, second, 200, 200), text)
    put("far", ["face size"], _each(far, second, wall(seed, 4, SIZE), 120), text)
    put("blurred", ["sharpness"], _each(blurred, second, SIZE / 60), text)
    put("cut", [KEPT, KEPT], np.concatenate([good[::-1], shot(Person.from_seed(seed + 1), 3)[0]]), text)
    # Rendered strangers are too much alike, to a recogniser of photographs. A dissolve between them may be a cut, too.
    one, other = (album.photo(seed + number, SIZE + 2 * _LENGTH, share=(0.85, 0.95)) for number in range(2))
    put("pan", [KEPT], _moved(one[0]), one[1])
    put("another", ["one person" + OR + "short"], _dissolved(_moved(other[0]), _moved(one[0])[::-1]), text)
    return truth
