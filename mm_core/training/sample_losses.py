"""The parts that a step's loss is made of: the paper's two, and what any other needs to be (Sec. 3.4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX
from torch import Tensor, nn

from ..faces.analysis import FaceAnalyzer
from ..faces.tracking import find_faces, follow
from .diffusion import predict_clean
from .losses import identity_loss, noise_loss

BEHIND = 2
"""Latent frames that a judged one is decoded behind: with one, eight pictures are computed, with two nine."""


@dataclass(kw_only=True, eq=False)
class Pass:
    """What the model said of a batch (see `AdapterTraining.forward`)."""

    batch: Mapping[str, Tensor]
    prediction: Tensor
    """v, (B, F, C, H, W); of clips that the model samples, the guided one."""
    negative: Tensor | None = None
    """v of the empty prompt without an identity, for clips that the model samples."""

    @cached_property
    def clean(self) -> Tensor:
        """x0, (B, F, C, H, W), as the prediction means it."""
        return predict_clean(self.prediction, self.batch["noisy"], self.batch["alpha_bar"])


class SampleLoss(Protocol):
    """A part of the loss, of each sample by itself."""

    name: str
    """What it is logged as, without its weight."""
    weight: float

    def __call__(self, passed: Pass) -> tuple[Tensor, Tensor]:
        """The rows of the batch that it acts on, (k,), and its values there, (k,) float32 with gradients."""


class NoiseLoss:
    """`L_noise`: of the whole frame, or of the face's area where the batch's `face_mask` says so."""

    name, weight = "noise_loss", 1.0

    def __call__(self, passed: Pass) -> tuple[Tensor, Tensor]:
        batch = passed.batch
        mask = batch.get("face_mask")
        values = noise_loss(passed.prediction, batch["clean"], batch["noise"], batch["alpha_bar"], mask)
        return torch.arange(len(values), device=values.device), values


class IdentityLoss:
    """`1 - cos`, through x0, one frame of it, the VAE's decoder and ArcFace.

    detector: finds the landmarks, in clips that the model samples itself; frames without a face are passed over. None:
    the batch has them, those of the training clip. first: latent frame of a clip; those before pad it.
    """

    name = "identity_loss"

    def __init__(
        self,
        weight: float,
        vae: AutoencoderKLCogVideoX,
        recogniser: nn.Module,
        detector: FaceAnalyzer | None = None,
        first: int = 0,
    ) -> None:
        self.weight, self.vae, self.recogniser = weight, vae, recogniser
        self.detector, self.first = detector, first

    def __call__(self, passed: Pass) -> tuple[Tensor, Tensor]:
        """Of the samples in `judged`."""
        rows, batch = passed.batch["judged"], passed.batch
        if not len(rows):
            return rows, passed.prediction.new_zeros(0, dtype=torch.float32)
        # No part of the trained model, they do not follow it; and validation lends the VAE elsewhere.
        self.vae.to(rows.device), self.recogniser.to(rows.device)
        # The VAE is of the run's precision by itself, as at inference; autocast's norms in float32 would take twice the
        # memory.
        with torch.autocast(rows.device.type, enabled=False):
            frames = self.frames(passed.clean[rows], batch["judged_frame"])
        landmarks, found = batch["landmarks"], torch.arange(len(rows), device=rows.device)
        if self.detector is not None:
            landmarks, found = self._landmarks(frames.detach())
        if not len(found):
            return rows[found], frames.new_zeros(0)
        return rows[found], self.compare(frames[found], landmarks, batch["target"][found], batch["row"][rows[found]])

    def frames(self, clean: Tensor, judged: Tensor) -> Tensor:
        """(m, 3, 8H, 8W) RGB of a latent frame, (m,), of each of the clips, (m, F, C, H, W)."""
        pictures, order = [], []
        before = (judged - self.first).clamp(0, BEHIND)
        for behind in range(BEHIND + 1):
            rows = (before == behind).nonzero()[:, 0]
            if len(rows):
                window = [clean[rows, judged[rows] - back] for back in range(behind, -1, -1)]
                pictures.append(decode_frame(self.vae, torch.stack(window, dim=1)))
                order.append(rows)
        return torch.cat(pictures)[torch.cat(order).argsort()]

    def compare(self, frames: Tensor, landmarks: Tensor, target: Tensor, samples: Tensor) -> Tensor:
        """(k,), of frames with a face, the landmarks in them, raw ArcFace of the reference; samples: the features'."""
        return identity_loss(frames, landmarks, target, self.recogniser)

    def _landmarks(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """(k, 5, 2) px, and the numbers of the frames that they are in, (k,)."""
        pictures = (frames.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        faces = [follow(find_faces(self.detector, picture, recognise=False), None) for picture in pictures]
        found = [number for number, face in enumerate(faces) if face is not None]
        landmarks = np.array([faces[number].landmarks for number in found], np.float32).reshape(-1, 5, 2)
        return torch.from_numpy(landmarks).to(frames), torch.tensor(found, device=frames.device, dtype=torch.long)


def decode_frame(vae: AutoencoderKLCogVideoX, latents: Tensor) -> Tensor:
    """The last picture of latent frames that follow each other, (m, F, C, H, W), as RGB, (m, 3, 8H, 8W), about 0 to 1.

    A clip's first latent frame is a picture by itself. Another one behind two others is nearly what the decoder of the
    whole clip, with all of its activations, makes of it; by itself it is another face (docs/training.md).
    Nothing is clamped, which would leave no gradient outside of 0 to 1.
    """
    latents = (latents / vae.config.scaling_factor).to(vae.dtype).transpose(1, 2)
    return vae.decode(latents).sample[:, :, -1].float() / 2 + 0.5
