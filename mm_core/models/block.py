"""One adapted block, in the order of the paper (Sec. 3.3). Plain torch: it does not know whose block it runs in.

A host (`mm_core/hosts`) shows a frozen block as `BlockParts`; the mathematics below is written once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from .attention import AttentionKernel, FaceKeyValue, join_heads
from .config import AdapterConfig
from .modulation import BlockFactors, ConditionedModulation, FaceModulation, halves

VIDEO_AND_TEXT = ("video", "text")
"""The streams whose modulation CAN changes, in CogVideoX: both, with 12 x D factors."""


class BlockParts(Protocol):
    """The parts of a frozen DiT block. Made anew for each call: a LoRA may have replaced a layer since the last one."""

    attention: AttentionKernel

    def modulation(self, temb: Tensor) -> Tensor:
        """`phi(t, l)` of each modulated stream, video first: (B, Dt) -> (B, streams, 6, D), the six as in `halves`."""

    def video_shift(self, temb: Tensor) -> Tensor:
        """(B, Dt) -> (B, D): `mu1_vid`, the video's shift before attention, without CAN."""

    def norm1(self, tokens: Tensor) -> Tensor:
        """Normalise a stream before attention, (B, S, D), without modulation."""

    def qkv(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, S, D) -> query, key, value, (B, heads, S, d) each, after their norms, before rotary."""

    def apply_rotary_emb(self, x: Tensor) -> Tensor:
        """Turn the queries or keys of the video tokens, (B, heads, S, d); text and face have no position."""

    def to_out(self, tokens: Tensor) -> Tensor:
        """Project the attention's output, (B, S, D)."""

    def cross_attention(self, video: Tensor) -> Tensor:
        """What a family does to the video, (B, S, D), between attention and feed-forward; CogVideoX: nothing."""

    def norm2(self, tokens: Tensor) -> Tensor:
        """As `norm1`, before the feed-forward."""

    def feed_forward(self, tokens: Tensor) -> Tensor: ...


class AdapterBlock(nn.Module):
    """All trained weights of one adapted block."""

    def __init__(self, config: AdapterConfig, streams: tuple[str, ...] = VIDEO_AND_TEXT) -> None:
        super().__init__()
        dim, time_dim = config.hidden_size, config.time_embed_dim
        self.face_norm1 = nn.LayerNorm(dim)
        self.face_norm2 = nn.LayerNorm(dim)
        self.face_modulation = FaceModulation(time_dim, dim)
        self.can = ConditionedModulation(config.id_proj_dim, time_dim, dim, config.can_hidden_dim, len(streams))
        self.attn = FaceKeyValue(dim, config.attention_head_dim)

    def factors(self, id_embedding: Tensor, temb: Tensor, video_shift: Tensor) -> BlockFactors:
        """The adapter's modulation at (t, l), before the first step: it does not depend on the latents."""
        return BlockFactors(face=self.face_modulation(temb), can=self.can(id_embedding, temb, video_shift))


