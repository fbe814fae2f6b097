"""What the pack writes, each as a function that makes a writer: for processes that are killed while they write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save, save_file

from mm_core.files import Numbered, atomic_write, write_json

Writer = Callable[[Path], object]


def _frames() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (9, 128, 128, 3), dtype=np.uint8)


def clip() -> Writer:
    from mm_core.video import write_video

    frames = _frames()
    return lambda folder: write_video(Numbered(folder, "clip", ".mp4"), frames, 8)


def picture() -> Writer:
    from mm_core.video import write_video

    frames = _frames()
    return lambda folder: write_video(Numbered(folder, "picture", ".gif"), frames, 8, format="gif")


def webp() -> Writer:
    """In one piece, which a full disk cuts."""
    from mm_core.video import write_video

    frames = _frames()
    return lambda folder: write_video(Numbered(folder, "webp", ".webp"), frames, 8, format="webp")


def identity() -> Writer:
    from mm_core.faces.analysis import Face
    from mm_core.faces.references import PhotoReport, Reference
    from mm_core.models.id_encoder import FaceFeatures
    from mm_core.pipelines.identity import Identity
    from mm_core.pipelines.identity_file import save_identity

    numbers = dict.fromkeys(("score", "size", "yaw", "pitch", "roll", "sharpness"), 0.5)
    face = Face(box=np.zeros(4), landmarks=np.zeros((5, 2)), embedding=np.zeros(512), **numbers)
    report = PhotoReport(name="photo 1", faces_seen=1, similarity=None, warnings=(), **numbers)
    person = Identity(
        features=FaceFeatures(id_tokens=torch.rand(1, 2, 2048), structure_tokens=torch.rand(1, 257, 1024)),
        references=(Reference(face=face, crop=np.zeros((224, 224, 3), np.uint8), report=report),),
        encoder="ab" * 32,
        face_pack="buffalo_sc",
    )
    return lambda folder: save_identity(person, Numbered(folder, "person", ".safetensors"))


def latent() -> Writer:
    """As the sampler rescues one."""
    tensors = {"latent_tensor": torch.rand(1, 16, 13, 60, 90)}

    def write(folder: Path) -> None:
        with atomic_write(Numbered(folder, "latent", ".latent")) as temporary:
            temporary.write_bytes(save(tensors))

    return write


def weights() -> Writer:
    """As an adapter is written: by safetensors itself, which newer versions do under a name of their own first."""
    tensors = {"weight": torch.rand(1000, 1000)}

    def write(folder: Path) -> None:
        with atomic_write(folder / "adapter.safetensors") as temporary:
            save_file(tensors, temporary)

    return write


def json() -> Writer:
    content = {"values": [0.5] * 20_000}
    return lambda folder: write_json(folder / "settings.json", content)
