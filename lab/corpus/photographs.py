"""Photographs in the public domain, put together anew: one of a person before one of no person."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from ..people.streams import stream

_SCENES = ("coffee.png", "chelsea.png", "rocket.jpg", "hubble_deep_field.jpg", "moon.png", "brick.png", "grass.png")
_SCENES += ("gravel.png", "clock_motion.png", "retina.jpg")
"""Of scikit-image: CC0 or in the public domain, as its data module says of each."""


@dataclass(frozen=True, kw_only=True)
class Album:
    """portraits: with the words for the persons. scenes: without anybody. All (H, W, 3) uint8 RGB."""

    portraits: tuple[tuple[np.ndarray, str], ...]
    scenes: tuple[np.ndarray, ...]

    def scene(self, number: int, size: int) -> np.ndarray:
        """(size, size, 3) uint8: a part of a photograph without anybody."""
        generator = stream("corpus scene", number, size)
        picture = self.scenes[number % len(self.scenes)]
        height, width = picture.shape[:2]
        side = int(min(height, width) * generator.uniform(0.6, 1))
        top, left = (int(generator.integers(0, edge - side + 1)) for edge in (height, width))
        return resized(picture[top : top + side, left : left + side], size, size)

    def photo(
        self, number: int, size: int, share: tuple[float, float] = (0.6, 0.95), blur: float = 0.0,
        scene: np.ndarray | None = None,
    ) -> tuple[np.ndarray, str]:
        """(size, size, 3) uint8 of a person before a scene, and its caption. Each number has other ones, or has them at
        another place; every other round of persons is mirrored.

        share: of the height that the portrait takes. blur: radius, of the portrait's height. scene: (size, size, 3)
        uint8, instead of a photograph.
        """
        generator = stream("corpus photo", number, size)
        turn, person = divmod(number, len(self.portraits))
        portrait, word = self.portraits[person]
        picture = (self.scene(turn // 2 + 3 * person, size) if scene is None else scene).copy()
        height = int(size * generator.uniform(*share))
        width = min(size, round(height * portrait.shape[1] / portrait.shape[0]))
        top, left = (int(generator.integers(0, size - side + 1)) for side in (height, width))
        portrait = cv2.GaussianBlur(portrait, (0, 0), blur * portrait.shape[0]) if blur else portrait
        portrait = resized(portrait, width, height)
        picture[top : top + height, left : left + width] = portrait[:, ::-1] if turn % 2 else portrait
        return picture, f"A {word} looks into the camera."


def resized(picture: np.ndarray, width: int, height: int) -> np.ndarray:
    shrinks = height < picture.shape[0]
    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LANCZOS4)


@cache
def album(folder: Path) -> Album:
    """Of the tests' photographs, of whose people these are in the public domain, with those that scikit-image and
    matplotlib bring, of Eileen Collins and Grace Hopper."""
    from matplotlib import get_data_path
    from skimage import data_dir

    samples = Path(data_dir)
    hopper = Path(get_data_path(), "sample_data", "grace_hopper.jpg")
    of_people = {folder / "person_a_2.jpg": "man", folder / "person_b_2.jpg": "woman", folder / "impostor_1.jpg": "man"}
    portraits = [(_picture(path), word) for path, word in of_people.items()]
    portraits += [(_picture(samples / "astronaut.png")[:320, 80:370], "woman"), (_picture(hopper), "woman")]
    return Album(portraits=tuple(portraits), scenes=tuple(_picture(samples / name) for name in _SCENES))


def _picture(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))
