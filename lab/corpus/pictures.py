"""Photos with faults, and what should become of each: of rendered people, and put together from photographs."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from ..people.captions import caption
from ..people.person import Person
from ..people.render import paint_background, render_frame
from ..people.scene import ClipDescription, sample_clip
from ..people.streams import stream
from .letters import WRITINGS, lettered, written
from .patterns import PATTERNS, pattern
from .photographs import Album, resized

SIZE = 768
_RENDERED = 256  # pixels: faces of 180 px, enlarged with the picture
_SAMPLES = 2
_HOUSES = ("A house by the sea.", "A bowl of fruit on a table.", "Mountains at dawn.", "The sea, and no ship.")
_TEXTS = ("{}, with the text SALE.", "{}, and a text on the wall.", "{}. Text: closed on Sundays.")
KEPT, OR = "kept", " or "
Put = Callable[[str, str, np.ndarray | bytes, str | None], None]
"""Writes an item: what it is, the rule that should drop it or KEPT, the picture, the caption."""


def photo(person: Person, number: int, yaw: float | None = None) -> tuple[np.ndarray, str]:
    """(768, 768, 3) uint8 RGB of a person, another one for each number, and its caption."""
    clip = sample_clip(person.traits.seed, number, size=_RENDERED)
    turned = tuple(float(np.clip(angle, -25, 25)) for angle in clip.yaw) if yaw is None else (yaw, yaw)
    return resized(_frame(person, dataclasses.replace(clip, yaw=turned)), SIZE, SIZE), caption(clip).replace(" img", "")


def _frame(person: Person, clip: ClipDescription) -> np.ndarray:
    return render_frame(person, clip, 0.5, paint_background(clip, clip.size * _SAMPLES), _SAMPLES)


def wall(seed: int, number: int, size: int = SIZE) -> np.ndarray:
    """(size, size, 3) uint8: furniture, of rectangles and circles, before a wall, and nobody."""
    generator = stream("corpus wall", seed, number)
    picture = np.full((size, size, 3), generator.integers(60, 200, 3), np.uint8)
    for _ in range(12):
        x, y, width, height = (int(value) for value in generator.integers(0, size, 4))
        colour = tuple(int(value) for value in generator.integers(0, 255, 3))
        cv2.rectangle(picture, (x, y), (x + width // 2, y + height // 2), colour, -1)
    return picture


def far(picture: np.ndarray, scene: np.ndarray, side: int) -> np.ndarray:
    """A picture in the middle of a larger one."""
    scene, start = scene.copy(), (len(scene) - side) // 2
    scene[start : start + side, start : start + side] = resized(picture, side, side)
    return scene


def blurred(picture: np.ndarray, radius: float) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(radius)))


def jpeg(picture: np.ndarray | Image.Image, quality: int = 92) -> bytes:
    file = io.BytesIO()
    (Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture).save(file, "JPEG", quality=quality)
    return file.getvalue()


def _put_near(put: Put, picture: np.ndarray, text: str, generator: np.random.Generator) -> None:
    """A picture as other sites show it: smaller, compressed, in other colours, less of its edges."""
    image, edge = Image.fromarray(picture), int(generator.integers(2, 6))
    put("smaller", "near duplicate", resized(picture, *[int(generator.integers(720, 760))] * 2), text)
    put("compressed", "near duplicate", jpeg(image, int(generator.integers(25, 60))), text)
    toned = ImageEnhance.Color(ImageEnhance.Brightness(image).enhance(generator.uniform(0.9, 1.1)))
    put("toned", "near duplicate", jpeg(toned.enhance(generator.uniform(0, 1.3))), text)
    put("cut", "near duplicate", picture[edge : SIZE - edge, edge : SIZE - edge], text)


def _put_common(
    put: Put, seed: int, first: tuple[np.ndarray, str], second: np.ndarray, other: np.ndarray, scene: np.ndarray
) -> None:
    """The faults that all photos have. second: of the same person. other: of whoever stands beside them."""
    (picture, text), generator = first, stream("corpus faults", seed)
    whole = jpeg(picture)
    put("good", KEPT, whole, text)
    put("exact", "duplicate", whole, text)
    _put_near(put, picture, text, generator)
    put("blank", "face", np.full((SIZE, SIZE, 3), generator.integers(0, 256, 3), np.uint8), text)
    put("nobody", "face", scene, text)
    put("corrupt", "unreadable", whole[: int(len(whole) * generator.uniform(0, 0.9))], text)
    put("tiny", "lines", resized(second, *[int(generator.integers(300, 720))] * 2), text)
    put("two", "faces", np.concatenate([second, other], axis=1), text)
    # The detector's scores of heads that lie are .56 to .81, on both sides of the least that is a face.
    put("lying", "roll" + OR + "face", np.asarray(Image.fromarray(second).rotate(generator.choice([-62, 62]))), text)
    for what in WRITINGS:
        put(what, "text", lettered(second, written(what, seed)), text)
    put("text", "caption", second, _TEXTS[seed % len(_TEXTS)].format(text[:-1]))
    put("house", "caption", second, _HOUSES[seed % len(_HOUSES)])
    put("silent", "caption", second, None)


def _writer(folder: Path, seed: int, truth: dict[str, str]) -> Put:
    """Copies go into another source, which comes later."""
    for source, licence in (("one", "MIT"), ("other", "CC-BY-4.0")):
        (folder / source).mkdir(parents=True, exist_ok=True)
        said = {"source": f"the {source} collection", "licence": licence}
        (folder / source / "source.json").write_text(json.dumps(said))

    def put(what: str, rule: str, content: np.ndarray | bytes, text: str | None) -> None:
        path = folder / ("other" if rule.endswith("duplicate") else "one") / f"{seed:05d}-{what}.jpg"
        path.write_bytes(content if isinstance(content, bytes) else jpeg(content))
        if text is not None:
            path.with_suffix(".txt").write_text(text)
        truth[path.name] = rule

    return put


def plant_pictures(folder: Path, seed: int, album: Album | None) -> dict[str, str]:
    """Write a set of photos of a rendered person into a folder, two sources beside each other; what should become of
    each file: KEPT, or the rule that should drop it."""
    truth: dict[str, str] = {}
    person, generator, put = Person.from_seed(seed), stream("corpus rendered", seed), _writer(folder, seed, truth)
    first, (second, text) = photo(person, 0), photo(person, 1)
    _put_common(put, seed, first, second, first[0][:, ::-1], wall(seed, 0))
    put("behind", "face", *photo(person, 4, 150.0))
    put("blurred", "sharpness", blurred(second, SIZE / generator.uniform(30, 60)), text)
    put("far", "face size", far(second, wall(seed, 1, 1200), int(generator.integers(80, 130))), text)
    # Between these the threshold, 60, is within the error of the estimate. A profile may be found as no face at all.
    put("turned", KEPT, *photo(person, 2, _either_side(generator, 30, 40)))
    what = PATTERNS[seed % len(PATTERNS)]
    put(what, KEPT, far(photo(person, 5)[0], pattern(what, seed, SIZE), SIZE * 3 // 4), text)
    put("profile", "yaw" + OR + "face", *photo(person, 3, _either_side(generator, 75, 90)))
    return truth


def _either_side(generator: np.random.Generator, least: float, most: float) -> float:
    return float(generator.choice([-1, 1]) * generator.uniform(least, most))


def plant_photographs(folder: Path, seed: int, album: Album | None) -> dict[str, str]:
    """`plant_pictures`, put together from photographs, for each seed other ones."""
    assert album is not None
    truth: dict[str, str] = {}
    put, numbers = _writer(folder, seed, truth), iter(range(8 * seed, 8 * seed + 8))
    first, (second, text), (other, _) = (album.photo(next(numbers), SIZE) for _ in range(3))
    _put_common(put, seed, first, second, other, album.scene(seed, SIZE))
    put("blurred", "sharpness", album.photo(next(numbers), SIZE, blur=1 / 110)[0], text)
    put("far", "face size", album.photo(seed, 1200, share=(0.14, 0.18))[0], text)
    for what in PATTERNS:
        put(what, KEPT, *album.photo(next(numbers), SIZE, scene=pattern(what, seed, SIZE)))
    return truth

