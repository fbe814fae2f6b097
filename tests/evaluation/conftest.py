"""Real face models, real photographs, and clips made of them whose answers are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mm_core.evaluation.people import Person, load_person
from mm_core.faces.analysis import FaceAnalyzer
from mm_core.picture_file import read_image

PACK = "buffalo_sc"
HEIGHT = 320  # pixels of the clips made here
NAMES = ("person_a_1", "person_a_2", "person_b_1", "person_b_2", "impostor_1", "impostor_2")


@pytest.fixture(scope="session")
def analyzer(insightface_root: Path) -> FaceAnalyzer:
    return FaceAnalyzer(insightface_root, PACK, device="cpu")


@pytest.fixture(scope="session")
def photos(photographs: Path) -> dict[str, np.ndarray]:
    """Portraits, (HEIGHT, W, 3) uint8 RGB, all of one size."""
    width = round(HEIGHT * 0.78) // 2 * 2
    images = {name: Image.fromarray(read_image(photographs / f"{name}.jpg")) for name in NAMES}
    return {name: np.array(image.resize((width, HEIGHT), Image.Resampling.LANCZOS)) for name, image in images.items()}


@pytest.fixture(scope="session")
def person_a(analyzer: FaceAnalyzer, photographs: Path) -> Person:
    return load_person(analyzer, "person_a", [photographs / "person_a_1.jpg", photographs / "person_a_2.jpg"])


@pytest.fixture(scope="session")
def texture() -> np.ndarray:
    """(400, 500, 3) uint8: smooth noise, which flow can follow everywhere."""
    coarse = np.random.default_rng(0).integers(0, 256, (80, 100), dtype=np.uint8)
    grey = np.array(Image.fromarray(coarse).resize((500, 400), Image.Resampling.BICUBIC))
    return np.repeat(grey[..., None], 3, axis=2)
