"""Square pictures for the image encoder, (size, size, 3) uint8; its normalisation happens where it is run."""

import math

import numpy as np
from PIL import Image


def square_crop(image: np.ndarray, box: np.ndarray, *, scale: float = 2.0, size: int = 224) -> np.ndarray:
    """A square around a face, resized with antialiasing.

    image: (H, W, 3) uint8. box: (4,) x0 y0 x1 y1 in pixels, fractions allowed.
    The square shares the box's centre, its side is `scale` times the larger side of the box; where it leaves the
    picture the picture's edge pixels are repeated. Returns (size, size, 3) uint8.
    """
    x0, y0, x1, y1 = (float(value) for value in box)
    side = scale * max(x1 - x0, y1 - y0)
    left, top = (x0 + x1 - side) / 2, (y0 + y1 - side) / 2
    columns = np.arange(math.floor(left), math.ceil(left + side) + 1)
    rows = np.arange(math.floor(top), math.ceil(top + side) + 1)
    height, width = image.shape[:2]
    region = image[rows.clip(0, height - 1)[:, None], columns.clip(0, width - 1)]  # clipping repeats the edges
    left, top = left - columns[0], top - rows[0]
    square = (left, top, left + side, top + side)
    return np.array(Image.fromarray(region).resize((size, size), Image.Resampling.BICUBIC, box=square))


def whole_image(image: np.ndarray, size: int = 224) -> np.ndarray:
    """CLIP's own preprocessing of (H, W, 3) uint8: shorter side to `size`, then the centre. (size, size, 3) uint8."""
    height, width = image.shape[:2]
    shorter = min(height, width)
    width, height = size * width // shorter, size * height // shorter
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.array(resized.crop((left, top, left + size, top + size)))
