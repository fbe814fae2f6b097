"""The method, written out in plain tensor algebra from docs/method.md and docs/checkpoint.md alone.

Nothing here knows the project's classes: weights come as state dicts under the documented key names. Slow and literal
on purpose; the code is held against it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

State = Mapping[str, Tensor]
Rotary = tuple[Tensor, Tensor]


def part(state: State, prefix: str) -> State:
    """The entries below a prefix, without it."""
    return {key.removeprefix(prefix + "."): value for key, value in state.items() if key.startswith(prefix + ".")}


def linear(state: State, name: str, x: Tensor) -> Tensor:
    y = x @ state[f"{name}.weight"].T
    return y + state[f"{name}.bias"] if f"{name}.bias" in state else y


def layer_norm(state: State, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    deviation = torch.sqrt((centred**2).mean(dim=-1, keepdim=True) + eps)
    return centred / deviation * state[f"{name}.weight"] + state[f"{name}.bias"]


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def gelu_tanh(x: Tensor) -> Tensor:
    """The base's approximation."""
    return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """(B, S, D) -> (B, heads, S, d)."""
    return torch.stack(x.split(head_dim, dim=-1), dim=1)


def join_heads(x: Tensor) -> Tensor:
    """(B, heads, S, d) -> (B, S, D)."""
    return torch.cat(x.unbind(dim=1), dim=-1)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v."""
    scores = torch.exp(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]))
    return scores / scores.sum(dim=-1, keepdim=True) @ v


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn neighbouring channels (a, b) to (a cos - b sin, a sin + b cos)."""
    cos, sin = rotary[0][:, 0::2].to(x.dtype), rotary[1][:, 0::2].to(x.dtype)
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)


