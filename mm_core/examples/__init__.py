"""Two rendered people who come with the pack: two photos each, and what tiny's ID encoder sees in them.

No training has seen them; scripts/make_examples.py drew them (lab/people/README.md).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from ..pipelines.identity import Identity

PEOPLE = ("woman", "man")
FOLDER = Path(__file__).resolve().parent


def example_photos(person: str) -> np.ndarray:
    """(2, 384, 384, 3) uint8 RGB: one of PEOPLE, neutral and smiling."""
    paths = sorted(FOLDER.glob(f"{person}_*.jpg"))
    return np.stack([np.array(Image.open(path, formats=["PNG", "JPEG", "WEBP"]).convert("RGB")) for path in paths])


def example_identity(person: str) -> Identity:
    """One of PEOPLE, encoded for tiny. Needs no face models. Raises CheckpointError for a damaged installation."""
    from ..checkpoints.photomaker import read_fingerprint
    from ..pipelines.base import TinyBase
    from ..pipelines.identity_file import load_identity

    return load_identity(FOLDER / f"{person}.safetensors", encoder=read_fingerprint(TinyBase().id_encoder))
