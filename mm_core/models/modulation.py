"""Modulation factors: Conditioned Adaptive Normalization and those of the face stream (paper Sec. 3.3, Eq. 6 and 7).

A stream is modulated twice in a block, before attention and before the feed-forward, with a shift, a scale and a gate
each. The factors depend on the timestep, the layer and the identity only, never on the latents.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Modulation(NamedTuple):
    """Factors of one stream for one half of a block, each (B, D)."""

    shift: Tensor
    scale: Tensor
    gate: Tensor

    def __call__(self, normed: Tensor) -> Tensor:
        """Scaled and shifted: (B, S, D), normalised, to the same."""
        return normed * (1 + self.scale)[:, None] + self.shift[:, None]

    def residual(self, hidden_states: Tensor, update: Tensor) -> Tensor:
        """`h + gate * F(...)`."""
        return hidden_states + self.gate[:, None] * update

    def plus(self, delta: Tensor) -> Modulation:
        """Add (B, 3, D) residual factors (Eq. 7)."""
        return Modulation(self.shift + delta[:, 0], self.scale + delta[:, 1], self.gate + delta[:, 2])


class BlockFactors(NamedTuple):
    """All that the adapter adds to one block's modulation, for n rows that carry an identity."""

    face: Tensor
    """(n, 6, D): shift1, scale1, gate1, shift2, scale2, gate2 of the face stream."""
    can: Tensor
    """(n, 12, D): CAN's residuals, the same six for video, then for text."""


class FaceModulation(nn.Module):
    """`phi_face(t, l)` (Eq. 6): the face stream's factors."""

    def __init__(self, time_dim: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(time_dim, time_dim)
        self.linear_2 = nn.Linear(time_dim, 6 * dim)

    def forward(self, temb: Tensor) -> Tensor:
        """(B, Dt) -> (B, 6, D)."""
        return self.linear_2(F.silu(self.linear_1(F.silu(temb)))).unflatten(-1, (6, -1))


class ConditionedModulation(nn.Module):
    """`phi_cond` of CAN (Eq. 7): residuals on the factors that the frozen block predicts for video and text.

    Residuals, not factors: predicting the factors themselves fails to train, the paper reports.
    """

    def __init__(self, id_dim: int, time_dim: int, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(id_dim + time_dim + dim, hidden_dim)
        self.linear_2 = nn.Linear(hidden_dim, 12 * dim)

    def forward(self, id_embedding: Tensor, temb: Tensor, video_shift: Tensor) -> Tensor:
        """(B, c1) projected ID, (B, Dt) time embedding, (B, D) shift of the frozen block to (B, 12, D)."""
        # video_shift: mu1_vid
        condition = torch.cat([id_embedding, F.silu(temb), video_shift], dim=-1)
        return self.linear_2(F.silu(self.linear_1(condition))).unflatten(-1, (12, -1))
