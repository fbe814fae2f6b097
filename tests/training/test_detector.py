"""The differentiable detector against insightface's own, on real portraits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from mm_core.errors import CheckpointError
from mm_core.faces.analysis import FaceAnalyzer
from mm_core.training.detector import DifferentiableDetector
from mm_core.training.losses import pose_loss

SIDE = 640  # pixels: what insightface scales pictures to before it detects
LARGEST_ERROR = 0.1  # of the distance between the eyes, where it scales the picture otherwise than we


@pytest.fixture(scope="module")
def detector(recogniser_file: Path) -> DifferentiableDetector:
    return DifferentiableDetector(recogniser_file.with_name("scrfd_500m_bnkps.onnx"))


def eye_distance(landmarks: Tensor) -> Tensor:
    return (landmarks[..., 1, :] - landmarks[..., 0, :]).norm(dim=-1)


def test_landmarks_are_insightfaces(detector, portraits, insightface_root: Path) -> None:
    """Of pictures that neither scales. Its landmarks are the best guess's, ours the mean of the good ones'."""
    analyzer = FaceAnalyzer(insightface_root, "buffalo_sc")
    for portrait in portraits.values():
        picture = np.asarray(ImageOps.pad(Image.fromarray(portrait.image), (SIDE, SIDE)))
        (face, *_) = sorted(analyzer.detect(picture, recognise=False), key=lambda face: -face.size)
        landmarks = torch.from_numpy(face.landmarks)[None]
        frame = torch.from_numpy(picture).permute(2, 0, 1)[None] / 255
        off = (detector(frame, landmarks) - landmarks).norm(dim=-1)
        assert off.max() < 0.03 * eye_distance(landmarks)


def test_landmarks_of_pictures_of_any_size_are_insightfaces(detector, portraits) -> None:
    for portrait in portraits.values():
        off = (detector(portrait.frame, portrait.landmarks) - portrait.landmarks).norm(dim=-1)
        assert off.max() < LARGEST_ERROR * eye_distance(portrait.landmarks)


def test_small_frames_are_enlarged_and_large_ones_shrunk(detector, portraits) -> None:
    portrait = portraits["person_a_1"]
    for size in (64, 1500):
        scale = size / min(portrait.image.shape[:2])
        frame = F.interpolate(portrait.frame, scale_factor=scale, mode="bicubic", antialias=True)
        landmarks = (portrait.landmarks + 0.5) * scale - 0.5
        off = (detector(frame, landmarks) - landmarks).norm(dim=-1)
        assert off.max() < LARGEST_ERROR * eye_distance(landmarks)


def test_of_two_people_the_one_nearby_is_meant(detector, portraits) -> None:
    left, right = (portraits[name] for name in ("person_a_1", "person_b_1"))
    height = max(left.frame.shape[-2], right.frame.shape[-2])
    frame = torch.cat([F.pad(p.frame, (0, 0, 0, height - p.frame.shape[-2])) for p in (left, right)], dim=-1)
    shifted = right.landmarks + torch.tensor([left.frame.shape[-1], 0])
    for landmarks in (left.landmarks, shifted):
        off = (detector(frame, landmarks) - landmarks).norm(dim=-1)
        assert off.max() < LARGEST_ERROR * eye_distance(landmarks)


def test_gradient_is_the_slope(detector, portraits) -> None:
    portrait = portraits["person_b_2"]
    frame = F.interpolate(portrait.frame, size=(192, 192), mode="area").requires_grad_()
    scale = torch.tensor([192 / portrait.frame.shape[-1], 192 / portrait.frame.shape[-2]])
    landmarks = (portrait.landmarks + 0.5) * scale - 0.5
    wanted = landmarks * torch.tensor([1.0, 1.1])

    def loss(pixels: Tensor) -> Tensor:
        return pose_loss(detector(pixels, landmarks), wanted).sum()

    (gradient,) = torch.autograd.grad(loss(frame), frame)
    direction = gradient / gradient.norm()
    with torch.no_grad():
        slope = (loss(frame + 0.01 * direction) - loss(frame - 0.01 * direction)) / 0.02
    assert float(slope) == pytest.approx(float(gradient.norm()), rel=0.05)


def test_a_batch_is_its_frames_one_by_one(detector, portraits) -> None:
    frames = torch.cat([F.interpolate(portraits[n].frame, size=(224, 224)) for n in ("person_a_1", "impostor_1")])
    near = torch.tensor([[[80.0, 90], [140, 90], [110, 120], [90, 150], [130, 150]]]).expand(2, -1, -1)
    together = detector(frames, near)
    torch.testing.assert_close(together, torch.cat([detector(f[None], n[None]) for f, n in zip(frames, near)]))


def test_a_recogniser_is_refused(recogniser_file: Path) -> None:
    with pytest.raises(CheckpointError, match="is no face detector"):
        DifferentiableDetector(recogniser_file)
