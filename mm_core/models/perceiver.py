"""The perceiver of both branches, a Q-Former (paper Sec. 3.2, Eq. 3 and 4).

Names and structure follow the published weights of PhotoMaker-V2, because the ID branch is loaded from them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PerceiverAttention(nn.Module):
    """Queries attend to the image tokens and to themselves."""

    def __init__(self, dim: int, dim_head: int) -> None:
        super().__init__()
        self.dim_head = dim_head
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)

    def forward(self, image_tokens: Tensor, queries: Tensor, bias: Tensor | None = None) -> Tensor:
        image_tokens = self.norm1(image_tokens)  # (B, S, P)
        queries = self.norm2(queries)  # (B, Q, P)
        q = self.to_q(queries)
        k, v = self.to_kv(torch.cat([image_tokens, queries], dim=1)).chunk(2, dim=-1)  # (B, S + Q, P) each
        q, k, v = (x.unflatten(-1, (-1, self.dim_head)).transpose(1, 2) for x in (q, k, v))  # (B, heads, ., dim_head)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.to_out(out.transpose(1, 2).flatten(2))  # (B, Q, P)


def feed_forward(dim: int, mult: int = 4) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(dim),
        nn.Linear(dim, mult * dim, bias=False),
        nn.GELU(),
        nn.Linear(mult * dim, dim, bias=False),
    )


class PerceiverResampler(nn.Module):
    """`depth` layers of (attention to the image, feed-forward), each with a residual on the queries."""

    def __init__(self, *, image_dim: int, dim: int, depth: int, dim_head: int) -> None:
        super().__init__()
        self.proj_in = nn.Linear(image_dim, dim)
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(dim, dim_head), feed_forward(dim)]) for _ in range(depth)
        )
        self.proj_out = nn.Linear(dim, dim)
        self.norm_out = nn.LayerNorm(dim)

    def forward(self, queries: Tensor, image_tokens: Tensor, weights: Tensor | None = None) -> Tensor:
        """weights: (S,) above 0, as if each image token were there so many times."""
        bias = None
        if weights is not None:  # w equal tokens in a softmax are one with w times its exponential
            bias = F.pad(weights.log(), (0, queries.shape[1])).to(image_tokens)[None, None, None]  # (1, 1, 1, S + Q)
        image_tokens = self.proj_in(image_tokens)  # (B, S, image_dim) -> (B, S, P)
        for attention, ff in self.layers:
            queries = queries + attention(image_tokens, queries, bias)
            queries = queries + ff(queries)
        return self.norm_out(self.proj_out(queries))  # (B, Q, P)


class IDPerceiver(nn.Module):
    """`x_id = tau_id(q_id, f)` (Eq. 3): the face embedding, as N query tokens, reads the ViT's image tokens."""

    def __init__(self, *, id_dim: int, image_dim: int, dim: int, num_tokens: int, depth: int, dim_head: int) -> None:
        super().__init__()
        self.token_proj = nn.Sequential(
            nn.Linear(id_dim, 4 * id_dim), nn.GELU(), nn.Linear(4 * id_dim, num_tokens * dim)
        )
        self.token_norm = nn.LayerNorm(dim)
        self.perceiver_resampler = PerceiverResampler(image_dim=image_dim, dim=dim, depth=depth, dim_head=dim_head)

    def forward(self, id_embedding: Tensor, image_tokens: Tensor) -> Tensor:
        """(B, id_dim) raw ArcFace embeddings and (B, S, image_dim) -> (B, N, dim) ID tokens."""
        queries = self.token_proj(id_embedding)
        queries = self.token_norm(queries.unflatten(-1, (-1, self.token_norm.normalized_shape[0])))  # (B, N, dim)
        return queries + self.perceiver_resampler(queries, image_tokens)  # Eq. 3: x_id = tau_id(q_id, f)


class FacePerceiver(nn.Module):
    """`x_face = tau_face(q_face, f)` (Eq. 4): learnable queries read the face's structure from the image tokens."""

    def __init__(self, *, image_dim: int, dim: int, num_tokens: int, depth: int, dim_head: int) -> None:
        super().__init__()
        self.query_tokens = nn.Parameter(torch.randn(1, num_tokens, dim) * dim**-0.5)
        self.perceiver_resampler = PerceiverResampler(image_dim=image_dim, dim=dim, depth=depth, dim_head=dim_head)

    def forward(self, image_tokens: Tensor, weights: Tensor | None = None) -> Tensor:
        """(B, S, image_dim), all references' tokens in one row -> (B, Q, dim), whatever their number.

        weights: (S,) above 0, as if each image token were there so many times.
        """
        # In ComfyUI the weights rest elsewhere than they compute; its layers cast theirs, and this is in none.
        queries = self.query_tokens.to(image_tokens.device).expand(image_tokens.shape[0], -1, -1)
        return queries + self.perceiver_resampler(queries, image_tokens, weights)  # Eq. 4: x_face = tau_face(q_face, f)
