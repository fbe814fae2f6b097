"""How a picture or clip of any size becomes one of the training size: cropped around the heads in it, or padded.

A centre crop of a square portrait to a wide frame loses hair and chin. The paper pads (A.1); a crop is only taken where
all of the head stays inside, since black borders are learnt as well.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..errors import SampleError

# What a face's box, from forehead to chin, lacks of the head, in sides of the box: hair, chin and neck, ears.
ABOVE, BELOW, BESIDE = 0.6, 0.3, 0.3


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a source of another size comes to lie in the frame that is trained."""

    scale: float
    """Pixels of the frame by one of the source, at most 1: nothing is ever enlarged."""
    left: float
    top: float
    """Of the source's corner, in pixels of the frame: negative where the source is cut, positive where it is padded."""

    def moved(self, points: np.ndarray) -> np.ndarray:
        """(..., 2) pixels of the source to pixels of the frame, float32."""
        return (points * self.scale + np.array([self.left, self.top])).astype(np.float32)

    def applied(self, frames: np.ndarray, width: int, height: int) -> np.ndarray:
        """(F, H, W, 3) uint8 to (F, height, width, 3); what is beyond the source is black."""
        rows, columns = frames.shape[1:3]
        if (columns, rows) == (width, height):
            return frames
        x0, y0 = (round(max(0.0, start)) for start in (self.left, self.top))
        x1 = min(width, round(self.left + columns * self.scale))
        y1 = min(height, round(self.top + rows * self.scale))
        box = [(x0 - self.left) / self.scale, (y0 - self.top) / self.scale]
        box += [(x1 - self.left) / self.scale, (y1 - self.top) / self.scale]
        box = tuple(np.clip(box, 0, [columns, rows, columns, rows]).tolist())
        placed = np.zeros((len(frames), height, width, 3), np.uint8)
        for frame, target in zip(frames, placed):
            resized = Image.fromarray(frame).resize((x1 - x0, y1 - y0), Image.Resampling.LANCZOS, box=box)
            target[y0:y1, x0:x1] = np.asarray(resized)
        return placed


def place(size: tuple[int, int], wanted: tuple[int, int], faces: np.ndarray, name: str) -> Placement:
    """The largest crop of the wanted shape that holds all of the heads, nearest to the middle; else all, padded.

    size, wanted: widths and heights in pixels. faces: (n, 4) boxes in the source, of all frames of a clip together.

    Raises SampleError "too small".
    """
    check_size(*size, *wanted, name)
    cover, contain = (choose(w / s for w, s in zip(wanted, size)) for choose in (max, min))
    starts = []
    for axis, (length, target) in enumerate(zip(size, wanted)):
        window, (low, high) = target / cover, _heads(faces, axis, length)
        if cover > 1 or high - low > window + 1e-6:
            starts = [(target - length * contain) / 2 for length, target in zip(size, wanted)]
            return Placement(scale=contain, left=starts[0], top=starts[1])
        start = min(max((length - window) / 2, high - window), low)
        starts.append(-min(max(start, 0.0), length - window) * cover)
    return Placement(scale=cover, left=starts[0], top=starts[1])


def _heads(faces: np.ndarray, axis: int, length: int) -> tuple[float, float]:
    """From where to where along an axis, 0 x and 1 y, heads reach within the picture."""
    low, high = faces[:, axis], faces[:, axis + 2]
    side = high - low
    before, after = (BESIDE, BESIDE) if axis == 0 else (ABOVE, BELOW)
    return float(max(0, (low - before * side).min())), float(min(length, (high + after * side).max()))


def check_size(width: int, height: int, wanted_width: int, wanted_height: int, name: str) -> None:
    """Raises SampleError "too small" for what would not fill the frame in either direction."""
    if width < wanted_width and height < wanted_height:
        raise SampleError(
            "too small",
            f"{name} is {width} x {height} px, less than the {wanted_width} x {wanted_height} that are trained; "
            "use a larger one, or train smaller",
        )
