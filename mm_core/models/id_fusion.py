"""Text fusion: the ID tokens replace the T5 embedding of the word that names the person (paper Eq. 5)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MLP(nn.Module):
    """LayerNorm, Linear, GELU, Linear; the residual is the caller's."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.layernorm = nn.LayerNorm(in_dim)
        self.fc1 = nn.Linear(in_dim, out_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(out_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(self.layernorm(x))))


class IDFusion(nn.Module):
    """`x_hat_id = MLP_fuse(x_id, m * x_txt)`, one ID token for each marked text slot.

    Both `fc2` start at zero, so a fresh adapter leaves the text as it is. PhotoMaker closes with a LayerNorm, whose
    unit scale T5 embeddings do not have, so there is none here.
    """

    def __init__(self, text_dim: int, id_dim: int) -> None:
        super().__init__()
        self.mlp1 = MLP(text_dim + id_dim, text_dim)
        self.mlp2 = MLP(text_dim, text_dim)

    def forward(self, text_slots: Tensor, id_tokens: Tensor) -> Tensor:
        """(B, N, Dtxt) marked slots and (B, N, c) ID tokens -> (B, N, Dtxt) fused slots."""
        # Eq. 5: x_hat_id = MLP_fuse(x_id, m * x_txt)
        y = text_slots + self.mlp1(torch.cat([text_slots, id_tokens], dim=-1))
        return y + self.mlp2(y)


def fuse_slots(prompt_embeds: Tensor, fused: Tensor, slots: tuple[int, ...], scale: float) -> Tensor:
    """The text with the fused identity in its place, as far as the strength says (Eq. 5): only the marked slots change.

    Args:
        prompt_embeds: (B, T, Dtxt) T5 embeddings of the prompt.
        fused: (B, N, Dtxt) from `IDFusion`.
        slots: the N positions, in the prompt, of the marked word.
        scale: `identity_scale`; 1 replaces the slots, 0 leaves them.
    """
    # Eq. 5, with strength s: x_txt + s * m * (x_hat_txt - x_txt)
    text = prompt_embeds[:, slots, :]
    out = prompt_embeds.clone()
    out[:, slots, :] = text + scale * (fused - text)
    return out
