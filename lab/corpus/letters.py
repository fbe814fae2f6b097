"""What is written on pictures: other words, letters, places and colours for each picture, all of them easy to see."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..people.streams import stream

# Beside Pillow's own, what matplotlib brings. Of the letters that PP-OCR knows none has others than Latin ones.
_FONTS = (None, "DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSansMono-Bold", "STIXGeneral", "cmss10")
_ACCENTED = _FONTS[1:6]
_SAID = {
    "stamp": ("stock.example", "© J. Moreau", "2024-06-17 08:45", "PHOTO 00481", "www.photos.example", "@lena.rides"),
    "subtitle": (
        *("I never said that.", "Wait for me at seven!", "Où est le château ?", "Das hätte ich nie gedacht."),
        *("It was 1984.", "- And now? - Nothing.", "[door slams]"),
    ),
    "watermark": ("SAMPLE", "PREVIEW", "stock.example", "COPYRIGHT", "DRAFT 2024", "Studio Nord", "123456"),
}
WRITINGS = tuple(_SAID)
_WHITE, _YELLOW, _BLACK, _RED = (255, 255, 255), (255, 225, 60), (0, 0, 0), (200, 0, 0)


@dataclass(frozen=True, kw_only=True)
class Letters:
    """text. size: of a line, in parts of the picture's height. at: the middle of the text, in parts of width and
    height. strength: 0..1, how opaque it is. font: a file of matplotlib's, or Pillow's own. fill, rim: colours.
    turned: degrees, counterclockwise."""

    text: str
    size: float
    at: tuple[float, float]
    strength: float = 1.0
    font: str | None = None
    fill: tuple[int, int, int] = _WHITE
    rim: tuple[int, int, int] = _BLACK
    turned: float = 0.0


def written(what: str, seed: int) -> Letters:
    """What one of `WRITINGS` says on the picture of a person; it covers 0.5 percent of a picture at least."""
    generator = stream(f"corpus {what}", seed)
    text = str(generator.choice(_SAID[what]))
    look = dict(text=text, font=generator.choice(_FONTS if text.isascii() else _ACCENTED))
    if what == "subtitle":
        size, fill = 1 / generator.uniform(16, 22), (_WHITE, _YELLOW)[generator.integers(2)]
        return Letters(size=size, at=(0.5, generator.uniform(0.88, 0.94)), fill=fill, **look)
    if what == "stamp":
        size, strength = 1 / generator.uniform(20, 30), generator.uniform(0.8, 1)
        at = (generator.uniform(0.2, 0.8), (0.04, 0.96)[generator.integers(2)])
        fill, rim = ((_WHITE, _BLACK), (_RED, _WHITE), (_BLACK, _WHITE))[generator.integers(3)]
        return Letters(size=size, at=at, strength=strength, fill=fill, rim=rim, **look)
    size, turned = 1 / generator.uniform(5, 10), (0.0, generator.uniform(-30, 30))[generator.integers(2)]
    at = (0.5, generator.uniform(0.3, 0.7))
    fill, rim = ((_WHITE, _BLACK), (_BLACK, _WHITE))[generator.integers(2)]
    strength = generator.uniform(0.35, 0.6)
    return Letters(size=size, at=at, strength=strength, fill=fill, rim=rim, turned=turned, **look)


def lettered(picture: np.ndarray, letters: Letters) -> np.ndarray:
    """(H, W, 3) uint8 RGB: a picture with a line of rimmed letters, made smaller where it does not fit."""
    height, width = picture.shape[:2]
    layer = Image.new("RGBA", (width, height))
    draw, alpha = ImageDraw.Draw(layer), round(255 * letters.strength)
    size = letters.size * height
    size *= min(1, 0.9 * width / _font(letters.font, size).getlength(letters.text))
    place = (letters.at[0] * width, letters.at[1] * height)
    style = dict(font=_font(letters.font, size), anchor="mm", stroke_width=round(size / 16))
    draw.text(place, letters.text, fill=(*letters.fill, alpha), stroke_fill=(*letters.rim, alpha), **style)
    layer = layer.rotate(letters.turned, Image.Resampling.BICUBIC, center=place)
    return np.asarray(Image.alpha_composite(Image.fromarray(picture).convert("RGBA"), layer).convert("RGB"))


def _font(name: str | None, size: float) -> ImageFont.FreeTypeFont:
    from matplotlib import get_data_path

    if name is None:
        return ImageFont.load_default(size)
    return ImageFont.truetype(Path(get_data_path(), "fonts", "ttf", f"{name}.ttf"), size)
