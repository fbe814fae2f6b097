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

    def modulate(self, normed: Tensor) -> Tensor:
        """`x * (1 + scale) + shift`: (B, S, D), normalised, to the same, in one pass over the tokens."""
        return torch.addcmul(self.shift[:, None], normed, (1 + self.scale)[:, None])

    def residual(self, hidden_states: Tensor, update: Tensor) -> Tensor:
        """`h + gate * F(...)`, (B, S, D)."""
        return torch.addcmul(hidden_states, self.gate[:, None], update)


def halves(factors: Tensor) -> tuple[Modulation, Modulation]:
    """(B, 6, D) shift1, scale1, gate1, shift2, scale2, gate2 -> those of attention and of the feed-forward."""
    return Modulation(*factors[:, :3].unbind(1)), Modulation(*factors[:, 3:].unbind(1))


class BlockFactors(NamedTuple):
    """All that the adapter adds to modulation, for n rows that carry an identity: of one block, or of A blocks (then
    with A in front)."""

    face: Tensor
    """(n, 6, D): shift1, scale1, gate1, shift2, scale2, gate2 of the face stream (Eq. 6)."""
    can: Tensor
    """(n, 6 * streams, D): CAN's residuals (Eq. 7), the same six for each modulated stream: video, then text."""

    def packed(self) -> Tensor:
        """Both as one tensor, (.., 6 + 6 * streams, D), to be copied at once."""
        return torch.cat(self, dim=-2)

    @classmethod
    def unpacked(cls, packed: Tensor) -> BlockFactors:
        """What `packed` made one."""
        return cls(face=packed[..., :6, :], can=packed[..., 6:, :])


class FaceModulation(nn.Module):
    """`phi_face(t, l)` (Eq. 6): the face stream's factors."""

    def __init__(self, time_dim: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(time_dim, time_dim)
        self.linear_2 = nn.Linear(time_dim, 6 * dim)

    def forward(self, temb: Tensor) -> Tensor:
        """(B, Dt) -> (B, 6, D)."""
        return self.linear_2(F.silu(self.linear_1(F.silu(temb)))).unflatten(-1, (6, -1))  # Eq. 6: phi_face(t, l)


class ConditionedModulation(nn.Module):
    """`phi_cond` of CAN (Eq. 7): residuals on the factors that the frozen block predicts for its streams.

    Residuals, not factors: predicting the factors themselves fails to train, the paper reports.
    """

    def __init__(self, id_dim: int, time_dim: int, dim: int, hidden_dim: int, streams: int) -> None:
        super().__init__()
        self.num_factors = 6 * streams
        self.linear_1 = nn.Linear(id_dim + time_dim + dim, hidden_dim)
        self.linear_2 = nn.Linear(hidden_dim, self.num_factors * dim)

    def forward(self, id_embedding: Tensor, temb: Tensor, video_shift: Tensor) -> Tensor:
        """(B, c1) projected ID, (B, Dt) time embedding, (B, D) shift of the frozen block -> (B, 6 * streams, D)."""
        condition = torch.cat([id_embedding, F.silu(temb), video_shift], dim=-1)
        # Eq. 7: m_hat = phi_cond(x_id, t, mu1_vid)
        return self.linear_2(F.silu(self.linear_1(condition))).unflatten(-1, (self.num_factors, -1))
