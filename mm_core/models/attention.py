"""Decoupled cross-attention to the face beside the joint attention (paper Sec. 3.3, Eq. 8)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

# (B, heads, S, d) query, key, value -> (B, heads, S, d): softmax(q k^T / sqrt(d)) v, by whatever kernel.
AttentionKernel = Callable[[Tensor, Tensor, Tensor], Tensor]


class FaceKeyValue(nn.Module):
    """`W_kv'` of Eq. 8: the only new projections in the attention."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.to_k_ip = nn.Linear(dim, dim, bias=False)
        self.to_v_ip = nn.Linear(dim, dim, bias=False)
        self.norm_k_ip = nn.LayerNorm(head_dim)

    def forward(self, face_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(n, Q, D) normalised, modulated face tokens -> keys and values, (n, heads, Q, d) each."""
        head_dim = self.norm_k_ip.normalized_shape[0]
        key = self.norm_k_ip(split_heads(self.to_k_ip(face_tokens), head_dim))
        return key, split_heads(self.to_v_ip(face_tokens), head_dim)


def apply_rotary_emb(x: Tensor, image_rotary_emb: tuple[Tensor, Tensor]) -> Tensor:
    """Turn neighbouring channels (a, b) of (B, heads, S, d) to (a cos - b sin, b cos + a sin), computed in float32.

    What diffusers' and core's functions of this name give, in half of their passes over memory: in a step of 5B those
    move as many bytes as the matrix products.

    image_rotary_emb: cosine and sine, (S, d) float32 each.
    """
    cos, sin = image_rotary_emb
    real, imag = x.unflatten(-1, (-1, 2)).unbind(-1)
    crossed = torch.stack([-imag, real], dim=-1).flatten(-2)
    return torch.addcmul(x * cos, crossed, sin).to(x.dtype)


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """(B, S, heads * d) -> (B, heads, S, d)."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """(B, heads, S, d) -> (B, S, heads * d)."""
    return x.transpose(1, 2).flatten(2)
