"""The adapter's mathematics in another family: diffusers' Wan block, whose text is no stream of the block but read by
a cross-attention of its own, and whose modulation is one table for the video."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import reference_block as reference
import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from tiny_models import ADAPTER_SIZES, assert_near, fill_with_noise, noise, rotary_embedding
from torch import Tensor, nn

from mm_core.hosts.host import Host
from mm_core.models.adapter import MagicMirrorAdapter
from mm_core.models.attention import apply_rotary_emb, split_heads
from mm_core.models.block import FaceState, adapted_block, run_block
from mm_core.models.config import AdapterConfig
from mm_core.models.modulation import BlockFactors

HEADS, HEAD_DIM, LAYERS, VIDEO, TEXT, TIME = 2, 16, 3, 8, 5, 10
DIM = HEADS * HEAD_DIM


class Wan(nn.Module):
    """Wan's blocks, and a projection of the timestep as all of them read it."""

    def __init__(self) -> None:
        super().__init__()
        self.time_proj = nn.Linear(TIME, 6 * DIM)
        self.blocks = nn.ModuleList(WanTransformerBlock(DIM, 40, HEADS, cross_attn_norm=True) for _ in range(LAYERS))


class WanParts:
    """Wan's block as `BlockParts`."""

    def __init__(self, wan: Wan, block: WanTransformerBlock, text: Tensor, rotary: tuple[Tensor, Tensor]) -> None:
        self.wan, self.block, self.text, self.rotary = wan, block, text, rotary

    def modulation(self, temb: Tensor) -> Tensor:
        return (self.block.scale_shift_table + self.wan.time_proj(temb).unflatten(-1, (6, -1)))[:, None]

    def video_shift(self, temb: Tensor) -> Tensor:
        return self.modulation(temb)[:, 0, 0]

    def norm1(self, tokens: Tensor) -> Tensor:
        return self.block.norm1(tokens)

    def qkv(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attn = self.block.attn1
        q, k = attn.norm_q(attn.to_q(tokens)), attn.norm_k(attn.to_k(tokens))  # over all heads
        return tuple(split_heads(x, HEAD_DIM) for x in (q, k, attn.to_v(tokens)))

    def apply_rotary_emb(self, x: Tensor) -> Tensor:
        return apply_rotary_emb(x, self.rotary)

    def attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value)

    def to_out(self, tokens: Tensor) -> Tensor:
        return self.block.attn1.to_out[0](tokens)

    def cross_attention(self, video: Tensor) -> Tensor:
        return video + self.block.attn2(self.block.norm2(video), self.text, None, None)

    def norm2(self, tokens: Tensor) -> Tensor:
        return self.block.norm3(tokens)

    def feed_forward(self, tokens: Tensor) -> Tensor:
        return self.block.ffn(tokens)


