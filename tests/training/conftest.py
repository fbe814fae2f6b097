"""Real portraits, and the faces that insightface finds in them."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mm_core.faces.analysis import Face, FaceAnalyzer, select_face
from mm_core.picture_file import read_image

sys.path.insert(0, str(Path(__file__).parent))


@dataclass(frozen=True)
class Portrait:
    """A photograph and its largest face, as insightface sees it."""

    image: np.ndarray
    """(H, W, 3) uint8 RGB."""
    face: Face

    @property
    def frame(self) -> Tensor:
        """(1, 3, H, W), 0..1."""
        return torch.from_numpy(self.image).permute(2, 0, 1)[None] / 255

    @property
    def landmarks(self) -> Tensor:
        """(1, 5, 2)."""
        return torch.from_numpy(self.face.landmarks)[None]

    @property
    def embedding(self) -> Tensor:
        """(1, 512), not normalised, by onnxruntime."""
        return torch.from_numpy(self.face.embedding)[None]


@pytest.fixture(scope="session")
def portraits(insightface_root: Path, photographs: Path) -> dict[str, Portrait]:
    """person_a_1, person_a_2, person_b_1, person_b_2, impostor_1, impostor_2."""
    analyzer = FaceAnalyzer(insightface_root, "buffalo_sc")
    images = {path.stem: read_image(path) for path in sorted(photographs.glob("*.jpg"))}
    assert len(images) == 6
    return {name: Portrait(image, select_face(analyzer.detect(image), "largest")) for name, image in images.items()}