def adapted_block(
    base: BlockParts,
    adapter: AdapterBlock,
    video: Tensor,
    text: Tensor,
    face: Tensor,
    temb: Tensor,
    factors: BlockFactors,
    ip_scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """A frozen block with Magic Mirror's face stream, CAN and decoupled cross-attention; all n rows have an identity.

    Args:
        video: (n, S, D).
        text: (n, T, D); T is 0 in families whose text is no stream of the block.
        face: (n, Q, D); Q is 0 with the structure branch switched off.
        temb: (n, Dt) time embedding.
        factors: the adapter's modulation, CAN's strength in it.
        ip_scale: (), strength of the cross-attention.

    Returns:
        video, text and face after the block.
    """
    lengths = [text.shape[1], face.shape[1], video.shape[1]]
    m = base.modulation(temb) + factors.can.unflatten(1, (-1, 6))  # Eq. 7: m = phi(t, l) + m_hat, (n, streams, 6, D)
    (vid1, vid2), (txt1, txt2), (face1, face2) = halves(m[:, 0]), halves(m[:, -1]), halves(factors.face)

    n_face = face1.modulate(adapter.face_norm1(face))  # (n, Q, D); full: (n, T + Q + S, D)
    full = torch.cat([txt1.modulate(base.norm1(text)), n_face, vid1.modulate(base.norm1(video))], dim=1)
    q, k, v = base.qkv(full)  # (n, heads, T + Q + S, d) each
    out = base.attention(turned(base, q, lengths), turned(base, k, lengths), v)
    if face.shape[1]:  # Eq. 8: T_SA(W_qkv x_full) + T_CA(W_q x_full, W_kv' x_face)
        k_ip, v_ip = adapter.attn(n_face)  # (n, heads, Q, d) each
        out = out + base.attention(q, k_ip, ip_scale * v_ip)
    a_text, a_face, a_video = base.to_out(join_heads(out)).split(lengths, dim=1)
    text, face = txt1.residual(text, a_text), face1.residual(face, a_face)
    video = base.cross_attention(vid1.residual(video, a_video))

    n_face = face2.modulate(adapter.face_norm2(face))
    full = torch.cat([txt2.modulate(base.norm2(text)), n_face, vid2.modulate(base.norm2(video))], dim=1)
    f_text, f_face, f_video = base.feed_forward(full).split(lengths, dim=1)
    return vid2.residual(video, f_video), txt2.residual(text, f_text), face2.residual(face, f_face)


def turned(base: BlockParts, x: Tensor, lengths: list[int]) -> Tensor:
    """Queries or keys with rotary positions on the video, the last stream."""
    rest, video = x.split([sum(lengths[:-1]), lengths[-1]], dim=2)
    return torch.cat([rest, base.apply_rotary_emb(video)], dim=2)


@dataclass(kw_only=True)
class FaceState:
    """The identity in one forward pass of the transformer, for the last n rows of the batch.

    Factors and streams of all A adapted blocks stand in one tensor each, from which a block takes its own by a number
    that is a tensor too: to `torch.compile` all blocks look the same. The stream that enters a block stays here, so
    that gradient checkpointing finds it when it runs the block again.
    """

    factors: BlockFactors
    """face (A, n, 6, D) and can (A, n, 6 * streams, D), CAN's strength in it."""
    streams: Tensor
    """(A + 1, n, Q, D): the face stream entering each adapted block, and leaving the last. Q is 0 without the structure
    branch."""
    ip_scale: Tensor
    """(), strength of the cross-attention."""

    @classmethod
    def entering(cls, face: Tensor | None, factors: BlockFactors, ip_scale: Tensor) -> FaceState:
        """The state before the first block. face: (n, Q, D) tokens; None for no structure branch."""
        blocks, rows, _, dim = factors.face.shape
        face = factors.face.new_empty(rows, 0, dim) if face is None else face
        # Joined, not padded: torch 2.6 pads nothing that holds no face tokens.
        streams = torch.cat([face[None], face.new_zeros(blocks, *face.shape)])
        return cls(factors=factors, streams=streams, ip_scale=ip_scale)

    @classmethod
    def of_step(
        cls, packed: Tensor, face: Tensor | None, *, rows: int, can_scale: float, ip_scale: Tensor
    ) -> FaceState:
        """As `entering`, for as many rows of one person, from the factors of a step that were computed before.

        Args:
            packed: (A, 6 + 6 * streams, D), see `BlockFactors.packed`.
            face: (1, Q, D) tokens; None for no structure branch.
        """
        factors = BlockFactors.unpacked(packed[:, None].expand(-1, rows, -1, -1))
        factors = factors._replace(can=can_scale * factors.can)
        return cls.entering(None if face is None else face.expand(rows, -1, -1), factors, ip_scale)


def run_block(
    base: BlockParts,
    adapter: AdapterBlock,
    position: Tensor,
    state: FaceState,
    plain: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    video: Tensor,
    text: Tensor,
    temb: Tensor,
) -> tuple[Tensor, Tensor]:
    """A block of a batch whose last n rows carry the identity; the rows before them are the frozen block's own.

    Args:
        position: (1,), which of the adapted blocks this is.
        plain: the frozen block's own forward on (video, text, temb).

    Returns:
        video (B, S, D) and text (B, T, D); the face stream is in the state.
    """
    rows = video.shape[0] - state.streams.shape[1]
    factors = BlockFactors(*(of_all.index_select(0, position)[0] for of_all in state.factors))
    face = state.streams.index_select(0, position)[0]
    own_video, own_text, face = adapted_block(
        base, adapter, video[rows:], text[rows:], face, temb[rows:], factors, state.ip_scale
    )
    state.streams = state.streams.index_copy(0, position + 1, face[None])
    if not rows:
        return own_video, own_text
    plain_video, plain_text = plain(video[:rows], text[:rows], temb[:rows])
    return torch.cat([plain_video, own_video]), torch.cat([plain_text, own_text])
