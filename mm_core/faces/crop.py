"""Square pictures for the image encoder, (size, size, 3) uint8; its normalisation happens where it is run."""

import math

import numpy as np
from PIL import Image, ImageFilter

_SMOOTH = 16  # of 224 px: the deviation of the blur outside the picture
_LONGEST = 16  # times the shorter side: what a panorama has beyond is cut off before it is enlarged
_LARGE = 4096  # pixels: the side of a square that is first reduced by whole pixels, for memory's sake


def square_crop(image: np.ndarray, box: np.ndarray, *, scale: float = 2.0, size: int = 224) -> np.ndarray:
    """A square around a face, resized with antialiasing.

    image: (H, W, 3) uint8. box: (4,) x0 y0 x1 y1 in pixels, fractions allowed.
    The square shares the box's centre, its side is `scale` times the larger side of the box; where it leaves the
    picture the picture's edge pixels are repeated and blurred, so that they make no streaks. Returns (size, size, 3)
    uint8.
    """
    x0, y0, x1, y1 = (float(value) for value in box)
    side = scale * max(x1 - x0, y1 - y0)
    left, top = (x0 + x1 - side) / 2, (y0 + y1 - side) / 2
    if side > _LARGE:
        factor = int(side / _LARGE) + 1
        reduced = np.asarray(Image.fromarray(image).reduce(factor))
        return square_crop(reduced, np.asarray(box) / factor, scale=scale, size=size)
    columns = np.arange(math.floor(left), math.ceil(left + side) + 1)
    rows = np.arange(math.floor(top), math.ceil(top + side) + 1)
    height, width = image.shape[:2]
    region = image[rows.clip(0, height - 1)[:, None], columns.clip(0, width - 1)]  # clipping repeats the edges
    edge_left, edge_top = left - columns[0], top - rows[0]
    square = (edge_left, edge_top, edge_left + side, edge_top + side)
    crop = Image.fromarray(region).resize((size, size), Image.Resampling.BICUBIC, box=square)
    # Pixels of the crop whose centres lie in the picture stay as they are.
    inside_x, inside_y = (
        ((at := start + (np.arange(size) + 0.5) * side / size) > 0) & (at < end)
        for start, end in ((left, width), (top, height))
    )
    inside = inside_y[:, None] & inside_x
    if inside.all():
        return np.array(crop)
    smooth = crop.filter(ImageFilter.GaussianBlur(_SMOOTH * size / 224))
    return np.where(inside[..., None], np.array(crop), np.array(smooth))


def whole_image(image: np.ndarray, size: int = 224) -> np.ndarray:
    """CLIP's own preprocessing of (H, W, 3) uint8: shorter side to `size`, then the centre. (size, size, 3) uint8."""
    shorter = min(image.shape[:2])
    height, width = (min(side, _LONGEST * shorter) for side in image.shape[:2])
    top, left = ((side - kept) // 2 for side, kept in zip(image.shape[:2], (height, width)))
    image = image[top : top + height, left : left + width]
    width, height = size * width // shorter, size * height // shorter
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.array(resized.crop((left, top, left + size, top + size)))
