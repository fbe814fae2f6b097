"""Rendered footage with faults, and what should become of each clip."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np

from mm_core.video import write_video

from ..people.captions import caption
from ..people.person import Person
from ..people.render import paint_background, render_frame
from ..people.scene import sample_clip
from .pictures import KEPT, enlarged, lettered, wall

FRAMES, FPS = 17, 8.0
"""Of a clip, as the corpus is curated: two seconds."""
RATE = 12
"""Of the footage."""
_LENGTH = 25  # frames of footage that hold a clip
_RENDERED, SIZE, _SAMPLES = 160, 320, 2
_TURN = 15.0  # degrees to either side


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
        frames.append(enlarged(render_frame(person, turned, float(part), background, _SAMPLES), SIZE))
    return np.stack(frames), caption(clip).replace(" img", "")


def _walked_out(frames: np.ndarray, seed: int) -> np.ndarray:
    """A wall slides over the person, slowly enough to be no cut."""
    scene, left = wall(seed, 2, SIZE), frames.copy()
    scene[:] = scene.mean((0, 1)).astype(np.uint8)
    for place, frame in enumerate(left):
        hidden = round(SIZE * np.clip((place - 7) / 9, 0, 1))
        frame[:, :hidden] = scene[:, :hidden]
    return left


def _sliding(seed: int) -> np.ndarray:
    """A camera that moves along furniture."""
    scene = wall(seed, 3, 2 * SIZE)
    return np.stack([scene[:SIZE, 2 * step : 2 * step + SIZE] for step in range(_LENGTH)])


def _subtitled(frames: np.ndarray) -> np.ndarray:
    """In the second half."""
    at = len(frames) // 2
    return np.stack([*frames[:at], *(lettered(frame, "Where have you been?", 16, (0.5, 0.9)) for frame in frames[at:])])


def _smaller(frames: np.ndarray) -> np.ndarray:
    return np.stack([cv2.resize(frame, (288, 288), interpolation=cv2.INTER_AREA) for frame in frames])


def _there_and_back() -> np.ndarray:
    """Yaw at each frame: past the shoulder and back, as looks at every half second see it: 0, 45, 150, 45, 0."""
    return np.interp(np.linspace(0, 4, _LENGTH), range(5), [0, 45, 150, 45, 0])


def plant_footage(folder: Path, people: range) -> dict[str, str]:
    """As `plant_pictures`, footage, by name of the file and number of the clip in it. A face that is half hidden when
    it is looked at is found, as somebody else's."""
    truth: dict[str, str] = {}
    folder.mkdir(parents=True, exist_ok=True)
    previous: np.ndarray | None = None
    for seed in people:
        person = Person.from_seed(seed)

        def put(
            what: str, rules: Sequence[str], frames: np.ndarray | bytes, text: str, rate: float = RATE, seed: int = seed
        ) -> None:
            path = folder / f"{seed:05d}-{what}.mp4"
            if isinstance(frames, bytes):
                path.write_bytes(frames)
            else:
                write_video(path, frames, Fraction(rate), quality=90)
            path.with_suffix(".txt").write_text(text)
            truth.update({f"{path.name}#{number}": rule for number, rule in enumerate(rules)})

        good, text = shot(person, 0)
        second, other_text = shot(person, 1)
        put("good", [KEPT], good, text)
        put("second", [KEPT], second, other_text)
        put("same", ["duplicate"], (folder / f"{seed:05d}-good.mp4").read_bytes(), text)
        put("near", ["near duplicate"], _smaller(good), text)
        put("turning", [KEPT], *shot(person, 2, _there_and_back()))
        if previous is not None:
            put("cut", [KEPT, KEPT], np.concatenate([shot(person, 3)[0], previous]), text)
        put("subtitle", ["text"], _subtitled(good), text)
        put("static", ["motion"], np.repeat(good[:1], _LENGTH, 0), text)
        put("nobody", ["face"], _sliding(seed), text)
        put("two", ["faces"], np.concatenate([good, second], axis=2), text)
        put("lost", ["lost or one person"], _walked_out(second, seed), text)
        put("slow", ["rate"], good[::3], text, RATE / 3)
        put("short", ["short"], good[:12], text)
        put("corrupt", ["unreadable"], (folder / f"{seed:05d}-good.mp4").read_bytes()[:2000], text)
        put("text", ["caption"], second[::-1], "A man beside a text.")
        if seed != people[-1]:
            previous = shot(person, 4)[0]
    return truth
