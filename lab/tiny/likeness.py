"""Likeness of drawn faces, which share much of their embeddings: what is left of them tells people apart."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mm_core.faces.arcface import align_faces


def centred_identity_loss(
    frames: Tensor, landmarks: Tensor, target: Tensor, recogniser: nn.Module, centre: Tensor
) -> Tensor:
    """`mm_core.training.losses.identity_loss` with the cosine taken from `centre`, (512,), the mean over people of
    embeddings of length 1: (B,)."""
    embedding = recogniser(align_faces(frames, landmarks))  # (B, 512)
    ours, theirs = (F.normalize(e, dim=-1) - centre.to(e) for e in (embedding, target.to(embedding)))
    return 1 - F.cosine_similarity(ours, theirs, dim=-1)