class WanHost(Host):
    """All that this family brings; the adapter is as it is."""

    streams = ("video",)

    def sizes(self, transformer: Wan) -> dict[str, int]:
        return dict(
            hidden_size=DIM,
            num_attention_heads=HEADS,
            attention_head_dim=HEAD_DIM,
            num_layers=len(transformer.blocks),
            time_embed_dim=TIME,
            text_embed_dim=DIM,
        )

    def blocks(self, transformer: Wan) -> Sequence[nn.Module]:
        return [WithTable(transformer, block) for block in transformer.blocks]

    def parts(self, block: WithTable) -> WanParts:
        nowhere = torch.empty(0)
        return WanParts(block.wan, block.block, nowhere, (nowhere, nowhere))

    def time_embedding(self, transformer: Wan, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        return (timesteps[:, None] * torch.arange(1, TIME + 1) / 1000).cos().to(dtype)


class WithTable(nn.Module):
    """A block with the projection it shares."""

    def __init__(self, wan: Wan, block: WanTransformerBlock) -> None:
        super().__init__()
        self.wan, self.block = wan, block


class Case:
    """Wan with an adapter on its even blocks, and a batch whose rows all differ."""

    def __init__(self, rows: int = 1) -> None:
        self.wan = fill_with_noise(Wan()).requires_grad_(False)
        sizes = WanHost().sizes(self.wan)
        config = AdapterConfig(**sizes, adapted_layers=(0, 2), num_id_tokens=2, **ADAPTER_SIZES)
        self.adapter = fill_with_noise(MagicMirrorAdapter(config, WanHost.streams), 1)
        self.video, self.text = noise(rows, VIDEO, DIM), noise(rows, TEXT, DIM, seed=5)
        self.face, self.temb = noise(rows, 3, DIM, seed=6), noise(rows, TIME, seed=7)
        self.rotary = rotary_embedding(VIDEO, HEAD_DIM)

    def parts(self, rows: slice = slice(None)) -> WanParts:
        return WanParts(self.wan, self.wan.blocks[2], self.text[rows], self.rotary)

    def own(self, rows: slice = slice(None)) -> Tensor:
        """Wan's own forward."""
        temb = self.wan.time_proj(self.temb[rows]).unflatten(-1, (6, -1))
        rotary = tuple(angle[None, :, None] for angle in self.rotary)
        return self.wan.blocks[2](self.video[rows], self.text[rows], temb, rotary)

    def factors(self, rows: slice = slice(None)) -> BlockFactors:
        temb = self.temb[rows]
        identity = noise(len(self.temb), 9, seed=8)[rows]
        return self.adapter.blocks["2"].factors(identity, temb, self.parts(rows).video_shift(temb))


def test_without_identity_it_is_wans_own_block() -> None:
    case = Case()
    factors = BlockFactors(face=torch.zeros(1, 6, DIM), can=torch.zeros(1, 6, DIM))
    no_text, no_face = case.video[:, :0], case.face[:, :0]
    video, text, face = adapted_block(
        case.parts(), case.adapter.blocks["2"], case.video, no_text, no_face, case.temb, factors, torch.tensor(1.0)
    )
    assert_near(video, case.own(), 1e-5)
    assert text.shape == face.shape == (1, 0, DIM)


@torch.no_grad()
def test_block() -> None:
    """CAN, face stream and decoupled cross-attention, written out for Wan."""
    case = Case()
    state, wan, parts = case.adapter.blocks["2"].state_dict(), case.wan.blocks[2], case.parts()
    factors = case.factors()
    assert factors.can.shape == (1, 6, DIM)
    ours = adapted_block(
        parts, case.adapter.blocks["2"], case.video, case.video[:, :0], case.face, case.temb, factors, torch.tensor(0.7)
    )

    phi = parts.modulation(case.temb)[:, 0]
    shift1, scale1, gate1, shift2, scale2, gate2 = (phi + factors.can).unbind(1)
    face1, face2 = reference.face_factors(state, case.temb)[:3], reference.face_factors(state, case.temb)[3:]
    n_video = wan.norm1(case.video) * (1 + scale1) + shift1
    n_face = reference.layer_norm(state, "face_norm1", case.face) * (1 + face1[1]) + face1[0]
    q, k, v = parts.qkv(torch.cat([n_face, n_video], dim=1))

    def turned(x: Tensor) -> Tensor:
        return torch.cat([x[:, :, :3], reference.rotate(x[:, :, 3:], case.rotary)], dim=2)

    out = reference.softmax_attention(turned(q), turned(k), v)
    key = reference.split_heads(reference.linear(state, "attn.to_k_ip", n_face), HEAD_DIM)
    value = reference.split_heads(reference.linear(state, "attn.to_v_ip", n_face), HEAD_DIM)
    out = out + 0.7 * reference.softmax_attention(q, reference.layer_norm(state, "attn.norm_k_ip", key), value)
    out = wan.attn1.to_out[0](reference.join_heads(out))
    face, video = case.face + face1[2] * out[:, :3], case.video + gate1 * out[:, 3:]
    video = video + wan.attn2(wan.norm2(video), case.text, None, None)
    n_face = reference.layer_norm(state, "face_norm2", face) * (1 + face2[1]) + face2[0]
    n_video = wan.norm3(video) * (1 + scale2) + shift2
    assert_near(ours[0], video + gate2 * wan.ffn(n_video), 1e-5)
    assert_near(ours[2], face + face2[2] * wan.ffn(n_face), 1e-5)


def test_rows_without_identity() -> None:
    """Wan's own bits, beside a row that carries somebody."""
    case = Case(rows=2)
    factors = BlockFactors(*(torch.stack([f, f]) for f in case.factors(slice(1, 2))))
    state = FaceState.entering(case.face[1:], factors, torch.tensor(1.0))

    def plain(video: Tensor, text: Tensor, temb: Tensor) -> tuple[Tensor, Tensor]:
        return case.own(slice(0, 1)), text

    video, _ = run_block(
        case.parts(slice(1, 2)),
        case.adapter.blocks["2"],
        torch.tensor([1]),
        state,
        plain,
        case.video,
        case.video[:, :0],
        case.temb,
    )
    assert torch.equal(video[:1], case.own(slice(0, 1)))
    assert not torch.allclose(video[1:], case.own(slice(1, 2)), atol=1e-2)
    assert state.streams[2].any() and not state.streams[1].any()


@pytest.mark.parametrize("face", [True, False])
def test_state_of_a_pass(face: bool) -> None:
    """The host's shared code makes factors of 6 x D for each adapted block, with gradients to all of CAN."""
    case = Case()
    state = WanHost().face_state(
        case.wan,
        case.adapter,
        id_embedding=case.adapter.id_embedding(noise(1, 2, 12)),
        face_tokens=case.face if face else None,
        timestep=torch.tensor([500]),
    )
    assert state.factors.can.shape == (2, 1, 6, DIM)
    assert state.streams.shape == (3, 1, 3 if face else 0, DIM)
    state.factors.can.square().sum().backward()
    for block in case.adapter.blocks.values():
        assert all(parameter.grad.any() for parameter in block.can.parameters())
