"""Joint attention over [text, face, video] with decoupled cross-attention to the face (paper Sec. 3.3, Eq. 8)."""

from __future__ import annotations

from collections.abc import Callable

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


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """(B, S, heads * d) -> (B, heads, S, d)."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """(B, heads, S, d) -> (B, S, heads * d)."""
    return x.transpose(1, 2).flatten(2)


def decoupled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    face: tuple[Tensor, Tensor],
    ip_scale: float,
    rotary: Callable[[Tensor], Tensor],
    kernel: AttentionKernel,
) -> Tensor:
    """Attention to all, and to the face beside it, before the output projection (Eq. 8).

    Args:
        query, key, value: (n, heads, S, d) of text, face and video, in this order, after their norms, before rotary.
        face: keys and values of the face, from `FaceKeyValue`.
        rotary: turns the video part of a query or key; text and face have no position.
        kernel: softmax attention.
    """
    # Eq. 8: T_SA(W_qkv x_full) + ip_scale * T_CA(W_q x_full, W_kv' x_face)
    out = kernel(rotary(query), rotary(key), value)
    if ip_scale:
        out = out + ip_scale * kernel(query, *face)
    return out
