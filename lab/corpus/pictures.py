"""Rendered photos with faults, and what should become of each."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from ..people.captions import caption
from ..people.person import Person
from ..people.render import paint_background, render_frame
from ..people.scene import ClipDescription, sample_clip
from ..people.streams import stream

SIZE = 768
_RENDERED = 256  # pixels: faces of 180 px, enlarged with the picture
_SAMPLES = 2
KEPT = "kept"
LETTERS = [
    ("stamp", "text", "stock.example", 30, (0.84, 0.97), 0.8),
    ("subtitle", "text", "I never said that.", 20, (0.5, 0.93)),
    ("watermark", "text", "SAMPLE", 5, (0.5, 0.6), 0.35),
]
"""What is written on pictures, and what should become of them."""


def photo(person: Person, number: int, yaw: float | None = None) -> tuple[np.ndarray, str]:
    """(768, 768, 3) uint8 RGB of a person, another one for each number, and its caption."""
    clip = sample_clip(person.traits.seed, number, size=_RENDERED)
    limit = 25.0 if yaw is None else abs(yaw)
    clip = dataclasses.replace(
        clip, yaw=tuple(float(np.clip(angle, -limit, limit)) for angle in clip.yaw) if yaw is None else (yaw, yaw)
    )
    return enlarged(_frame(person, clip), SIZE), caption(clip).replace(" img", "")


def _frame(person: Person, clip: ClipDescription) -> np.ndarray:
    return render_frame(person, clip, 0.5, paint_background(clip, clip.size * _SAMPLES), _SAMPLES)


def enlarged(picture: np.ndarray, size: int) -> np.ndarray:
    return cv2.resize(picture, (size, size), interpolation=cv2.INTER_LANCZOS4)


def wall(seed: int, number: int, size: int = SIZE) -> np.ndarray:
    """(size, size, 3) uint8: furniture, of rectangles and circles, before a wall, and nobody."""
    generator = stream("corpus wall", seed, number)
    picture = np.full((size, size, 3), generator.integers(60, 200, 3), np.uint8)
    for _ in range(12):
        x, y, width, height = (int(value) for value in generator.integers(0, size, 4))
        colour = tuple(int(value) for value in generator.integers(0, 255, 3))
        cv2.rectangle(picture, (x, y), (x + width // 2, y + height // 2), colour, -1)
    return picture


def _jpeg(picture: np.ndarray, quality: int = 92) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=quality)
    return file.getvalue()


def _two(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.concatenate([one, other], axis=1)


def _small(picture: np.ndarray, seed: int, number: int) -> np.ndarray:
    """The same person far away: a face of some 55 px."""
    scene = wall(seed, number, 1200)
    side = 80
    scene[500 : 500 + side, 500 : 500 + side] = cv2.resize(picture, (side, side), interpolation=cv2.INTER_AREA)
    return scene


def _blurred(picture: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(SIZE / 40)))


def _again(picture: np.ndarray) -> np.ndarray:
    """A little smaller and brighter, as from another site."""
    smaller = cv2.resize(picture, (732, 732), interpolation=cv2.INTER_AREA)
    return (smaller.astype(np.float32) * 1.05).clip(0, 255).astype(np.uint8)


def lettered(picture: np.ndarray, text: str, size: float, at: tuple[float, float], strength: float = 1) -> np.ndarray:
    """A picture with a line of white, black-rimmed letters. size: in lines of the picture. at: the middle of the text,
    in parts of width and height. strength: 0..1, how opaque it is."""
    height, width = picture.shape[:2]
    over = Image.new("RGBA", (width, height))
    font, alpha = ImageFont.load_default(height / size), round(255 * strength)
    place = (at[0] * width, at[1] * height)
    style = dict(font=font, anchor="mm", fill=(255, 255, 255, alpha), stroke_fill=(0, 0, 0, alpha))
    ImageDraw.Draw(over).text(place, text, stroke_width=round(height / size / 16), **style)
    return np.asarray(Image.alpha_composite(Image.fromarray(picture).convert("RGBA"), over).convert("RGB"))


def plant_pictures(folder: Path, people: range) -> dict[str, str]:
    """Write a set of photos of each person into a folder, two sources beside each other; what should become of each
    file: KEPT, or the rule that should drop it; or another one, since a profile may not be found as a face."""
    truth: dict[str, str] = {}
    for source in ("one", "other"):
        (folder / source).mkdir(parents=True, exist_ok=True)
        said = {"source": f"the {source} collection", "licence": "MIT" if source == "one" else "CC-BY-4.0"}
        (folder / source / "source.json").write_text(json.dumps(said))
    for seed in people:
        person, numbers = Person.from_seed(seed), iter(range(1000))

        def put(
            what: str, rule: str, content: np.ndarray | bytes, text: str | None, at: str = "one", seed: int = seed
        ) -> None:
            path = folder / at / f"{seed:05d}-{what}.jpg"
            path.write_bytes(content if isinstance(content, bytes) else _jpeg(content))
            if text is not None:
                path.with_suffix(".txt").write_text(text)
            truth[path.name] = rule

        def fresh(yaw: float | None = None, person: Person = person) -> tuple[np.ndarray, str]:
            return photo(person, next(numbers), yaw)  # noqa: B023, used before the next person

        first, text = fresh()
        put("good", KEPT, first, text)
        put("exact", "duplicate", _jpeg(first), text, "other")
        put("near", "near duplicate", _again(first), text, "other")
        put("turned", KEPT, *fresh(35.0))
        put("profile", "yaw or face", *fresh(80.0))
        put("blank", "face", np.full((SIZE, SIZE, 3), 40 + seed % 150, np.uint8), text)
        put("nobody", "face", wall(seed, 0), text)
        put("corrupt", "unreadable", _jpeg(first)[:3000], text)
        put("tiny", "lines", enlarged(fresh()[0], 300), text)
        put("two", "faces", _two(fresh()[0], fresh()[0]), text)
        put("far", "face size", _small(first, seed, 1), text)
        put("blurred", "sharpness", _blurred(fresh()[0]), text)
        put("text", "caption", fresh()[0], f"{text[:-1]}, with the text SALE.")
        for what, rule, *letters in LETTERS:
            put(what, rule, lettered(first, *letters), text)
        put("house", "caption", fresh()[0], "A house by the sea.")
        put("silent", "caption", fresh()[0], None)
    return truth
