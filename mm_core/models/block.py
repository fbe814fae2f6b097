"""One adapted block, in the order of the paper (Sec. 3.3). Plain torch: it does not know whose block it runs in.

A front end, such as the one for diffusers, takes a frozen block apart into a `BaseBlock`; the mathematics below is
written once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .attention import AttentionKernel, FaceKeyValue, decoupled_attention, join_heads, split_heads
from .config import AdapterConfig
from .modulation import BlockFactors, ConditionedModulation, FaceModulation, Modulation

Layer = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class BaseBlock:
    """The parts of a frozen CogVideoX block, whatever class they come from. Built anew for each call: a LoRA may have
    replaced a layer since the last one."""

    head_dim: int
    modulation1: Layer
    """(B, Dt) -> (B, 6D): video shift, scale, gate, then text shift, scale, gate (`phi_vid`, `phi_txt`)."""
    norm1: Layer
    to_q: Layer
    to_k: Layer
    to_v: Layer
    norm_q: Layer
    norm_k: Layer
    to_out: Layer
    modulation2: Layer
    """The same for the feed-forward; the first is for attention."""
    norm2: Layer
    feed_forward: Layer
    rotary: Callable[[Tensor], Tensor]
    """Turns the video tokens, the last ones of a (B, heads, S, d) sequence."""
    kernel: AttentionKernel


class AdapterBlock(nn.Module):
    """All trained weights of one adapted block."""

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.face_norm1 = nn.LayerNorm(dim)
        self.face_norm2 = nn.LayerNorm(dim)
        self.face_modulation = FaceModulation(config.time_embed_dim, dim)
        self.can = ConditionedModulation(config.id_proj_dim, config.time_embed_dim, dim, config.can_hidden_dim)
        self.attn = FaceKeyValue(dim, config.attention_head_dim)

    def factors(self, id_embedding: Tensor, temb: Tensor, video_shift: Tensor) -> BlockFactors:
        """The adapter's modulation at (t, l): what `conditioning.py` computes once for a whole schedule."""
        return BlockFactors(face=self.face_modulation(temb), can=self.can(id_embedding, temb, video_shift))


def video_shift(base: BaseBlock, temb: Tensor) -> Tensor:
    """The shift of the video before attention that the frozen block predicts, without CAN: (B, Dt) -> (B, D)."""
    # mu1_vid, the first of six.
    return base.modulation1(temb).chunk(6, dim=-1)[0]


