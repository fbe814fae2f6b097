"""The two parts of the training loss: that of the noise, and that of the identity (paper, Sec. 3.4).

    L = L_noise + lambda * (1 - cos(q_face, ArcFace(D(x0))))

Each is returned for each sample, so that the loop can log and average them. They are computed in float32 at least: at
the lowest noise levels bfloat16 cannot tell them from none, and would drop the noise altogether.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..faces.arcface import align_faces
from ..pipelines.presets import TEMPORAL_COMPRESSION
from .diffusion import at_least_float32, signal_and_deviation


def noise_loss(
    prediction: Tensor, clean: Tensor, noise: Tensor, alpha_bar: Tensor, face_mask: Tensor | None = None
) -> Tensor:
    """The loss that CogVideoX is fine-tuned with, averaged over each clip: (B,).

    It is the squared error of the clean latents by the share of noise. For a prediction of v the share cancels, so that
    the loss is the squared error of v. It is computed in that form, which is exact over the whole range: for pure noise
    the target is the latents with their sign turned, and without noise, where the weight is infinite, the noise.

    Args:
        prediction: (B, F, C, H, W), what the transformer says of the noisy latents, v.
        clean, noise: of the same shape.
        alpha_bar: (B,), 0 to 1, of the timestep of each sample.
        face_mask: (B, F, 1, H, W), 0 to 1: average over this area only. The paper does so for half of the samples; rows
            of ones leave a sample whole.
    """
    # 1 / (1 - alpha_bar) * (x0_predicted - x0)^2, and x0_predicted - x0 = sqrt(1 - alpha_bar) * (v - v_predicted).
    # At alpha_bar = 0 (zero terminal SNR) the target is -x0, at alpha_bar = 1 the noise.
    prediction, clean, noise = (at_least_float32(tensor) for tensor in (prediction, clean, noise))
    signal, deviation = signal_and_deviation(alpha_bar, clean)
    error = (prediction - (signal * noise - deviation * clean)).square()  # (B, F, C, H, W)
    if face_mask is None:
        return error.flatten(1).mean(dim=1)
    weight = face_mask.to(error).expand_as(error).flatten(1)
    area = weight.sum(dim=1)
    if not (area > 0).all():
        empty = (area <= 0).nonzero().flatten().tolist()
        raise ValueError(
            f"the face mask of sample(s) {empty} is empty: drop clips without a face beforehand, "
            "or pass ones to count the whole frame"
        )
    return (weight * error.flatten(1)).sum(dim=1) / area


def identity_loss(frames: Tensor, landmarks: Tensor, target_embedding: Tensor, recogniser: nn.Module) -> Tensor:
    """How unlike the reference person the faces in decoded frames are: (B,), from 0, the same, to 2 (paper, Sec. 3.4).

    Args:
        frames: (B, 3, H, W) RGB, 0 to 1, decoded from `predict_clean`. Gradients flow to them.
        landmarks: (B, 5, 2) in pixels, found in these frames; constants.
        target_embedding: (B, 512) or (512,), of the reference by the same recogniser; its length does not matter.
        recogniser: makes embeddings, (B, 512), of aligned faces, (B, 3, 112, 112), as that of this package does.
    """
    # 1 - cos(q_face, ArcFace(D(x0)))
    embedding = recogniser(align_faces(frames, landmarks))  # (B, 512)
    return 1 - F.cosine_similarity(embedding, target_embedding.to(embedding).expand_as(embedding), dim=-1)


def face_area(boxes: Tensor, height: int, width: int, cell: int = 8) -> Tensor:
    """The face's area at latent resolution, for `noise_loss`.

    Args:
        boxes: (B, T, 4), x0 y0 x1 y1 in pixels, one for each of `T = 4 k + 1` frames; may reach outside the picture. A
            box without area covers nothing: no face in that frame.
        height, width: of the latents.
        cell: pixels that a latent covers, along each side; 8 in the published VAE.

    Returns:
        (B, k + 1, 1, height, width) float32: 1 in each cell that a box touches in any of the frames the latent frame
        holds, 0 elsewhere.
    """
    frames = boxes.shape[1]
    if frames % TEMPORAL_COMPRESSION != 1:
        raise ValueError(f"face_area wants boxes for 4 k + 1 frames (1, 5, ..., 49), not {frames}")
    x0, y0, x1, y1 = boxes[..., None].unbind(dim=2)  # (B, T, 1) each
    across = _touched(x0, x1, width, cell)  # (B, T, width)
    down = _touched(y0, y1, height, cell)  # (B, T, height)
    covered = down[..., :, None] & across[..., None, :]  # (B, T, height, width)
    later = covered[:, 1:].unflatten(1, (-1, TEMPORAL_COMPRESSION)) if frames > 1 else covered[:, :0, None]
    return torch.cat([covered[:, :1], later.any(dim=2)], dim=1)[:, :, None].float()


def _touched(low: Tensor, high: Tensor, cells: int, cell: int) -> Tensor:
    """(B, T, 1) edges in pixels -> (B, T, cells), whether a cell overlaps the span between them."""
    start = torch.arange(cells, device=low.device) * cell
    return (high > low) & (low < start + cell) & (high > start)
