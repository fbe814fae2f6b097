"""Picture files as arrays, whoever made them: upright, in 8 bits, without transparency, none too large."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import MagicMirrorError, reason
from .limits import PICTURE_BYTES, PIXELS

_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF")  # Pillow hands others, EPS, to programs

TRANSPARENT_BECOMES = (128, 128, 128, 255)  # colours under full transparency are leftovers; grey favours neither end


def read_image(path: str | Path) -> np.ndarray:
    """A picture file as (H, W, 3) uint8 RGB: turned as its EXIF says, 16 bits reduced to 8, transparency over grey.

    Raises MagicMirrorError if the file is missing, damaged, too large or no picture.
    """
    try:
        with Path(path).open("rb") as file:
            return decode_image(file, str(path))
    except OSError as error:
        raise _unreadable(str(path), error) from error


def decode_image(file: BinaryIO, name: str) -> np.ndarray:
    """`read_image` of an open file. name: of the photo, for messages."""
    try:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        if size > PICTURE_BYTES:
            raise MagicMirrorError(
                f"The photo {name} has {size} bytes, more than {PICTURE_BYTES}. Save it as a smaller JPEG file"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is ours
            with Image.open(file, formats=_readable()) as picture:
                check_pixels(f"The photo {name}", picture.height, picture.width)
                return np.array(_to_rgb(ImageOps.exif_transpose(picture)))
    except Image.DecompressionBombError as error:
        raise MagicMirrorError(
            f"The photo {name} has more than the {PIXELS // 1_000_000} megapixels that are read. Make it smaller"
        ) from error
    except MagicMirrorError:
        raise
    except Exception as error:  # Pillow's readers raise a dozen kinds
        raise _unreadable(name, error) from error


def _unreadable(name: str, error: Exception) -> MagicMirrorError:
    # Pillow's own text, as for a phone's HEIC, names an object of Python.
    why = "it is no picture of a kind that is read here" if isinstance(error, UnidentifiedImageError) else reason(error)
    return MagicMirrorError(f"Cannot read the photo {name}: {why}. Use a JPEG, PNG or WebP file")


def check_pixels(name: str, height: int, width: int) -> None:
    """Raise MagicMirrorError for a picture without pixels, or with more than are read."""
    if height * width == 0:
        raise MagicMirrorError(f"{name} is {width} x {height} px: it has no pixels. Use another photo")
    if height * width > PIXELS:
        raise MagicMirrorError(
            f"{name} is {width} x {height} px, more than the {PIXELS // 1_000_000} megapixels that are read. Make it "
            "smaller, or crop it nearer to the person"
        )


def over_grey(image: Image.Image) -> Image.Image:
    """An RGBA picture on grey, as RGB."""
    return Image.alpha_composite(Image.new("RGBA", image.size, TRANSPARENT_BECOMES), image).convert("RGB")


def _readable() -> list[str]:
    """Of _FORMATS, those that this Pillow reads."""
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion clips at 255
        image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = over_grey(image.convert("RGBA"))
    return image.convert("RGB")
