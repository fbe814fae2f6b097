"""A contact sheet of rendered people, to look at."""

from __future__ import annotations

import numpy as np

from .person import Person
from .render import render_clip
from .scene import sample_clip

COLUMNS = 2  # people beside one another


def contact_sheet(seeds: range, clips: int, shown: int, size: int) -> np.ndarray:
    """(H, W, 3) uint8: for each person a row of `shown` frames, first to last, of each of their clips."""
    rows = []
    for seed in seeds:
        person = Person.from_seed(seed)
        strips = []
        for number in range(clips):
            frames = render_clip(person, sample_clip(seed, number, size=size))
            strips.append(np.hstack(frames[np.linspace(0, len(frames) - 1, shown).round().astype(int)]))
        rows.append(np.hstack(strips))
    rows += [np.full_like(rows[0], 255)] * (-len(rows) % COLUMNS)
    return np.vstack([np.hstack(rows[start : start + COLUMNS]) for start in range(0, len(rows), COLUMNS)])