def resampler(state: State, queries: Tensor, image_tokens: Tensor, *, depth: int, head_dim: int) -> Tensor:
    """PhotoMaker-V2's `perceiver_resampler`."""
    image = linear(state, "proj_in", image_tokens)
    for i in range(depth):
        attention, ff = part(state, f"layers.{i}.0"), part(state, f"layers.{i}.1")
        x, latents = layer_norm(attention, "norm1", image), layer_norm(attention, "norm2", queries)
        kv = linear(attention, "to_kv", torch.cat([x, latents], dim=1))
        k, v = kv[..., : kv.shape[-1] // 2], kv[..., kv.shape[-1] // 2 :]
        q = linear(attention, "to_q", latents)
        out = softmax_attention(split_heads(q, head_dim), split_heads(k, head_dim), split_heads(v, head_dim))
        queries = queries + linear(attention, "to_out", join_heads(out))
        queries = queries + linear(ff, "3", gelu(linear(ff, "1", layer_norm(ff, "0", queries))))
    return layer_norm(state, "norm_out", linear(state, "proj_out", queries))


def id_tokens(
    state: State, embedding: Tensor, image_tokens: Tensor, *, tokens: int, depth: int, head_dim: int
) -> Tensor:
    """`x_id = tau_id(q_id, f)` (Eq. 3), PhotoMaker-V2's `qformer_perceiver`: (R, 512) -> (R, N, c)."""
    queries = linear(state, "token_proj.2", gelu(linear(state, "token_proj.0", embedding)))
    queries = torch.stack(queries.chunk(tokens, dim=-1), dim=1)
    queries = layer_norm(state, "token_norm", queries)
    return queries + resampler(
        part(state, "perceiver_resampler"), queries, image_tokens, depth=depth, head_dim=head_dim
    )


def face_tokens(adapter: State, references: list[Tensor], *, depth: int, head_dim: int) -> Tensor:
    """`x_face = tau_face(q_face, f)` (Eq. 4), projected: image tokens (S, clip) of each reference -> (1, Q, D)."""
    perceiver = part(adapter, "face_perceiver")
    image_tokens = torch.cat(references, dim=0)[None]
    queries = perceiver["query_tokens"]
    tokens = queries + resampler(
        part(perceiver, "perceiver_resampler"), queries, image_tokens, depth=depth, head_dim=head_dim
    )
    return linear(adapter, "face_proj", tokens)


def fused_slot(adapter: State, text: Tensor, id_token: Tensor, identity_scale: float) -> Tensor:
    """One marked slot (Dtxt,) and its ID token (c,) (Eq. 5), blended by the strength."""

    def mlp(name: str, x: Tensor) -> Tensor:
        state = part(adapter, f"id_fusion.{name}")
        return linear(state, "fc2", gelu(linear(state, "fc1", layer_norm(state, "layernorm", x))))

    y = text + mlp("mlp1", torch.cat([text, id_token]))
    fused = y + mlp("mlp2", y)
    return text + identity_scale * (fused - text)


def id_embedding(adapter: State, tokens: Tensor) -> Tensor:
    """(N, c) -> (1, c1): projected token after token."""
    return linear(adapter, "id_proj", torch.cat(list(tokens))[None])


def can_residuals(block: State, projected_id: Tensor, temb: Tensor, mu1_vid: Tensor) -> list[Tensor]:
    """CAN's 12 residuals (Eq. 7)."""
    condition = torch.cat([projected_id, silu(temb), mu1_vid], dim=-1)
    return list(linear(block, "can.linear_2", silu(linear(block, "can.linear_1", condition))).chunk(12, dim=-1))


def face_factors(block: State, temb: Tensor) -> list[Tensor]:
    """shift1, scale1, gate1, shift2, scale2, gate2 of the face stream (Eq. 6)."""
    hidden = silu(linear(block, "face_modulation.linear_1", silu(temb)))
    return list(linear(block, "face_modulation.linear_2", hidden).chunk(6, dim=-1))


def adapted_block(
    base: State,
    block: State,
    *,
    head_dim: int,
    video: Tensor,
    text: Tensor,
    face: Tensor,
    temb: Tensor,
    projected_id: Tensor,
    rotary: Rotary | None,
    can_scale: float = 1.0,
    ip_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """ "One adapted block, in order" for a batch whose rows all carry the identity: video, text and face after it."""
    # 1. The base's factors plus CAN's residuals.
    first = list(linear(base, "norm1.linear", silu(temb)).chunk(6, dim=-1))
    second = list(linear(base, "norm2.linear", silu(temb)).chunk(6, dim=-1))
    hat = [can_scale * residual for residual in can_residuals(block, projected_id, temb, first[0])]
    video1 = [phi + m for phi, m in zip(first[0:3], hat[0:3])]
    video2 = [phi + m for phi, m in zip(second[0:3], hat[3:6])]
    text1 = [phi + m for phi, m in zip(first[3:6], hat[6:9])]
    text2 = [phi + m for phi, m in zip(second[3:6], hat[9:12])]
    face_all = face_factors(block, temb)
    face1, face2 = face_all[0:3], face_all[3:6]

    def modulate(x: Tensor, factors: list[Tensor]) -> Tensor:
        shift, scale, _ = factors
        return x * (1 + scale[:, None]) + shift[:, None]

    def gated(x: Tensor, factors: list[Tensor], update: Tensor) -> Tensor:
        return x + factors[2][:, None] * update

    # 2. Norms.
    n_text = modulate(layer_norm(base, "norm1.norm", text), text1)
    n_video = modulate(layer_norm(base, "norm1.norm", video), video1)
    n_face = modulate(layer_norm(block, "face_norm1", face), face1)

    # 3. Joint attention over [text, face, video].
    x = torch.cat([n_text, n_face, n_video], dim=1)
    lengths = [text.shape[1], face.shape[1], video.shape[1]]
    q = layer_norm(base, "attn1.norm_q", split_heads(linear(base, "attn1.to_q", x), head_dim), eps=1e-6)
    k = layer_norm(base, "attn1.norm_k", split_heads(linear(base, "attn1.to_k", x), head_dim), eps=1e-6)
    v = split_heads(linear(base, "attn1.to_v", x), head_dim)

    def rotated(y: Tensor) -> Tensor:
        before = lengths[0] + lengths[1]
        return y if rotary is None else torch.cat([y[:, :, :before], rotate(y[:, :, before:], rotary)], dim=2)

    out = softmax_attention(rotated(q), rotated(k), v)

    # 4. Cross-attention of every query to the face.
    k_ip = layer_norm(block, "attn.norm_k_ip", split_heads(linear(block, "attn.to_k_ip", n_face), head_dim))
    v_ip = split_heads(linear(block, "attn.to_v_ip", n_face), head_dim)
    out = out + ip_scale * softmax_attention(q, k_ip, v_ip)

    # 5. Output projection and gates.
    a_text, a_face, a_video = linear(base, "attn1.to_out.0", join_heads(out)).split(lengths, dim=1)
    text, face, video = gated(text, text1, a_text), gated(face, face1, a_face), gated(video, video1, a_video)

    # 6. Feed-forward.
    n_text = modulate(layer_norm(base, "norm2.norm", text), text2)
    n_video = modulate(layer_norm(base, "norm2.norm", video), video2)
    n_face = modulate(layer_norm(block, "face_norm2", face), face2)
    hidden = gelu_tanh(linear(base, "ff.net.0.proj", torch.cat([n_text, n_face, n_video], dim=1)))
    f_text, f_face, f_video = linear(base, "ff.net.2", hidden).split(lengths, dim=1)
    return gated(video, video2, f_video), gated(text, text2, f_text), gated(face, face2, f_face)
