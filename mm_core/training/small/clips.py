"""All rendered clips in memory, as the small models are trained on them: 36 KB a clip of 9 frames of 64 px."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...data.people.shards import read_clips


@dataclass(frozen=True, kw_only=True, eq=False)
class Clips:
    """frames: (N, F, H, W, 3) uint8 RGB, by person and clip. persons: (N,) seeds. captions: N texts."""

    frames: np.ndarray
    persons: np.ndarray
    captions: list[str]

    @classmethod
    def read(cls, folder: Path) -> Clips:
        frames, persons, captions = [], [], []
        for clip in read_clips(folder):
            frames.append(clip.frames)
            persons.append(clip.description.person.seed)
            captions.append(clip.caption)
        return cls(frames=np.stack(frames), persons=np.array(persons), captions=captions)


def to_unit(frames: np.ndarray) -> Tensor:
    """uint8 0..255 -> float32 -1..1."""
    return torch.from_numpy(np.ascontiguousarray(frames)).float() / 127.5 - 1