def adapted_block(
    base: BaseBlock,
    adapter: AdapterBlock,
    video: Tensor,
    text: Tensor,
    temb: Tensor,
    face: Tensor | None,
    factors: BlockFactors,
    can_scale: float,
    ip_scale: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A CogVideoX block with Magic Mirror's face stream, CAN and decoupled cross-attention.

    The last n rows of the batch carry the identity; the rows before them (the unconditional half of guidance) take the
    plain path. Every layer is called once for all rows and streams, so that offloading moves its weights once.

    Args:
        video: (B, S, D) video tokens.
        text: (B, T, D) text tokens.
        temb: (B, Dt) time embedding.
        face: (n, Q, D) face stream, n <= B; None with the structure branch switched off.
        factors: the adapter's modulation for the n rows.
        can_scale, ip_scale: strengths of CAN's residuals and of the cross-attention.

    Returns:
        video, text and face stream after the block.
    """
    rows = factors.can.shape[0]
    vid1, txt1 = _conditioned(base.modulation1(temb), can_scale * factors.can[:, 0:3], can_scale * factors.can[:, 6:9])
    vid2, txt2 = _conditioned(base.modulation2(temb), can_scale * factors.can[:, 3:6], can_scale * factors.can[:, 9:12])
    face1, face2 = Modulation(*factors.face[:, :3].unbind(1)), Modulation(*factors.face[:, 3:].unbind(1))

    n_video, n_text = vid1(base.norm1(video)), txt1(base.norm1(text))
    n_face = None if face is None else face1(adapter.face_norm1(face))
    a_text, a_face, a_video = _attention(base, adapter, n_text, n_face, n_video, rows, ip_scale)
    video, text = vid1.residual(video, a_video), txt1.residual(text, a_text)
    face = None if face is None else face1.residual(face, a_face)

    n_video, n_text = vid2(base.norm2(video)), txt2(base.norm2(text))
    n_face = None if face is None else face2(adapter.face_norm2(face))
    packed, unpack = _pack(n_text, n_face, n_video, rows)
    f_text, f_face, f_video = unpack(_per_token(base.feed_forward, packed))
    video, text = vid2.residual(video, f_video), txt2.residual(text, f_text)
    face = None if face is None else face2.residual(face, f_face)
    return video, text, face


def _attention(
    base: BaseBlock,
    adapter: AdapterBlock,
    text: Tensor,
    face: Tensor | None,
    video: Tensor,
    rows: int,
    ip_scale: float,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Self-attention of every row over [text, face, video], plus cross-attention to the face where there is one."""
    packed, unpack = _pack(text, face, video, rows)
    queries = [base.norm_q(split_heads(q, base.head_dim)) for q in _per_token(base.to_q, packed)]
    keys = [base.norm_k(split_heads(k, base.head_dim)) for k in _per_token(base.to_k, packed)]
    values = [split_heads(v, base.head_dim) for v in _per_token(base.to_v, packed)]
    outs = [base.kernel(base.rotary(q), base.rotary(k), v) for q, k, v in zip(queries[:-1], keys[:-1], values[:-1])]
    q, k, v = queries[-1], keys[-1], values[-1]
    if face is None:
        outs.append(base.kernel(base.rotary(q), base.rotary(k), v))
    else:
        outs.append(decoupled_attention(q, k, v, adapter.attn(face), ip_scale, base.rotary, base.kernel))
    return unpack(_per_token(base.to_out, [join_heads(out) for out in outs]))


def _conditioned(base_factors: Tensor, video_delta: Tensor, text_delta: Tensor) -> tuple[Modulation, Modulation]:
    """The factors of the block plus the residuals on the last rows (Eq. 7); the plain rows before them stay.

    base_factors: (B, 6D); the deltas: (n, 3, D).
    """
    # Eq. 7: m = phi(t, l) + m_hat
    shift, scale, gate, text_shift, text_scale, text_gate = base_factors.chunk(6, dim=-1)
    plain_rows = base_factors.shape[0] - video_delta.shape[0]
    pad = (0, 0, 0, 0, plain_rows, 0)
    return (
        Modulation(shift, scale, gate).plus(nn.functional.pad(video_delta, pad)),
        Modulation(text_shift, text_scale, text_gate).plus(nn.functional.pad(text_delta, pad)),
    )


Unpack = Callable[[Sequence[Tensor]], tuple[Tensor, Tensor | None, Tensor]]


def _pack(text: Tensor, face: Tensor | None, video: Tensor, rows: int) -> tuple[list[Tensor], Unpack]:
    """Join the streams into sequences: [text, video] for the plain rows, if any, then [text, face, video] for the last
    `rows`. Returns them and the function that takes results of the same lengths apart again."""
    plain = text.shape[0] - rows
    length, faces = text.shape[1], 0 if face is None else face.shape[1]
    streams = [text[plain:], video[plain:]] if face is None else [text[plain:], face, video[plain:]]
    packed = [torch.cat(streams, dim=1)]
    if plain:
        packed.insert(0, torch.cat([text[:plain], video[:plain]], dim=1))

    def unpack(results: Sequence[Tensor]) -> tuple[Tensor, Tensor | None, Tensor]:
        identity = results[-1]
        texts, videos = [identity[:, :length]], [identity[:, length + faces :]]
        if plain:
            texts.insert(0, results[0][:, :length])
            videos.insert(0, results[0][:, length:])
        face_part = None if face is None else identity[:, length : length + faces]
        return _rows(texts), face_part, _rows(videos)

    return packed, unpack


def _rows(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _per_token(layer: Layer, sequences: list[Tensor]) -> list[Tensor]:
    """Apply a token-wise layer to sequences of different lengths in a single call."""
    if len(sequences) == 1:
        return [layer(sequences[0])]
    tokens = torch.cat([s.flatten(0, 1) for s in sequences])
    results = layer(tokens).split([s.shape[0] * s.shape[1] for s in sequences])
    return [r.unflatten(0, s.shape[:2]) for r, s in zip(results, sequences)]
