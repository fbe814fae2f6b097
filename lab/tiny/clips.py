"""All rendered clips in memory, as the small models are trained on them: 36 KB a clip of 9 frames of 64 px."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..people.expressions import EXPRESSIONS, NEUTRAL
from ..people.manifest import repeats_of
from ..people.scene import PITCH_LIMIT, ROLL_LIMIT, YAW_LIMIT, ClipDescription, at, eased
from ..people.shards import read_clips

SHOWN = [name for name in EXPRESSIONS if name != NEUTRAL]
LIGHT_LIMIT = 70.0  # degrees of azimuth
EYES_AND_MOUTH = ((2, 7, 3, 13), (7, 12, 4, 12))  # from row to row, from column to column, of 16
YAW_CHANGE, PITCH_CHANGE, ROLL_CHANGE = 30.0, 8.0, 6.0  # degrees over a clip that make a 1: rare movements count too


@dataclass(frozen=True, kw_only=True, eq=False)
class Clips:
    """By person and clip: pictures, seeds of people, captions, and what `scene_of` says of each frame."""

    frames: np.ndarray  # (N, F, H, W, 3) uint8 RGB
    persons: np.ndarray  # (N,)
    captions: list[str]
    scenes: np.ndarray  # (N, F, SCENE) float32
    repeats: np.ndarray  # (N,) how often it is shown for another's once

    @classmethod
    def read(cls, folder: Path) -> Clips:
        frames, persons, captions, scenes, repeats = [], [], [], [], []
        for clip in read_clips(folder):
            frames.append(clip.frames)
            persons.append(clip.description.person.seed)
            captions.append(clip.caption)
            scenes.append(scene_of(clip.description))
            repeats.append(repeats_of(clip.description))
        return cls(
            frames=np.stack(frames), persons=np.array(persons), captions=captions, scenes=np.stack(scenes),
            repeats=np.array(repeats),
        )  # fmt: skip


def scene_of(clip: ClipDescription) -> np.ndarray:
    """Each frame's pose, expression and light, and the colours and movements of all of it."""
    # (frames, SCENE) float32, about -1..1
    parts = np.linspace(0, 1, clip.frames)
    moved = eased(parts)
    paths = [(clip.yaw, YAW_LIMIT), (clip.pitch, PITCH_LIMIT), (clip.roll, ROLL_LIMIT)]
    columns = [at(path, moved) / limit for path, limit in paths]
    first, last = clip.expressions
    columns += [(first == name) * (1 - moved) + (last == name) * moved for name in SHOWN]
    columns.append(at(clip.light.azimuth, parts) / LIGHT_LIMIT)
    columns += [np.full(clip.frames, 2 * value - 1) for value in (*clip.clothes_colour, *clip.background_colour)]
    changes = [(clip.yaw, YAW_CHANGE), (clip.pitch, PITCH_CHANGE), (clip.roll, ROLL_CHANGE)]
    columns += [np.full(clip.frames, (end - start) / unit) for (start, end), unit in changes]
    return np.stack(columns, axis=1).astype(np.float32)


def of_latents(scenes: np.ndarray) -> np.ndarray:
    """(F, SCENE) -> (F', SCENE): the VAE keeps the first frame for itself, then puts four into one."""
    groups = [slice(0, 1), *(slice(first, first + 4) for first in range(1, len(scenes), 4))]
    return np.stack([scenes[group].mean(0) for group in groups])


SCENE = 3 + len(SHOWN) + 1 + 6 + 3


def windows(height: int, width: int) -> list[tuple[int, ...]]:
    """Of latents of this size, where all faces have eyes and mouth."""
    return [
        tuple(round(edge * side / 16) for edge, side in zip(part, (height, height, width, width)))
        for part in EYES_AND_MOUTH
    ]


def to_unit(frames: np.ndarray) -> Tensor:
    """uint8 0..255 -> float32 -1..1."""
    return torch.from_numpy(np.ascontiguousarray(frames)).float() / 127.5 - 1
