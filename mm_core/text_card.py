"""Text as a picture: all versions of ComfyUI's page draw a node's pictures, the newest no text that it returns."""

from __future__ import annotations

import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

WIDTH, MARGIN, SIZE = 720, 18, 22  # pixels
COLUMNS = 62  # characters in a line
INK, PAPER = "#e6e6e6", "#262626"


def text_card(text: str) -> np.ndarray:
    """(H, 720, 3) uint8 RGB: the text, wrapped, as high as it takes."""
    wrapped = (textwrap.wrap(line, COLUMNS, subsequent_indent="  ") or [""] for line in text.splitlines())
    lines = [part for line in wrapped for part in line]
    spacing = round(SIZE * 1.35)
    card = Image.new("RGB", (WIDTH, 2 * MARGIN + spacing * max(1, len(lines))), PAPER)
    pen, font = ImageDraw.Draw(card), ImageFont.load_default(SIZE)
    for number, line in enumerate(lines):
        pen.text((MARGIN, MARGIN + number * spacing), line, INK, font)
    return np.array(card)
